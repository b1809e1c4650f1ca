"""What ``CUDA_VISIBLE_DEVICES`` lets a process see, as the CUDA driver reads it.

The grammar, from NVIDIA's CUDA Programming Guide ("CUDA Environment Variables") and the MIG User Guide ("CUDA Device
Enumeration"): a list with commas of indices, of GPUs' identifiers (``GPU-8932f937``, any beginning that is unique), or
of MIG instances' (``MIG-<identifier>``, by older drivers ``MIG-GPU-<identifier>/<instance>/<compute instance>``). An
entry that names nothing hides itself and all that follow. One named twice hides everything. Of several MIG
instances a process sees the first alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

VARIABLE = "CUDA_VISIBLE_DEVICES"

_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Identity:
    """What one GPU may be called by.

    Attributes:
        uuid: ``GPU-...``.
        partitioned: Whether it is in MIG mode, in which programs run on its instances alone.
        instances: Its MIG instances by identifier, and by the older form of it.
    """

    uuid: str
    partitioned: bool = False
    instances: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """One device that is visible: the place of its GPU in the list given, and of the MIG instance on it, if it is."""

    gpu: int
    instance: int | None = None


def visible(text: str | None, gpus: Sequence[Identity]) -> tuple[Seen, ...]:
    """Return what is visible, in the order in which CUDA numbers it.

    Args:
        text: The variable's value; None if it is not set.
        gpus: All of the machine, in CUDA's order.
    """
    if text is None:
        seen = [found for index, gpu in enumerate(gpus) if (found := _whole(index, gpu)) is not None]
    else:
        seen = []
        for found in _named(text, gpus):
            if found in seen:
                return ()
            seen.append(found)
    whole = [one for one in seen if one.instance is None]
    # Whole GPUs and an instance do not mix; GPUs win, as the driver enumerates them first.
    return tuple(whole or seen[:1])


def _named(text: str, gpus: Sequence[Identity]) -> list[Seen]:
    """Return what the entries name, up to the first that names nothing; the first entry says of which kind all are."""
    first = text.lstrip()
    kind = next((prefix for prefix in ("GPU-", "MIG-") if first.startswith(prefix)), "")
    found: list[Seen] = []
    for entry in text.split(","):
        one = _entry(entry.strip(), kind, gpus)
        if one is None:
            break
        found.append(one)
    return found


def _entry(entry: str, kind: str, gpus: Sequence[Identity]) -> Seen | None:
    if kind == "MIG-":
        return _instance(entry, gpus) if entry.startswith(kind) else None
    if kind == "GPU-":
        matches = [i for i, gpu in enumerate(gpus) if entry.startswith(kind) and gpu.uuid.startswith(entry)]
        return _whole(matches[0], gpus[matches[0]]) if len(matches) == 1 else None
    # The driver reads a number as C's strtol does: what follows it is ignored.
    match = _NUMBER.match(entry)
    index = int(match[1]) if match is not None else -1
    return _whole(index, gpus[index]) if 0 <= index < len(gpus) else None


def _whole(index: int, gpu: Identity) -> Seen | None:
    if not gpu.partitioned:
        return Seen(index)
    return Seen(index, 0) if gpu.instances else None


def _instance(entry: str, gpus: Sequence[Identity]) -> Seen | None:
    exact = [Seen(g, i) for g, gpu in enumerate(gpus) for i, names in enumerate(gpu.instances) if entry in names]
    if exact:
        return exact[0]
    begun = [
        Seen(g, i)
        for g, gpu in enumerate(gpus)
        for i, names in enumerate(gpu.instances)
        if any(name.startswith(entry) for name in names)
    ]
    return begun[0] if len(begun) == 1 else None
