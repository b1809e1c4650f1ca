"""What one client sees of a server that lends slices."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from accelrt.errors import ModelNotFound, NotAllowed, RequestError
from accelrt.protocol.leases import PRECISION, SLICE, is_content_name
from accelrt.serve.interface import IndexEntry, ModelSnapshot, ModelStatistics, ServedModel
from accelrt.serve.lending.leases import Lease
from accelrt.serve.lending.metered import Metered, SliceModel
from accelrt.serve.models import config as configs

if TYPE_CHECKING:
    from accelrt.serve.lending.lender import Lender

FILE = "file:1/model.onnx"
"""The one file that a program consists of."""


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
            raise unknown_client()
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
            await self._lender.drop(lease, name)

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


def unknown_client() -> NotAllowed:
    """Return the error for a client that does not say who it is."""
    return NotAllowed(
        "This server lends slices of an accelerator, and has to know to whom.",
        hint="Send the metadata accelrt-lease: 32 or more random characters, the same ones with each call.",
    )
