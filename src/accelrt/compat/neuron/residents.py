"""Programs on their cores: loaded as the vendor loads them, one a core at a time.

The vendor lets many programs wait on one core. In accelrt a core belongs to one session. So where a program finds no
core free, the one of this process that was not called for the longest time leaves, and comes back when it is called.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelrt
from accelrt import options as option_module
from accelrt.artifact.artifact import open_artifact
from accelrt.compat.neuron.compiling import note_once
from accelrt.errors import CoresUnavailable
from accelrt.registry import REGISTRY, Candidate, devices_of, find_engine
from accelrt.target import parse

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.runtime.session import Session


ALL = 1 << 30
"""A number of cores that stands for all there are."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a program goes, as the vendor's placement functions say it.

    Attributes:
        start: The first core, counted among those that the process may use; -1 for the next free one.
        count: How many cores; -1 for as many as the program needs. More are replicas, which take calls in turn.
        cores: Each of them instead, for those that are not in a row.
        group: A group of cores instead, as the environment cuts them.

    Raises:
        ValueError: A number that stands for no core.
    """

    start: int = -1
    count: int = -1
    cores: tuple[int, ...] | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("start_nc", self.start), ("nc_count", self.count)):
            if type(value) is not int or value < -1 or (name == "nc_count" and value == 0):
                raise ValueError(f"{name} must be -1 or a number of {'cores' if name == 'nc_count' else 'a core'}, "
                                 f"not {value!r}")  # fmt: skip


class Resident:
    """A program that is on its cores, or will be when it is called.

    Args:
        artifact: What to load.
        placement: Where to; None for the next free core.
    """

    def __init__(self, artifact: Artifact, placement: Placement | None = None) -> None:
        self.artifact = artifact
        self.placement = placement or Placement()
        self.session: Session | None = None
        self.calls = 0
        self.turn = 0


_CHANGED = threading.Condition(threading.RLock())
_RESIDENTS: dict[int, Resident] = {}
_NUMBERS, _TURNS = itertools.count(1), itertools.count(1)


def settle(artifact: Artifact) -> int:
    """Take a program in and return its number; it is loaded when it is called."""
    with _CHANGED:
        number = next(_NUMBERS)
        _RESIDENTS[number] = Resident(artifact)
        return number


def settle_packed(packed: bytes) -> int:
    """Take in a program that was saved in a file; what runs code when it is loaded needs ``ACCELRT_TRUST=1``.

    Raises:
        CorruptArtifact, ArtifactVersionError: It is none.
    """
    handle, name = tempfile.mkstemp(prefix="accelrt-neuron-", suffix=".accel")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(packed)
        return settle(open_artifact(Path(name)))
    finally:
        Path(name).unlink()


def leave(number: int) -> None:
    """Forget a program and free its cores; a number that is not known is no error."""
    with _CHANGED:
        resident = _RESIDENTS.pop(number, None)
        if resident is not None:
            _unload(resident)
            _CHANGED.notify_all()


def leave_with(owner: Any, number: int) -> None:
    """Forget a program when ``owner`` is freed."""
    weakref.finalize(owner, leave, number).atexit = False


def resident(number: int) -> Resident:
    """Return a program by its number.

    Raises:
        RuntimeError: There is none.
    """
    with _CHANGED:
        found = _RESIDENTS.get(number)
    if found is None:
        raise RuntimeError("The program of this module was freed.")
    return found


def put(number: int, placement: Placement) -> None:
    """Load a program where it is wanted; from where it was, it is unloaded.

    Raises:
        CoresUnavailable: The cores are not there, or another process or another session holds them.
    """
    one = resident(number)
    with _CHANGED:
        _wait_until(lambda: one.calls == 0)
        _unload(one)
        one.placement = placement
        _load(one)


def wish(number: int, placement: Placement) -> None:
    """Say where a program is to be loaded when it is called, if it is not loaded yet."""
    resident(number).placement = placement


def wish_group(number: int, group: int) -> None:
    """Say in which group of cores a program is to be loaded, by the group's place among those of the environment."""
    wish(number, Placement(group=group))


@contextmanager
def running(number: int) -> Iterator[Session]:
    """Return the session of a program, which stays where it is meanwhile; load it first if need be."""
    one = resident(number)
    with _CHANGED:
        if one.session is None:
            _load(one)
        one.calls += 1
        one.turn = next(_TURNS)
        session = one.session
    assert session is not None
    try:
        yield session
    finally:
        with _CHANGED:
            one.calls -= 1
            _CHANGED.notify_all()


def _wait_until(condition: Any) -> None:
    _CHANGED.wait_for(condition)


def _unload(one: Resident) -> None:
    if one.session is not None:
        one.session.close()
        one.session = None


def _load(one: Resident) -> None:
    """Load a program, sending away others that hold what it needs, the longest unused first."""
    while one.session is None:
        wanted = _wanted(one)
        try:
            one.session = accelrt.load(one.artifact, **wanted)
        except CoresUnavailable:
            others = [other for other in list(_RESIDENTS.values()) if other is not one and _in_the_way(other, wanted)]
            if not others:
                raise
            if idle := [other for other in others if not other.calls]:
                _unload(min(idle, key=lambda other: other.turn))
            else:
                _CHANGED.wait()


def _wanted(one: Resident) -> dict[str, Any]:
    """Return what `accelrt.load` is to be asked for."""
    place, found = one.placement, _engine_of(one.artifact)
    if found is None or not found.backend.exclusive:
        if place != Placement():
            note_once(
                f"Programs for {one.artifact.manifest.target} have no cores of their own; placement has no effect."
            )
        return {}
    need = _cores_needed(one.artifact, found)
    if place.group is not None:
        return _in_group(place.group, need, found)
    if place.cores is None and place.start < 0:
        return {"replicas": max(1, place.count // need)}
    here = cores_of(found)
    wanted = place.cores
    if wanted is None:
        count = {-1: need, ALL: len(here) - place.start}.get(place.count, place.count)
        wanted = tuple(range(place.start, place.start + count))
    if missing := [index for index in wanted if not 0 <= index < len(here)]:
        raise CoresUnavailable(
            f"NeuronCore(s) not available - Requested:nc{missing[0]}-nc{missing[-1]} Available:{len(here)}.",
            hint="Cores are counted from 0, among those that this process may use.",
            backend=found.backend.name,
        )
    return {"devices": [here[index] for index in wanted], "replicas": max(1, len(wanted) // need)}


def _in_group(number: int, need: int, found: Candidate) -> dict[str, Any]:
    """Return what puts a program on the first cores of a group, as many as it needs."""
    groups = found.backend.groups(os.environ, devices_of(found.backend, None, found.engine))
    if number >= len(groups) or need > len(groups[number].devices):
        raise CoresUnavailable(
            f"The program is bound to the NeuronCore Group {number} and needs {need} of its cores; there are "
            f"{len(groups)} groups of {[len(group.devices) for group in groups]} cores.",
            hint="NEURONCORE_GROUP_SIZES cuts the cores into groups, and saved_model.set_core_binding chooses one.",
            backend=found.backend.name,
        )
    return {"devices": list(groups[number].devices[:need]), "replicas": 1}


def _in_the_way(other: Resident, wanted: Mapping[str, Any]) -> bool:
    if other.session is None:
        return False
    held = {int(name.rpartition(":")[2]) for one in other.session.stats().replicas for name in one.devices}
    return bool(held) and ("devices" not in wanted or bool(held & set(wanted["devices"])))


def _engine_of(artifact: Artifact) -> Candidate | None:
    """Return the engine that runs the first segment on the artifact's target, None if nothing of it runs there."""
    backend = REGISTRY.backend(parse(artifact.manifest.target).backend)
    for segment in artifact.manifest.segments:
        if segment.backend == backend.name:
            engine = find_engine(backend, segment.engine)
            return Candidate(backend, engine.with_options(option_module.from_json(engine.options, segment.options)))
    return None


def _cores_needed(artifact: Artifact, found: Candidate) -> int:
    need = 1
    for segment in artifact.manifest.segments:
        if segment.backend == found.backend.name:
            engine = find_engine(found.backend, segment.engine)
            need = max(need, engine.devices_needed(option_module.from_json(engine.options, segment.options)))
    return need


def cores_of(found: Candidate) -> Sequence[int]:
    """Return the cores that this process may use, in order."""
    devices = devices_of(found.backend, None, found.engine)
    return sorted({index for group in found.backend.groups(os.environ, devices) for index in group.devices})


def count_of(number: int) -> int:
    """Return how many cores a program can be spread over: 1 where it has none of its own."""
    found = _engine_of(resident(number).artifact)
    return 1 if found is None or not found.backend.exclusive else max(1, len(cores_of(found)))
