"""From a plan to what answers for a version of a model, and out of service again.

A version is brought up beside the one that answers, takes its place in a moment, and the old one is let go when nobody
holds it any more.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from functools import partial

from accelrt.errors import AccelrtError, ModelUnavailable, RequestError
from accelrt.serve.interface import ServedModel
from accelrt.serve.models.background import spawn
from accelrt.serve.models.opening import Opened, open_version
from accelrt.serve.models.records import Entry, Plan, Slot
from accelrt.serve.models.residency import Residency, Resident
from accelrt.serve.models.served import LiveModel, Loads
from accelrt.serve.models.settings import ServiceSettings
from accelrt.serve.models.statistics import VersionStatistics

logger = logging.getLogger("accelrt")

NOT_RESIDENT = "not in memory; the next request loads it"
EVICTED_DRAIN_S = 0.5
"""How long a model that makes room is kept for those who hold it; after that a request of theirs loads it again."""


class Lifecycle:
    """What answers for each version.

    Args:
        settings: How the service works.
        entries: What it keeps of its models.
        lock: Under which both change.
        again: Finds a model anew, by name and version.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        entries: Mapping[str, Entry],
        lock: threading.RLock,
        again: Callable[[str, str], Awaitable[ServedModel]],
    ) -> None:
        self.residency = Residency(settings.max_resident_models, settings.max_resident_bytes)
        self.closed = False
        """Nothing is brought up any more."""
        self._settings, self._entries, self._lock, self._again = settings, entries, lock, again
        # What `find` reads without a lock.
        self._latest: dict[str, LiveModel] = {}
        self._exact: dict[tuple[str, str], LiveModel] = {}
        self._draining: set[Future[None]] = set()
        self._loads = Loads()

    def find(self, name: str, version: str = "") -> ServedModel | None:
        """Return a version of a model that is ready, None where `model` would have to wait or to refuse."""
        return self._exact.get((name, version)) if version else self._latest.get(name)

    def bring_up(self, slot: Slot, plan: Plan, *, evict: bool, wait_s: float, fresh: bool = False) -> None:
        """Load a version, warm it up, and have it answer in the place of what did so far."""
        if self.closed:
            raise ModelUnavailable("The server is shutting down.")
        token = object()
        expected = slot.known_bytes or sum(size for _, size, _, _ in plan.stamp) or _size_of(plan)
        self.residency.reserve(token, Resident(slot.name, expected), wait_s=wait_s, evict=evict, replaces=slot.token)
        statistics = VersionStatistics() if fresh else slot.statistics
        try:
            with self._loads:
                opened = open_version(
                    slot.name,
                    slot.version,
                    plan,
                    statistics,
                    trust=self._settings.trust,
                    direct_us=self._settings.direct_us,
                    loads=self._loads,
                    proof=None if fresh else slot.proof,
                    versions=self._versions(slot),
                    again=self._again,
                    changed=partial(self._worker_changed, slot, token),
                )
        except BaseException as error:
            self.residency.release(token)
            if isinstance(error, AccelrtError):
                raise
            raise RequestError(f"It could not be loaded: {type(error).__name__}: {error}") from error
        self._take_over(slot, plan, token, opened, statistics)
        self.residency.trim()

    def _versions(self, slot: Slot) -> tuple[str, ...]:
        """Return the versions that a model's metadata names."""
        with self._lock:
            entry = self._entries.get(slot.name)
            found = entry.found if entry is not None else None
        return tuple(sorted({slot.version, *(found.versions if found is not None else ())}, key=int))

    def _take_over(self, slot: Slot, plan: Plan, token: object, opened: Opened, statistics: VersionStatistics) -> None:
        queue, size = opened.live.queue, opened.live.facts.resident_bytes
        with self._lock:
            self.retire(slot, self._settings.drain_s)
            statistics.last_used_ns = time.monotonic_ns()
            slot.plan, slot.live, slot.token, slot.statistics = plan, opened.live, token, statistics
            slot.predictor, slot.proof, slot.known_bytes = opened.isolated, opened.proof, size
            slot.state, slot.reason = "READY", opened.note
            slot.on_demand = slot.ever_loaded = True
            slot.failures, slot.retry_at = 0, 0.0
            slot.loads += 1
            self._publish(slot.name)
        # Only now: whoever makes room must find what it is to unload.
        self.residency.settle(
            token,
            Resident(
                slot.name,
                size,
                plan.settings.pinned,
                lambda: not queue.busy,
                lambda: statistics.last_used_ns,
                partial(self._evict, slot, token),
            ),
        )

    def _evict(self, slot: Slot, token: object) -> None:
        """Unload a version to make room; called by `Residency`, and does not wait."""
        with self._lock:
            if slot.token is token:
                self.retire(slot, EVICTED_DRAIN_S)
                slot.state, slot.reason = "UNAVAILABLE", NOT_RESIDENT

    def retire(self, slot: Slot, drain_s: float) -> Future[None] | None:
        """Take what answers for a version out of service; return what is done when it is gone. Under the lock."""
        live, token = slot.live, slot.token
        if live is None:
            return None
        queue, predictor, released = live.queue, live.predictor, live.released
        slot.live = slot.token = slot.predictor = None
        slot.state = "UNLOADING"
        self._publish(slot.name)
        del live  # or it would never be released

        def drain() -> None:
            # Who found it holds it until it has answered. One who holds it longer than that finds another.
            released.wait(drain_s)
            queue.close()
            predictor.close()
            self.residency.release(token)

        future = spawn(drain)
        self._draining.add(future)
        future.add_done_callback(self._draining.discard)
        return future

    def _publish(self, name: str) -> None:
        """Renew what `find` reads. Under the lock."""
        entry = self._entries.get(name)
        slots = [] if entry is None else [slot for slot in entry.slots.values() if slot.state == "READY"]
        ready = {slot.version: slot.live for slot in slots if slot.live is not None}
        for key in [key for key in self._exact if key[0] == name and key[1] not in ready]:
            del self._exact[key]
        for version, live in ready.items():
            self._exact[name, version] = live
        if ready:
            self._latest[name] = ready[max(ready, key=int)]
        else:
            self._latest.pop(name, None)

    def _worker_changed(self, slot: Slot, token: object, reason: str | None) -> None:
        """A worker process died, with the reason, or is back."""
        if reason is not None:
            logger.warning("Model %s version %s: %s", slot.name, slot.version, reason)
        with self._lock:
            if slot.token is not token:
                return
            slot.state, slot.reason = ("READY", "") if reason is None else ("UNAVAILABLE", reason)
            self._publish(slot.name)

    def wait(self) -> None:
        """Wait until all that was taken out of service is gone."""
        with self._lock:
            draining = list(self._draining)
        for future in draining:
            future.result()


def _size_of(plan: Plan) -> int:
    with contextlib.suppress(OSError):
        return plan.path.stat().st_size
    return 0
