"""The models of a server: found in a repository, loaded, swapped, unloaded and brought back, with no request lost.

Everything that takes long runs in threads of its own; the lock is held for moments. A front end holds a `LiveModel`
while it answers a request, and what is taken out of service lives on until nobody holds it (`served`).
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self, TypeAlias

from accelrt.errors import (
    AccelrtError,
    ModelNotFound,
    ModelUnavailable,
    NotAllowed,
    Overloaded,
    RequestError,
)
from accelrt.serve.interface import IndexEntry, ModelSnapshot, ModelState, ModelStatistics, ServedModel
from accelrt.serve.models import config as configs
from accelrt.serve.models.background import in_thread, spawn
from accelrt.serve.models.describing import snapshot_of
from accelrt.serve.models.lifecycle import NOT_RESIDENT, Lifecycle
from accelrt.serve.models.loading import defaults_for
from accelrt.serve.models.records import Entry, Plan, Slot
from accelrt.serve.models.repository import Repository, RepositoryModel, check_name, choose_versions, model_file
from accelrt.serve.models.settings import DEFAULT_MAX_QUEUE, ServiceSettings, merged
from accelrt.serve.models.uploads import DISK_FULL, DISK_IS_FULL, UploadedFiles, Uploads
from accelrt.serve.models.wishes import with_wishes

logger = logging.getLogger("accelrt")

_Before: TypeAlias = tuple[bool, bool, RepositoryModel | None, str, frozenset[str]]
"""Of an `Entry`: wanted, uploaded, found, problem, and which versions there were."""

CLOSING_DRAIN_S = 0.2
"""How long a model is kept for those who hold it when the server closes. The front ends were closed before, and what
they queued is answered."""
_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0
_RESCAN_S = 1.0


class ModelService:
    """The models of a server; implements `accelrt.serve.interface.Service`.

    Its methods may be called from several event loops. Start it before use, and close it; ``async with`` does both.

    Args:
        settings: How it works.
    """

    def __init__(self, settings: ServiceSettings) -> None:
        self.settings = settings
        self._repository = Repository(settings.repository)
        self._uploads = Uploads(settings.max_upload_bytes)
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._lifecycle = Lifecycle(settings, self._entries, self._lock, self.model)
        self.residency = self._lifecycle.residency
        self._pool = ThreadPoolExecutor(settings.load_threads, "accelrt-load")
        self._started = self._closed = False
        self._stop = threading.Event()
        self._poller: threading.Thread | None = None
        self._scanned_at = 0.0

    # Life

    async def start(self) -> None:
        """Look at the repository and load what the control mode says, while there is room. Failures show in the index.

        Raises:
            ModelNotFound: There is no such repository, or a model to load at the start is not in it.
        """
        await in_thread(self._start)

    async def drain(self, timeout_s: float) -> None:
        """Close, but wait ``timeout_s`` seconds at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.close(), timeout_s)

    async def close(self) -> None:
        """Take no more requests, answer those that were taken, and unload everything. Closing twice is no error."""
        await in_thread(self._close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _start(self) -> None:
        found = self._scan()
        names = list(found)
        if self.settings.control == "explicit":
            wanted = self.settings.load_models
            names = names if "*" in wanted else list(dict.fromkeys(wanted))
            for name in names:
                if name not in found:
                    raise self._not_found(name)
        with self._lock:
            entries = [self._entries[name] for name in names]
            for entry in entries:
                entry.wanted = True
        # Those that stay come first; the others take what room is left.
        entries.sort(key=lambda entry: not (entry.found is not None and entry.found.settings.pinned))
        for future in [self._pool.submit(self._first_load, entry) for entry in entries]:
            future.result()
        self._started = True
        if self.settings.control == "poll":
            self._poller = threading.Thread(target=self._poll, name="accelrt-poll", daemon=True)
            self._poller.start()

    def _first_load(self, entry: Entry) -> None:
        with entry.serial:
            if entry.found is None or self._closed:
                return
            # Without a limit all are loaded; with one, none is unloaded again for another at the start.
            pinned = merged(entry.found.settings, self.settings.defaults).pinned
            self._apply(entry, entry.found, evict=pinned, wait_s=self.settings.load_wait_s if pinned else 0.0)

    def _close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = self._lifecycle.closed = True
            entries = list(self._entries.values())
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        if self._poller is not None:
            self._poller.join()
        for entry in entries:
            with entry.serial, self._lock:
                for slot in entry.slots.values():
                    self._lifecycle.retire(slot, min(CLOSING_DRAIN_S, self.settings.drain_s))
                    if slot.loading is not None:
                        _finish(slot.loading)
        self._lifecycle.wait()
        self._uploads.close()

    # What front ends ask

    def live(self) -> bool:
        """Tell whether the server answers at all."""
        return not self._closed

    def ready(self) -> bool:
        """Tell whether every model that should be loaded is, or is out of memory only until the next request."""
        if not self._started or self._closed:
            return False
        with self._lock:
            return all(
                entry.slots and not entry.problem and all(_is_well(slot) for slot in entry.slots.values())
                for entry in self._entries.values()
                if entry.wanted
            )

    def find(self, name: str, version: str = "") -> ServedModel | None:
        """Return a version of a model that is ready, None where `model` would have to wait or to refuse."""
        return self._lifecycle.find(name, version)

    async def model(self, name: str, version: str = "") -> ServedModel:
        """Return a version of a model, by default the highest that is ready; load it if it made room for others.

        Raises:
            ModelNotFound: There is no such model or version.
            ModelUnavailable: It is not loaded, failed to load, or was not loaded in time.
            Overloaded: Too many requests wait for it to be loaded.
        """
        deadline = time.monotonic() + self.settings.load_wait_s
        while True:
            if (live := self.find(name, version)) is not None:
                return live
            with self._lock:
                if (live := self.find(name, version)) is not None:  # it became ready just now
                    return live
                slot, loading = self._awaited(name, version)
                slot.waiters += 1
            try:
                await asyncio.wait_for(
                    asyncio.shield(asyncio.wrap_future(loading)), max(deadline - time.monotonic(), 0.001)
                )
            except (TimeoutError, asyncio.TimeoutError):  # noqa: UP041 - two classes before Python 3.11
                raise _later(f"Model {name!r} is still being loaded.", 1.0) from None
            finally:
                with self._lock:
                    slot.waiters -= 1

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        """Return every version known, or those that are ready.

        One that made room for others is ready: a request is answered, after it was loaded again; its reason says so.
        """
        if self.settings.control == "explicit" and time.monotonic() - self._scanned_at > _RESCAN_S:
            with contextlib.suppress(AccelrtError, OSError):
                self._scan()
        rows: list[IndexEntry] = []
        with self._lock:
            for name in sorted(self._entries):
                entry = self._entries[name]
                known = sorted(entry.slots.values(), key=lambda slot: int(slot.version))
                rows.extend(IndexEntry(name, slot.version, _shown(slot), slot.reason) for slot in known)
                if not known:
                    rows.append(IndexEntry(name, "", "UNAVAILABLE", entry.problem))
        return [row for row in rows if row.state == "READY"] if ready else rows

    async def load(self, name: str, parameters: Mapping[str, str | bytes | int | bool]) -> None:
        """Load a model, or load it again, from the repository or from what the parameters bring.

        Raises:
            NotAllowed: The control mode is not ``explicit``.
            ModelNotFound: It is not in the repository.
            RequestError: It cannot be loaded as asked for; the old one, if there is one, goes on answering.
        """
        self._explicit("load")
        check_name(name)
        override, files = _parameters(parameters)
        if override is not None or files:
            await in_thread(partial(self._load, name, override, files))
            return
        with self._lock:
            entry = self._entries.setdefault(name, Entry(name))
            joint = entry.joint
            if joint is None:
                joint = entry.joint = Future()
                spawn(partial(self._load_jointly, entry, joint))
        await asyncio.shield(asyncio.wrap_future(joint))

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Unload all versions of a model, when the requests that it holds are answered. No model here has dependents.

        Raises:
            NotAllowed: The control mode is not ``explicit``.
            ModelNotFound: It is not known.
        """
        self._explicit("unload")
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise self._not_found(name)
        await in_thread(partial(self._unload, entry))

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Return the statistics of one version, of all versions of a model, or of everything that was ever loaded.

        Raises:
            ModelNotFound: There is no such model or version.
        """
        with self._lock:
            slots = [
                slot
                for entry in self._entries.values()
                for slot in entry.slots.values()
                if name in ("", slot.name) and version in ("", slot.version) and (slot.ever_loaded or name)
            ]
            pending = [slot.live.queue.busy if slot.live is not None else 0 for slot in slots]
            if name and not slots and (name not in self._entries or version):
                raise self._not_found(name, version)
        return [
            slot.statistics.read(slot.name, slot.version, count) for slot, count in zip(slots, pending, strict=True)
        ]

    def snapshot(self) -> Sequence[ModelSnapshot]:
        """Return the state of every version, for status pages and metrics."""
        with self._lock:
            slots = [(slot, slot.live) for entry in self._entries.values() for slot in entry.slots.values()]
        return [snapshot_of(slot, live) for slot, live in slots]

    # Requests that wait for a load

    def _awaited(self, name: str, version: str) -> tuple[Slot, Future[None]]:
        """Return what a request has to wait for, beginning a load if need be. Under the lock.

        Raises:
            ModelNotFound, ModelUnavailable, Overloaded: It would wait in vain.
        """
        if self._closed:
            raise ModelUnavailable("The server is shutting down.")
        entry = self._entries.get(name)
        if entry is None:
            if not self._started:  # the front ends listen already, and a client should not be told that it is not there
                raise _later(f"The server is starting and does not know of model {name[:80]!r} yet.", 1.0)
            raise self._not_found(name)
        if version:
            slots = [entry.slots[version]] if version in entry.slots else []
            if entry.slots and not slots:
                raise self._not_found(name, version)
        else:
            slots = sorted(entry.slots.values(), key=lambda slot: -int(slot.version))
        if not slots:
            why = entry.problem or "it was not loaded"
            raise ModelUnavailable(f"Model {name!r} cannot answer: {why}.", hint="Load it.")
        for slot in slots:
            if slot.loading is None and slot.on_demand and slot.live is None and time.monotonic() >= slot.retry_at:
                future: Future[None] = Future()
                slot.loading = future
                slot.state, slot.reason = "LOADING", ""
                self._pool.submit(self._load_on_demand, entry, slot, future)
            if slot.loading is not None and slot.live is None:
                most = slot.plan.settings.max_queue or DEFAULT_MAX_QUEUE
                if slot.waiters >= most:
                    raise _overloaded(f"{slot.waiters} requests wait for model {name!r} to be loaded.")
                return slot, slot.loading
        slot = slots[0]
        error = ModelUnavailable(f"Model {name!r} version {slot.version} cannot answer: {slot.reason or slot.state}.")
        if slot.on_demand:
            error.retry_after_s = max(slot.retry_at - time.monotonic(), 0.1)
        elif slot.live is not None:  # its worker is being started again
            error.retry_after_s = 1.0
        raise error

    def _load_on_demand(self, entry: Entry, slot: Slot, future: Future[None]) -> None:
        try:
            with entry.serial:
                if entry.slots.get(slot.version) is slot and slot.on_demand and slot.live is None and not self._closed:
                    self._lifecycle.bring_up(slot, slot.plan, evict=True, wait_s=self.settings.load_wait_s)
        except AccelrtError as error:
            with self._lock:
                pause = min(_FIRST_RETRY_S * 2**slot.failures, _LONGEST_RETRY_S)
                full = isinstance(error, ModelUnavailable)  # no room is no fault of the model
                slot.failures += not full
                slot.retry_at = time.monotonic() + (0.0 if full else pause)
                slot.state, slot.reason = "UNAVAILABLE", self._without_paths(str(error))
        finally:
            with self._lock:
                if slot.loading is future:
                    slot.loading = None
            _finish(future)

    # Loading and unloading; `entry.serial` is held

    def _load_jointly(self, entry: Entry, joint: Future[None]) -> None:
        """Load a model for all who asked meanwhile; those who ask later have it loaded again."""
        try:
            with entry.serial:
                with self._lock:
                    entry.joint = None
                found = self._repository.look(entry.name)
                self._load_as(entry, found, None)
        except BaseException as error:  # noqa: BLE001 - told to those who asked
            with self._lock:
                if entry.joint is joint:
                    entry.joint = None
                if entry.found is None and not entry.slots and isinstance(error, ModelNotFound):
                    self._entries.pop(entry.name, None)
            joint.set_exception(self._asked_in_vain(entry.name, error))
        else:
            joint.set_result(None)

    def _load(self, name: str, override: configs.ModelConfig | None, files: Mapping[str, bytes]) -> None:
        uploads = self._uploads.keep(files) if files else None
        try:
            found = self._repository.look(name)
        except ModelNotFound:
            if uploads is None:
                raise
            found = RepositoryModel(name)
        if uploads is not None:
            config = override or found.config
            preferred = config.default_model_filename if config is not None else ""
            present = uploads.versions
            chosen = choose_versions(config, present)
            paths = {version: model_file(uploads.folder / version, preferred) for version in chosen}
            found = replace(found, versions=paths, present=present, stamp=(), problem=None)
        if override is not None:
            if override.name not in ("", name):
                raise RequestError(f"The configuration is for {override.name[:80]!r}, and {name!r} is to be loaded.")
            found = replace(found, config=override, problem=None)
            if uploads is None:
                found = self._with_versions(found, override)
        with self._lock:
            entry = self._entries.setdefault(name, Entry(name))
            entry.pending += 1
        try:
            with entry.serial:
                self._load_as(entry, found, uploads)
        except AccelrtError as error:
            raise self._asked_in_vain(name, error) from error
        finally:
            with self._lock:
                entry.pending -= 1
                self._drop_if_empty(entry)

    def _with_versions(self, found: RepositoryModel, override: configs.ModelConfig) -> RepositoryModel:
        """Choose versions anew, since the configuration that came with the request may serve others."""
        paths = self._repository.versions(found, override)
        return replace(found, versions=paths)

    def _load_as(self, entry: Entry, found: RepositoryModel, uploads: UploadedFiles | None) -> None:
        """Load what a client asked for. What cannot be loaded changes nothing but the reason that the index gives.

        Raises:
            AccelrtError: A version could not be loaded.
        """
        with self._lock:
            before = (entry.wanted, entry.uploaded, entry.found, entry.problem, frozenset(entry.slots))
            entry.wanted, entry.uploaded = True, uploads is not None
        failures = self._apply(entry, found, uploads=uploads, again=True, evict=True, wait_s=self.settings.load_wait_s)
        if failures:
            with self._lock:
                self._take_back(entry, before, brought=uploads is not None)
            raise failures[0]

    def _take_back(self, entry: Entry, before: _Before, *, brought: bool) -> None:
        """Leave a model as it was before a load that failed. Under the lock.

        Otherwise one client's mistake would make the server say that it is not ready, for good.

        Args:
            brought: The files came with the request; then the index does not tell of what they failed to be.
        """
        wanted, uploaded, found, problem, versions = before
        live = [slot for slot in entry.slots.values() if slot.live is not None]
        entry.wanted = wanted or bool(live)
        entry.uploaded = any(slot.plan.uploads is not None for slot in live) if live else uploaded
        entry.found = found
        # A model that answers has no problem; that of one which does not is shown until it is loaded.
        entry.problem = problem if live or brought else entry.problem or problem
        if brought or live:
            for version in [each for each, slot in entry.slots.items() if each not in versions and slot.live is None]:
                del entry.slots[version]

    def _drop_if_empty(self, entry: Entry) -> None:
        """Forget a model of which nothing is left and which no repository holds. Under the lock."""
        idle = not entry.slots and not entry.pending and entry.joint is None and not entry.wanted
        if idle and entry.found is None and self._entries.get(entry.name) is entry:
            del self._entries[entry.name]

    def _apply(
        self,
        entry: Entry,
        found: RepositoryModel,
        *,
        uploads: UploadedFiles | None = None,
        again: bool = False,
        evict: bool,
        wait_s: float,
    ) -> list[AccelrtError]:
        """Load the versions that the repository's model says and unload the others; return what failed.

        Args:
            again: Also those that are loaded and did not change.
            evict: Unload other models where there is no room; otherwise leave the rest for requests to load.
            wait_s: How long to wait for room.
        """
        with self._lock:
            entry.found, entry.problem = found, found.problem or ""
        if found.problem is not None:
            return [RequestError(f"{found.problem}.")]
        failures: list[AccelrtError] = []
        for version in sorted(found.versions, key=int):
            path = found.versions[version]
            own = path.parent if path.parent.name == version else path
            stamp = tuple(row for row in found.stamp if row[0] == str(own) or row[0].startswith(f"{own}/"))
            settings = merged(found.settings, defaults_for(path, self.settings.defaults))
            settings = with_wishes(settings, found.config)
            plan = Plan(path, stamp, found.config, settings, uploads)
            with self._lock:
                slot = entry.slots.get(version)
                if slot is None:
                    slot = entry.slots[version] = Slot(entry.name, version, plan)
                elif slot.plan == plan and not again and (slot.live is not None or slot.on_demand):
                    continue
                future: Future[None] = Future()
                slot.loading = future
                if slot.live is None:
                    slot.state, slot.reason = "LOADING", ""
            try:
                self._lifecycle.bring_up(slot, plan, evict=evict, wait_s=wait_s, fresh=True)
            except ModelUnavailable as error:
                self._not_now(slot, plan, error, evict, failures)
            except AccelrtError as error:
                failures.append(error)
                self._failed(slot, error)
            finally:
                with self._lock:
                    slot.loading = None
                _finish(future)
        with self._lock:
            for version in [each for each in entry.slots if each not in found.versions]:
                # While a new version cannot be loaded, the one that it was to replace goes on answering.
                slot = entry.slots[version]
                if not failures or (slot.live is None and not slot.on_demand):
                    self._lifecycle.retire(entry.slots.pop(version), self.settings.drain_s)
        return failures

    def _not_now(
        self, slot: Slot, plan: Plan, error: ModelUnavailable, evict: bool, failures: list[AccelrtError]
    ) -> None:
        """There was no room: at the start that is no failure, and a request will load it."""
        if evict or error.retry_after_s is None:  # the latter: there never will be
            failures.append(error)
            self._failed(slot, error)
            return
        with self._lock:
            if slot.live is None:
                slot.plan, slot.on_demand = plan, True
                slot.state, slot.reason = "UNAVAILABLE", NOT_RESIDENT

    def _failed(self, slot: Slot, error: AccelrtError) -> None:
        logger.warning("Model %s version %s was not loaded: %s", slot.name, slot.version, error)
        reason = self._without_paths(str(error))
        with self._lock:
            if slot.live is not None:
                slot.reason = f"the last load failed, and the version before it answers: {reason}"
            else:
                slot.state, slot.reason = "UNAVAILABLE", reason

    def _unload(self, entry: Entry) -> None:
        with entry.serial:
            with self._lock:
                entry.wanted = False
                futures = [self._lifecycle.retire(slot, self.settings.drain_s) for slot in entry.slots.values()]
                for slot in entry.slots.values():
                    slot.on_demand = False
                    if slot.state != "UNLOADING":
                        slot.state, slot.reason = "UNAVAILABLE", slot.reason or "unloaded"
            for future in futures:
                if future is not None:
                    future.result()
            with self._lock:
                for slot in entry.slots.values():
                    if slot.live is None:
                        slot.state, slot.reason = "UNAVAILABLE", "unloaded"
                if entry.uploaded:  # their files go with it; what lies in the repository is seen at the next look
                    entry.slots.clear()
                    entry.uploaded, entry.found, self._scanned_at = False, None, 0.0

    # The repository

    def _scan(self) -> dict[str, RepositoryModel]:
        """Look at the repository, and let the index know of what is in it."""
        found = self._repository.scan()
        self._scanned_at = time.monotonic()
        with self._lock:
            for name, model in found.items():
                entry = self._entries.setdefault(name, Entry(name))
                if not entry.slots:
                    entry.found, entry.problem = model, model.problem or ""
            for name in [name for name, entry in self._entries.items() if name not in found]:
                entry = self._entries[name]
                if not any(slot.live or slot.loading or slot.on_demand for slot in entry.slots.values()) and not (
                    entry.joint or entry.pending
                ):
                    del self._entries[name]
        return found

    def _poll(self) -> None:
        """Follow the repository. What changed is loaded when it looks the same twice: then nobody is writing it."""
        before: dict[str, RepositoryModel] = {}
        tried: dict[str, RepositoryModel] = {}
        while not self._stop.wait(self.settings.poll_s):
            try:
                found = self._repository.scan()
            except (AccelrtError, OSError) as error:
                logger.warning("The repository could not be read: %s", error)
                continue
            for name, model in found.items():
                with self._lock:
                    entry = self._entries.setdefault(name, Entry(name))
                    changed = entry.found is None or entry.found != model or not entry.wanted
                if changed and before.get(name) == model and tried.get(name) != model:
                    tried[name] = model
                    with contextlib.suppress(RuntimeError):  # the pool was shut down
                        self._pool.submit(self._follow, entry, model)
            for name in [name for name in self._entries if name not in found]:
                if name not in before:  # gone at two looks
                    tried.pop(name, None)
                    self._forget(name)
            before = found

    def _follow(self, entry: Entry, model: RepositoryModel) -> None:
        with entry.serial:
            if self._entries.get(entry.name) is not entry:  # it was taken away again
                return
            entry.wanted = True
            for error in self._apply(entry, model, evict=not self.residency.limited, wait_s=0.0):
                logger.warning("Model %s: %s", entry.name, error)

    def _forget(self, name: str) -> None:
        with self._lock:
            entry = self._entries[name]
        self._unload(entry)
        with self._lock:
            self._entries.pop(name, None)

    # Errors

    def _asked_in_vain(self, name: str, error: BaseException) -> BaseException:
        """Return what a client is told whose load failed."""
        if not isinstance(error, AccelrtError) or isinstance(error, ModelNotFound | RequestError | ModelUnavailable):
            return error
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_FULL:
            told_later = _later(f"Model {name!r} cannot be loaded now: {DISK_IS_FULL}", 10.0)
            told_later.__cause__ = error
            return told_later
        told = RequestError(f"Model {name!r} cannot be loaded: {self._without_paths(error.message)}", hint=error.hint)
        told.__cause__ = error
        return told

    def _without_paths(self, text: str) -> str:
        """Return a reason as clients may read it: where on this machine the models lie is left out."""
        for folder in (*self._uploads.folders(), *self.settings.repository):
            text = text.replace(f"{folder}/", "")
        return text

    def _explicit(self, verb: str) -> None:
        if self.settings.control != "explicit":
            raise NotAllowed(
                f"A client asked to {verb} a model, and the control mode is {self.settings.control!r}.",
                hint="Start the server with the control mode explicit.",
            )

    def _not_found(self, name: str, version: str = "") -> ModelNotFound:
        with self._lock:
            entry = self._entries.get(name)
            if version and entry is not None:
                known = ", ".join(sorted(entry.slots, key=int))
                return ModelNotFound(
                    f"Model {name!r} has no version {version[:40]!r} here.", hint=f"Versions: {known}."
                )
            close = difflib.get_close_matches(name[:80], self._entries, 1)
        return ModelNotFound(
            f"There is no model {name[:80]!r}.",
            hint=f"Did you mean {close[0]!r}?" if close else "The index lists them.",
        )


def _shown(slot: Slot) -> ModelState:
    resting = slot.on_demand and slot.live is None and slot.reason == NOT_RESIDENT
    return "READY" if resting else slot.state


def _is_well(slot: Slot) -> bool:
    if slot.live is not None:
        return slot.state == "READY"
    return slot.on_demand and not slot.failures


def _parameters(
    parameters: Mapping[str, str | bytes | int | bool],
) -> tuple[configs.ModelConfig | None, dict[str, bytes]]:
    """Take the parameters of a load request apart."""
    override: configs.ModelConfig | None = None
    files: dict[str, bytes] = {}
    for key, value in parameters.items():
        if key == "config" and isinstance(value, str | bytes):
            override = configs.from_json(value)
        elif key.startswith("file:") and isinstance(value, bytes):
            files[key] = value
        else:
            raise RequestError(
                f"A load request has the parameter {key[:80]!r} ({type(value).__name__}).",
                hint="It takes config, as text, and file:<version>/<name>, as bytes.",
            )
    return override, files


def _later(message: str, seconds: float) -> ModelUnavailable:
    error = ModelUnavailable(message, hint="Ask again.")
    error.retry_after_s = seconds
    return error


def _overloaded(message: str) -> Overloaded:
    error = Overloaded(message, hint="Ask again later.")
    error.retry_after_s = 1.0
    return error


def _finish(future: Future[None]) -> None:
    with contextlib.suppress(InvalidStateError):  # closing was faster
        future.set_result(None)
