"""Where the copies of a model go: a pure function of what they need, what there is, and who holds what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from accelrt.cores import Group
from accelrt.errors import CoresUnavailable


@dataclass(frozen=True, slots=True)
class Spot:
    """The place of one replica, by device indices.

    Attributes:
        devices: Where its programs are loaded.
        held: What nobody else may take meanwhile: ``devices``, or the whole group they are the first of.
    """

    devices: tuple[int, ...]
    held: tuple[int, ...]


def place(
    needs: Sequence[int],
    groups: Sequence[Group],
    replicas: int | None = None,
    *,
    named: Sequence[Group] | None = None,
    holders: Mapping[int, Sequence[str]] | None = None,
    exclusive: bool = False,
    backend: str = "",
) -> tuple[Spot, ...]:
    """Place replicas of a model on the devices of one backend.

    All segments of a replica that run on the backend share its devices. Replicas take the next free place in order of
    the groups; where devices are shared, the least held one first, then in order.

    Args:
        needs: Devices that each segment on this backend takes, at least 1 each.
        groups: What the process may use, in the order in which it is to be taken.
        replicas: How many copies; None for as many as ``named`` has room for, 1 if nothing is named.
        named: Groups that the call asks for instead; their devices must be among those of ``groups``.
        holders: Who holds each device already.
        exclusive: A device that is held is not free.
        backend: Name of the backend, for messages.

    Returns:
        A place for each replica.

    Raises:
        CoresUnavailable: A named device is not there, or there is no room for so many replicas; says who holds what.
    """
    width = max([1, *needs])
    allowed = {device for group in groups for device in group.devices}
    chosen = tuple(groups if named is None else named)
    if missing := sorted({device for group in chosen for device in group.devices} - allowed):
        raise CoresUnavailable(
            f"Backend {backend!r} has no device {missing[0]}; it has {sorted(allowed) or 'none'}.", backend=backend
        )
    room = sum(_capacity(group, width) for group in chosen)
    count = replicas if replicas is not None else max(1, room) if named is not None else 1
    held = {device: list(names) for device, names in (holders or {}).items()}
    windows = list(_windows(chosen, width))
    spots: list[Spot] = []
    while len(spots) < count:
        # `min` keeps the first of equals, which is the next in order.
        best = min(windows, key=lambda spot: _load(spot, held), default=None)
        if best is None or (exclusive and _load(best, held) > 0):
            raise _no_room(count, len(spots), width, chosen, holders or {}, backend)
        spots.append(best)
        for device in best.held:
            held.setdefault(device, []).append("this session")
    return tuple(spots)


def _windows(groups: Sequence[Group], width: int) -> Iterator[Spot]:
    """Yield every place for a replica: the beginning of a whole group, any neighbours by index of a pool."""
    for group in groups:
        if group.whole:
            if len(group.devices) >= width:
                yield Spot(group.devices[:width], group.devices)
            continue
        for start in range(len(group.devices) - width + 1):
            window = group.devices[start : start + width]
            if _neighbours(window):
                yield Spot(window, window)


def _neighbours(window: Sequence[int]) -> bool:
    return all(after == before + 1 for before, after in pairwise(window))


def _load(spot: Spot, held: Mapping[int, Sequence[str]]) -> int:
    return max(len(held.get(device, ())) for device in spot.held)


def _capacity(group: Group, width: int) -> int:
    """How many replicas a group takes side by side."""
    if group.whole:
        return int(len(group.devices) >= width)
    capacity, run = 0, 0
    for position, device in enumerate(group.devices):
        follows = position > 0 and device == group.devices[position - 1] + 1
        run = run + 1 if follows else 1
        if run == width:
            capacity, run = capacity + 1, 0
    return capacity


def _no_room(
    count: int, found: int, width: int, groups: Sequence[Group], holders: Mapping[int, Sequence[str]], backend: str
) -> CoresUnavailable:
    devices = sorted({device for group in groups for device in group.devices})
    taken = "; ".join(
        f"{backend}:{device} by {', '.join(holders[device])}" for device in devices if holders.get(device)
    )
    return CoresUnavailable(
        f"{count} replica{'s' * (count != 1)} of {width} device{'s' * (width != 1)} asked for on {backend!r}, room for "
        f"{found} among {len(devices)}. Held: {taken or 'none'}.",
        hint="Close a session, ask for fewer replicas, or name other devices.",
        backend=backend,
    )
