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
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

from accelrt.errors import (
    AccelrtError,
    CoresUnavailable,
    ModelNotFound,
    ModelUnavailable,
    NotAllowed,
    OptionError,
    OutOfDeviceMemory,
    Overloaded,
    RequestError,
)
from accelrt.protocol.leases import EXTENSION, PRECISION, SLICE, Holder, SliceState, content_name, is_content_name
from accelrt.registry import REGISTRY, devices_of, find_engine
from accelrt.serve.interface import IndexEntry, ModelSnapshot, ModelStatistics, ServedModel
from accelrt.serve.lending.metered import Metered, SliceModel
from accelrt.serve.lending.sizes import LEAST_PROGRAM_BYTES, LendingSettings
from accelrt.serve.lending.turns import Party, Turns
from accelrt.serve.models import config as configs
from accelrt.serve.models.service import ModelService
from accelrt.serve.models.settings import ModelSettings, ServiceSettings
from accelrt.target import parse

logger = logging.getLogger("accelrt.serve")

FILE = "file:1/model.onnx"
"""The one file that a program consists of."""

UNUSED_S = 10.0
"""How long a lease lasts at most under which nothing is loaded."""

MOST_MEMBERS = 64
"""Processes that may share the lease of one API key."""

MOST_LOADS = 16
"""Programs of one client that may wait to be loaded; they are loaded one after another."""


@dataclass(slots=True)
class Holding:
    """A program under a lease: what it counts for, and which members want it kept."""

    held_bytes: int
    by: set[str]


@dataclass(eq=False, slots=True)
class Lease:
    """What one client has.

    Attributes:
        key: Names the client: the digest of its API key, or of its token.
        id: A name for it that opens nothing, for reports.
        party: Its place in the queue.
        members: Digests of the tokens of its processes.
        held: By program name.
        reserved: Bytes of programs that are being loaded.
        loads: Programs that are being loaded, or wait for it.
        busy: Calls under way.
        used: When it was last used, of `time.monotonic`.
        one_by_one: Its programs are loaded one after another.
    """

    key: str
    id: str
    party: Party
    members: set[str] = field(default_factory=set)
    held: dict[str, Holding] = field(default_factory=dict)
    reserved: int = 0
    loads: int = 0
    busy: int = 0
    used: float = field(default_factory=time.monotonic)
    one_by_one: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def held_bytes(self) -> int:
        """What counts against the quota."""
        return self.reserved + sum(one.held_bytes for one in self.held.values())


@dataclass(slots=True)
class Program:
    """A program in memory: what it counts for, and under which leases."""

    held_bytes: int
    leases: set[Lease] = field(default_factory=set)


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
        self.slices = settings.slices or _slices(settings)
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
        raise _who()

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        """Return the programs of all clients."""
        return self.service.index(ready=ready)

    async def load(self, name: str, parameters: Mapping[str, str | bytes | int | bool]) -> None:
        """Refuse: models belong to clients."""
        raise _who()

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Refuse: models belong to clients."""
        raise _who()

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
                await self._drop(lease, name)
        finally:
            self._ending.discard(lease)

    async def give_back(self, lease: Lease, member: str) -> None:
        """Let a member go, with what it alone wanted; the lease ends with its last."""
        lease.members.discard(member)
        if not lease.members or not member:
            await self.end(lease, "given back")
            return
        for name in [name for name, one in lease.held.items() if one.by <= {member}]:
            await self._drop(lease, name)
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

    async def _drop(self, lease: Lease, name: str) -> None:
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


class Slice:
    """What one client sees of a server that lends slices: its own programs, and `SLICE`. A `Service`.

    Args:
        lender: Whose.
        key: Names the client; None if it did not say who it is.
        member: Names the process of the client's, empty if it did not.
    """

    __slots__ = ("_key", "_lender", "_member")

    def __init__(self, lender: Lender, key: str | None, member: str) -> None:
        self._lender, self._key, self._member = lender, key, member

    @property
    def _lease(self) -> Lease | None:
        """The client's lease; whoever asks for it uses it."""
        if self._key is None:
            return None
        lease = self._lender.leases.get(self._key)
        if lease is not None:
            lease.used = time.monotonic()
        return lease

    def live(self) -> bool:
        """Tell whether the server answers at all."""
        return self._lender.live()

    def ready(self) -> bool:
        """Tell whether clients are taken."""
        return self._lender.ready()

    def find(self, name: str, version: str = "") -> ServedModel | None:
        """Return a program of the client's that is ready."""
        lease = self._lease
        if lease is None:
            return None
        if name == SLICE:
            return SliceModel(self._lender.state(lease))
        if name not in lease.held:
            return None
        live = self._lender.service.find(name, version)
        return None if live is None else Metered(live, lease, self._lender.turns)

    async def model(self, name: str, version: str = "") -> ServedModel:
        """Return a program of the client's, or what `SLICE` tells.

        Raises:
            ModelNotFound: The client holds no such program.
            ModelUnavailable: It cannot answer now.
        """
        lease = self._lease
        if name == SLICE:
            return SliceModel(self._lender.state(lease))
        if lease is None or name not in lease.held:
            raise ModelNotFound(f"You hold no program {name[:60]!r} here.", hint="Load it; its lease may have ended.")
        return Metered(await self._lender.service.model(name, version), lease, self._lender.turns)

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        """Return the client's programs."""
        lease = self._lease
        held = {} if lease is None else lease.held
        return [row for row in self._lender.service.index(ready=ready) if row.name in held]

    async def load(self, name: str, parameters: Mapping[str, str | bytes | int | bool]) -> None:
        """Load a program, beginning a lease if there is none; loading `SLICE` does only that.

        Raises:
            NotAllowed: The client did not say who it is.
            Overloaded: All slices are lent, or many programs of this client wait to be loaded.
            OutOfDeviceMemory: It does not fit the slice.
            RequestError: It is no program, or is not named by its content.
        """
        if self._key is None:
            raise _who()
        if name == SLICE:
            self._lender.lease(self._key, self._member)
            return
        if not is_content_name(name):
            raise RequestError(
                f"Programs are named by their content, and {name[:60]!r} is no such name.",
                hint="It is accelrt- and the first 32 digits of the SHA-256 of the ONNX file.",
            )
        model, precision = _program(name, parameters)
        lease = self._lender.lease(self._key, self._member)
        await self._lender.load_for(lease, self._member, name, model, precision)

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Let a program go; `SLICE` stands for the whole lease.

        Raises:
            ModelNotFound: The client does not hold it.
        """
        lease = self._lease
        if lease is None or (name != SLICE and name not in lease.held):
            raise ModelNotFound(f"You hold no {name[:60]!r} here.")
        if name == SLICE:
            await self._lender.give_back(lease, self._member)
            return
        by = lease.held[name].by
        if self._member:
            by.discard(self._member)
        if not by or not self._member:
            await self._lender._drop(lease, name)

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Return the statistics of the client's programs; others may call the same ones.

        Raises:
            ModelNotFound: The client does not hold it.
        """
        lease = self._lease
        held = {} if lease is None else lease.held
        if name and name not in held:
            raise ModelNotFound(f"You hold no program {name[:60]!r} here.")
        return [one for one in self._lender.service.statistics(name, version) if one.name in held]

    def snapshot(self) -> Sequence[ModelSnapshot]:
        """Return the state of the client's programs."""
        lease = self._lease
        held = {} if lease is None else lease.held
        return [one for one in self._lender.service.snapshot() if one.name in held]


def _program(name: str, parameters: Mapping[str, str | bytes | int | bool]) -> tuple[bytes | None, str | None]:
    """Return the ONNX file of a load request, and the precision that it asks for.

    Raises:
        RequestError: It brings something else.
    """
    model, precision = None, None
    for key, value in parameters.items():
        if key == FILE and isinstance(value, bytes):
            model = value
        elif key == "config" and isinstance(value, str | bytes):
            given = configs.from_json(value)
            precision = given.parameters.get(PRECISION)
            plain = configs.ModelConfig(
                given.name,
                given.platform,
                given.backend,
                0 if given.max_batch_size is not None else None,
                parameters={} if precision is None else {PRECISION: precision},
            )
            if given != plain or given.name not in ("", name):
                raise RequestError(
                    "A slice runs programs as they are: a configuration has no more than the name, the backend, a "
                    f"max_batch_size of 0 and the parameter {PRECISION}."
                )
        else:
            raise RequestError(f"A slice takes config, as text, and {FILE}, as bytes; not {key[:80]!r}.")
    return model, precision


def _who() -> NotAllowed:
    return NotAllowed(
        "This server lends slices of an accelerator, and has to know to whom.",
        hint="Send the metadata accelrt-lease: 32 or more random characters, the same ones with each call.",
    )


def _slices(settings: LendingSettings) -> int:
    """Return for how many slices the accelerator has memory.

    Raises:
        OptionError: For none, or it does not tell how much it has.
        AccelrtError: There is no such accelerator.
    """
    target = parse(settings.accelerator)
    backend = REGISTRY.backend(target.backend)
    engine = None if target.engine is None else find_engine(backend, target.engine)
    devices = devices_of(backend, target.devices, engine)
    if not devices:
        raise CoresUnavailable(
            f"There is no accelerator {settings.accelerator} here.", hint="accelrt doctor lists them."
        )
    sizes = [device.memory_bytes for device in devices]
    if any(size is None for size in sizes):
        raise OptionError(f"{settings.accelerator} does not tell its memory.", hint="Say how many --slices there are.")
    # Each copy of a program lies on one device, whichever that is; so every slice must fit each.
    count = min(size or 0 for size in sizes) // settings.size.memory_bytes
    if count < 1:
        raise OptionError(
            f"{settings.accelerator} has {min(size or 0 for size in sizes)} bytes of memory, and a slice takes "
            f"{settings.size.memory_bytes}.",
            hint="Lend smaller slices.",
        )
    return count
