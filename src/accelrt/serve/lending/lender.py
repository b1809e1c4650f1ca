"""An accelerator lent to several clients: who has a lease, what each holds, and that nobody gets more than its share.

Runs in one event loop, that of the gRPC front end; only `ModelService` beneath has threads. So nothing here is locked,
and what must not be torn apart by an ``await`` is written without one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

from accelrt.errors import (
    AccelrtError,
    ModelNotFound,
    ModelUnavailable,
    OutOfDeviceMemory,
    Overloaded,
    RequestError,
)
from accelrt.protocol.leases import EXTENSION, PRECISION, Holder, SliceState, content_name
from accelrt.serve.interface import IndexEntry, ModelSnapshot, ModelStatistics, ServedModel
from accelrt.serve.lending.leases import Holding, Lease, Program
from accelrt.serve.lending.sizes import LEAST_PROGRAM_BYTES, LendingSettings, slices_of
from accelrt.serve.lending.slice import FILE, Slice, unknown_client
from accelrt.serve.lending.turns import Party, Turns
from accelrt.serve.models.service import ModelService
from accelrt.serve.models.settings import ModelSettings, ServiceSettings

logger = logging.getLogger("accelrt.serve")

UNUSED_S = 10.0
"""How long a lease lasts at most under which nothing is loaded."""

MOST_MEMBERS = 64
"""Processes that may share the lease of one API key."""

MOST_LOADS = 16
"""Programs of one client that may wait to be loaded; they are loaded one after another."""


class Lender:
    """Lends an accelerator; a `accelrt.serve.run.RunningService`. What a client may ask is its `Slice`, see `of`.

    As a service of its own it answers for the whole: health, and figures for metrics. It has no models to call.

    Args:
        settings: What is lent, and how.
        trust: As for `ServiceSettings`.
        drain_s: As for `ServiceSettings`.
    """

    def __init__(self, settings: LendingSettings, *, trust: bool = False, drain_s: float = 30.0) -> None:
        self.settings = settings
        self.leases: dict[str, Lease] = {}
        self.turns = Turns(settings.calls_at_a_time)
        self._programs: dict[str, Program] = {}
        self._at_work: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._ending: set[Lease] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._secret = secrets.token_bytes(16)
        self._reaper: asyncio.Task[None] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="accelrt-lender-")
        self.slices = settings.slices or slices_of(settings)
        self.service = ModelService(
            ServiceSettings(
                (Path(self._folder.name),),
                control="explicit",
                trust=trust,
                # Clients may not look at each other's timing by sharing runs; replicas would multiply what is held.
                defaults=ModelSettings(
                    backend=settings.accelerator,
                    replicas=1,
                    max_batch_size=1,
                    isolation="process" if settings.isolate else None,
                ),
                drain_s=drain_s,
            )
        )

    # Life

    async def start(self) -> None:
        """Begin to take clients."""
        await self.service.start()
        self._reaper = asyncio.create_task(self._reap())

    async def drain(self, timeout_s: float) -> None:
        """Close, but wait for what is under way for ``timeout_s`` seconds at most."""
        await self.service.drain(timeout_s)
        await self.close()

    async def close(self) -> None:
        """Take no more requests, answer those that were taken, and unload everything."""
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.service.close()
        self._folder.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # For front ends

    extensions: Sequence[str] = (EXTENSION,)
    """What it offers beyond what every server does."""

    def of(self, key: str | None, token: str | None) -> Slice:
        """Return what a client sees.

        Args:
            key: Names the API key that the client showed; None if the server has none.
            token: What the client says to be its token, None if nothing.
        """
        member = "" if token is None else hashlib.sha256(token.encode()).hexdigest()
        return Slice(self, key if key is not None else member or None, member)

    def live(self) -> bool:
        """Tell whether the server answers at all."""
        return self.service.live()

    def ready(self) -> bool:
        """Tell whether clients are taken."""
        # Not the service's own word: a program that is being loaded is a client's affair.
        return self._reaper is not None and self.service.live()

    def find(self, name: str, version: str = "") -> ServedModel | None:
        """Return None: models belong to clients."""
        return None

    async def model(self, name: str, version: str = "") -> ServedModel:
        """Refuse: models belong to clients."""
        raise unknown_client()

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        """Return the programs of all clients."""
        return self.service.index(ready=ready)

    async def load(self, name: str, parameters: Mapping[str, str | bytes | int | bool]) -> None:
        """Refuse: models belong to clients."""
        raise unknown_client()

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Refuse: models belong to clients."""
        raise unknown_client()

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Return the statistics of all programs, or of one."""
        return self.service.statistics(name, version)

    def snapshot(self) -> Sequence[ModelSnapshot]:
        """Return the state of all programs."""
        return self.service.snapshot()

    # Leases

    def lease(self, key: str, member: str) -> Lease:
        """Return a client's lease, beginning one if it has none.

        Raises:
            Overloaded: All slices are lent.
        """
        lease = self.leases.get(key)
        if lease is None:
            # One that ends still has programs in memory.
            if len(self.leases) + len(self._ending) >= self.slices:
                raise self._all_lent()
            shown = hmac.new(self._secret, key.encode(), hashlib.sha256).hexdigest()[:12]
            lease = Lease(key, shown, Party(self.settings.size.concurrency, self.settings.max_queue))
            self.leases[key] = lease
            logger.info("a slice is lent", extra={"lease": lease.id, "lent": len(self.leases), "slices": self.slices})
        if member not in lease.members and len(lease.members) >= MOST_MEMBERS:
            raise Overloaded(f"{MOST_MEMBERS} processes share this API key's slice, as many as may.")
        lease.members.add(member)
        lease.used = time.monotonic()
        return lease

    def state(self, lease: Lease | None) -> SliceState:
        """Return what a client is told of its slice, and of who holds the others."""
        settings = self.settings
        holders = tuple(Holder(one.id, len(one.held), one.held_bytes) for one in self.leases.values())
        return SliceState(
            settings.size.name,
            settings.accelerator,
            settings.size.memory_bytes,
            0 if lease is None else lease.held_bytes,
            settings.size.concurrency,
            settings.lease_s,
            lease is not None,
            self.slices,
            holders,
        )

    async def end(self, lease: Lease, why: str) -> None:
        """End a lease: whoever comes with its key begins anew, and what it alone held is unloaded."""
        if self.leases.get(lease.key) is not lease:
            return
        del self.leases[lease.key]
        self._ending.add(lease)
        logger.info("a lease ended", extra={"lease": lease.id, "reason": why, "programs": len(lease.held)})
        try:
            for name in list(lease.held):
                await self.drop(lease, name)
        finally:
            self._ending.discard(lease)

    async def give_back(self, lease: Lease, member: str) -> None:
        """Let a member go, with what it alone wanted; the lease ends with its last."""
        lease.members.discard(member)
        if not lease.members or not member:
            await self.end(lease, "given back")
            return
        for name in [name for name, one in lease.held.items() if one.by <= {member}]:
            await self.drop(lease, name)
        for one in lease.held.values():
            one.by.discard(member)

    # Programs

    async def load_for(self, lease: Lease, member: str, name: str, model: bytes | None, precision: str | None) -> None:
        """Load a program under a lease, whatever becomes of the call that asked for it.

        Raises:
            OutOfDeviceMemory: It does not fit the slice.
            ModelNotFound: It is not under the lease, and its content did not come.
            RequestError: The name is not that of the content, or it cannot be compiled.
            Overloaded: This client has many that wait to be loaded.
        """
        if (held := lease.held.get(name)) is not None:
            held.by.add(member)
            return
        if model is None:
            raise ModelNotFound(f"You hold no program {name[:60]!r}.", hint="Send its content, too.")
        if lease.loads >= MOST_LOADS:
            raise Overloaded(f"{lease.loads} programs of this client wait to be loaded, as many as may.")
        need = max(len(model), LEAST_PROGRAM_BYTES)
        self._must_fit(lease, name, need)
        lease.reserved += need
        lease.loads += 1
        # A client that hangs up has its program loaded all the same: so what it takes is on its account.
        task = asyncio.create_task(self._load(lease, member, name, model, precision, need))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            raise ModelUnavailable("The server is shutting down.") from None

    async def _load(
        self, lease: Lease, member: str, name: str, model: bytes, precision: str | None, reserved: int
    ) -> None:
        try:
            async with lease.one_by_one, self._lock_of(name):
                if (held := lease.held.get(name)) is not None:
                    held.by.add(member)
                    return
                # Whoever holds a program shows its content: a name alone opens nothing that somebody else sent.
                if (right := await asyncio.to_thread(content_name, model, precision)) != name:
                    raise RequestError(
                        f"Programs are named by their content; this one is {right!r}, not {name[:60]!r}."
                    )
                program = self._programs.get(name)
                if program is None:
                    program = await self._compiled(name, model, precision)
                lease.reserved -= reserved
                reserved = 0
                try:
                    self._must_fit(lease, name, program.held_bytes)
                    if self.leases.get(lease.key) is not lease:
                        raise ModelNotFound("The lease ended while the program was loaded.", hint="Load it again.")
                except AccelrtError:
                    await self._unload_if_unheld(name, program)
                    raise
                program.leases.add(lease)
                lease.held[name] = Holding(program.held_bytes, {member})
        finally:
            lease.reserved -= reserved
            lease.loads -= 1
            lease.used = time.monotonic()

    async def _compiled(self, name: str, model: bytes, precision: str | None) -> Program:
        parameters = {} if precision is None else {PRECISION: {"string_value": precision}}
        config = {"name": name, "backend": "onnxruntime", "max_batch_size": 0, "parameters": parameters}
        try:
            await self.service.load(name, {"config": json.dumps(config), FILE: model})
            size = sum(one.program_bytes for one in self.service.snapshot() if one.name == name)
        except BaseException:
            with contextlib.suppress(ModelNotFound):  # nothing of it stays: neither files nor a line in the index
                await self.service.unload(name)
            raise
        program = self._programs[name] = Program(max(size, len(model), LEAST_PROGRAM_BYTES))
        return program

    def _must_fit(self, lease: Lease, name: str, need: int) -> None:
        quota, held = self.settings.size.memory_bytes, lease.held_bytes
        if need > quota - held:
            raise OutOfDeviceMemory(
                f"Program {name!r} needs {need} bytes; of this slice's quota of {quota} bytes {held} are held.",
                hint="Unload programs, or borrow a larger slice.",
            )

    async def drop(self, lease: Lease, name: str) -> None:
        """Take a program from a lease, and out of memory if nobody else holds it."""
        async with self._lock_of(name):
            if lease.held.pop(name, None) is None:
                return
            program = self._programs[name]
            program.leases.discard(lease)
            await self._unload_if_unheld(name, program)

    async def _unload_if_unheld(self, name: str, program: Program) -> None:
        if program.leases:
            return
        self._programs.pop(name, None)
        with contextlib.suppress(ModelNotFound):
            await self.service.unload(name)

    def _lock_of(self, name: str) -> asyncio.Lock:
        return self._at_work.setdefault(name, asyncio.Lock())

    # Time

    async def _reap(self) -> None:
        """End leases that nobody has used for their time."""
        while True:
            await asyncio.sleep(min(1.0, self.settings.lease_s / 4))
            await self.expire(time.monotonic())

    async def expire(self, now: float) -> None:
        """End the leases whose time is over at ``now``, of `time.monotonic`."""
        for lease in list(self.leases.values()):
            if not lease.busy and not lease.loads and now - lease.used > self._lasts(lease):
                try:
                    await self.end(lease, "not used")
                except AccelrtError as error:
                    logger.error("a lease could not be ended in order", extra={"reason": str(error)})

    def _lasts(self, lease: Lease) -> float:
        return self.settings.lease_s if lease.held else min(UNUSED_S, self.settings.lease_s)

    def _all_lent(self) -> Overloaded:
        now = time.monotonic()
        left = [max(0.0, one.used + self._lasts(one) - now) for one in self.leases.values()]
        error = Overloaded(
            f"All {self.slices} slices of {self.settings.accelerator} are lent.",
            hint=f"The next is free in {min(left, default=1.0):.0f} s if it is not used till then.",
        )
        error.retry_after_s = max(0.1, min(left, default=1.0))
        return error
