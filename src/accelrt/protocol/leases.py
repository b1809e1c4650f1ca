"""How a slice of an accelerator is borrowed: an extension that needs nothing beyond the protocol's own methods.

A server that lends slices names `EXTENSION` among its extensions. A client says who it is by its API key, or by a token
that it drew and sends with each call as the metadata `TOKEN`. The model `SLICE` stands for what is lent to it:

================================  ==========================================================================
``RepositoryModelLoad(SLICE)``    ask for a lease, or renew it; loading a program does so, too
``ModelReady(SLICE)``             whether there is a lease; renews it, as each call does
``ModelConfig(SLICE)``            what the slice is, as `describe_slice` reads it
``RepositoryModelUnload(SLICE)``  give it back, with all that was loaded under it
================================  ==========================================================================

Programs are named by their content (`content_name`), so that those of several clients are there once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXTENSION = "accelrt_leases"
"""Among the extensions of a server that lends slices."""

PRECISION_EXTENSION = "accelrt_precision"
"""Among the extensions of a server that computes in the precision that a configuration's `PRECISION` asks for."""

TOKEN = "accelrt-lease"
"""Key of the metadata that has a client's token."""

SLICE = "accelrt.slice"
"""Name of the model that stands for what is lent to the caller."""

PRECISION = "accelrt.precision"
"""Parameter of a model's configuration: what it is to be computed in. A wish; `PLACEMENT` says what became of it."""

PLACEMENT = "accelrt.placement"
"""Parameter of a model's configuration as the server tells it: JSON, engines and precisions with their nodes."""

DETAILS = "accelrt.slice"
"""Parameter of the configuration of `SLICE` that holds a `SliceState` as JSON."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}", re.ASCII)
_NAME = re.compile(r"accelrt-[0-9a-f]{32}", re.ASCII)


def is_token(text: str) -> bool:
    """Tell whether a text can be a token: 32 to 128 letters, digits, ``-`` and ``_``, as long as a key must be."""
    return _TOKEN.fullmatch(text) is not None


def is_content_name(text: str) -> bool:
    """Tell whether a model's name is of the form of `content_name`."""
    return _NAME.fullmatch(text) is not None


def content_name(model: bytes, precision: str | None = None) -> str:
    """Return the name of a program: 128 bits of the SHA-256 of its ONNX file and of what it is to be computed in."""
    digest = hashlib.sha256(model)
    if precision is not None:
        digest.update(b"\0accelrt.precision\0" + precision.encode())
    return f"accelrt-{digest.hexdigest()[:32]}"


@dataclass(frozen=True, slots=True)
class Placed:
    """So many nodes of a program that a server runs on one of its engines in one precision."""

    engine: str
    precision: str
    nodes: int

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' * (self.nodes != 1)} by {self.engine} in {self.precision}"


def placement_of(parameters: Mapping[str, str]) -> tuple[Placed, ...]:
    """Read `PLACEMENT` of a model's configuration; empty if the server does not tell."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(parameters[PLACEMENT])
        return tuple(Placed(str(one["engine"]), str(one["precision"]), int(one["nodes"])) for one in told)
    return ()


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a slice, by a name that opens nothing: how many programs, and the bytes that count for it."""

    id: str
    programs: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class SliceState:
    """A slice as its server tells it.

    Attributes:
        type: ``eia2.medium``, or ``custom``.
        accelerator: The target that is lent: ``cuda:0``.
        memory_bytes, held_bytes: The quota, and what the caller's programs take of it.
        concurrency: Calls of one client that are computed at a time.
        lease_s: How long a lease lasts after its last use.
        leased: Whether the caller has a lease.
        slices: How many clients may have one.
        holders: Those who have.
    """

    type: str
    accelerator: str
    memory_bytes: int
    held_bytes: int
    concurrency: int
    lease_s: float
    leased: bool
    slices: int
    holders: tuple[Holder, ...] = ()

    @property
    def free_bytes(self) -> int:
        """What the caller may still load."""
        return max(0, self.memory_bytes - self.held_bytes)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        holders = [{"id": one.id, "programs": one.programs, "held_bytes": one.held_bytes} for one in self.holders]
        return {**{name: getattr(self, name) for name in self.__slots__}, "holders": holders}


def describe_slice(parameters: Mapping[str, str]) -> SliceState | None:
    """Read the parameters of the configuration of `SLICE`; None if they are not what they should be."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        data = json.loads(parameters[DETAILS])
        return SliceState(
            str(data["type"]),
            str(data["accelerator"]),
            int(data["memory_bytes"]),
            int(data["held_bytes"]),
            int(data["concurrency"]),
            float(data["lease_s"]),
            bool(data["leased"]),
            int(data["slices"]),
            tuple(Holder(str(h["id"]), int(h["programs"]), int(h["held_bytes"])) for h in data["holders"]),
        )
    return None
