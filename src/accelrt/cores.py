"""Core groups: which devices belong together, as a call, a target or a vendor's environment variables say.

Plain data and grammar, shared by the contract, the scheduler and backends. The environment is always handed in as a
mapping, so that nothing here depends on the process. Origin of the variables: the Neuron runtime's configuration guide
for ``NEURON_RT_VISIBLE_CORES`` and ``NEURON_RT_NUM_CORES``; the parser in the source of tensorflow-neuron for
``NEURONCORE_GROUP_SIZES``, which new runtimes no longer read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelrt.errors import CoresUnavailable, OptionError

GROUP_SIZES = "NEURONCORE_GROUP_SIZES"
VISIBLE_CORES = "NEURON_RT_VISIBLE_CORES"
NUM_CORES = "NEURON_RT_NUM_CORES"

MOST_CORES = 4096
"""More cores than any machine has: a text that names more is a mistake, and must not become a list of that length."""

_SIZE = re.compile(r"(?:([0-9]{1,6})[xX])?([0-9]{1,6})", re.ASCII)
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", re.ASCII)
_COUNT = re.compile(r"[0-9]{1,6}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Group:
    """Devices that belong together, by index within their backend.

    Attributes:
        devices: Indices, each once.
        whole: One copy of a program takes the whole group, even if it needs fewer devices. Otherwise the group is a
            pool from which each copy takes as many neighbours as it needs.
    """

    devices: tuple[int, ...]
    whole: bool = False

    def __post_init__(self) -> None:
        if not self.devices or min(self.devices) < 0 or len(set(self.devices)) != len(self.devices):
            raise ValueError(f"{self.devices!r} is no group: indices must be there, distinct, and not negative.")


def parse_group_sizes(text: str) -> tuple[int, ...]:
    """Parse ``NEURONCORE_GROUP_SIZES``: cores of each group, in order.

    The form is a list of ``C`` or ``NxC`` (N groups of C cores each) with commas, in brackets or not:
    ``8,1,1,1,1,2,2``, ``[4x1,2]``.

    Raises:
        OptionError: Not of this form, a group of no cores, or more than `MOST_CORES` in all.
    """
    body = text.strip()
    if body.startswith("[") and body.endswith("]"):
        body = body[1:-1]
    sizes: list[int] = []
    total = 0
    for part in body.split(","):
        match = _SIZE.fullmatch(part.strip())
        copies, cores = (int(match[1] or 1), int(match[2])) if match is not None else (0, 0)
        total += copies * cores
        if copies < 1 or cores < 1 or total > MOST_CORES:
            raise OptionError(
                f"{GROUP_SIZES} holds {_shown(text)}; {_shown(part)} is no size of a group.",
                hint="Write sizes with commas, `8,1,1,2`, or `4x1` for four groups of one core.",
            )
        sizes += [cores] * copies
    return tuple(sizes)


def parse_visible_cores(text: str) -> tuple[int, ...]:
    """Parse ``NEURON_RT_VISIBLE_CORES``: ``3``, ``3-6``, ``3,4,5`` or a mixture; ascending, without a gap.

    Raises:
        OptionError: Not of this form, or more than `MOST_CORES`.
    """
    cores: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match is not None else (1, 0)
        gap = bool(cores) and first != cores[-1] + 1
        if first > last or gap or len(cores) + last - first >= MOST_CORES:
            raise OptionError(
                f"{VISIBLE_CORES} holds {_shown(text)}, which is no ascending list of cores without a gap.",
                hint="Write `3`, `0-3` or `0,1,2-3`.",
            )
        cores.extend(range(first, last + 1))
    return tuple(cores)


def parse_num_cores(text: str) -> int | None:
    """Parse ``NEURON_RT_NUM_CORES``: a whole number; None for 0, which means all.

    Raises:
        OptionError: Not a number.
    """
    if _COUNT.fullmatch(text.strip()) is None or int(text) > MOST_CORES:
        raise OptionError(f"{NUM_CORES} holds {_shown(text)}; it takes a number of cores, 0 for all.")
    return int(text) or None


def visible_cores(environ: Mapping[str, str], total: int) -> tuple[int, ...]:
    """Return the cores of the machine that this process may use; ``NEURON_RT_VISIBLE_CORES`` wins.

    Args:
        environ: Variables by name; an empty value is as good as none.
        total: Cores that the machine has.

    Raises:
        OptionError: A variable cannot be read.
        CoresUnavailable: It asks for cores that the machine has not.
    """
    if (text := environ.get(VISIBLE_CORES, "").strip()) != "":
        cores = parse_visible_cores(text)
        if cores[-1] >= total:
            raise CoresUnavailable(
                f"{VISIBLE_CORES} holds {_shown(text)}; there are {total} cores, numbered from 0.",
                hint="Name cores that exist, or unset the variable.",
            )
        return cores
    if (text := environ.get(NUM_CORES, "").strip()) != "" and (count := parse_num_cores(text)) is not None:
        if count > total:
            raise CoresUnavailable(
                f"{NUM_CORES} asks for {count} cores; there are {total}.",
                hint="Ask for fewer, or unset the variable.",
            )
        return tuple(range(count))
    return tuple(range(total))


def core_groups(environ: Mapping[str, str], cores: Sequence[int]) -> tuple[Group, ...]:
    """Cut cores into the groups of ``NEURONCORE_GROUP_SIZES``, in order; without it they are one pool.

    Cores left over belong to no group: the variable says how many the process uses.

    Args:
        environ: Variables by name; an empty value is as good as none.
        cores: What `visible_cores` returned, or the indices a backend numbers them by.

    Raises:
        OptionError: The variable cannot be read.
        CoresUnavailable: The groups need more cores than there are.
    """
    text = environ.get(GROUP_SIZES, "").strip()
    if not text:
        return (Group(tuple(cores)),) if cores else ()
    sizes = parse_group_sizes(text)
    if sum(sizes) > len(cores):
        raise CoresUnavailable(
            f"{GROUP_SIZES} holds {_shown(text)}, which needs {sum(sizes)} cores; there are {len(cores)}.",
            hint="Make the groups smaller, or unset the variable.",
        )
    groups, start = [], 0
    for size in sizes:
        groups.append(Group(tuple(cores[start : start + size]), whole=True))
        start += size
    return tuple(groups)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
