"""Placement: replicas get devices of their own, in order, and nobody gets what another one holds."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelrt.cores import Group
from accelrt.errors import CoresUnavailable
from accelrt.runtime.ledger import Hold, Holders, Ledger
from accelrt.runtime.place import Spot, place


@st.composite
def machines(draw: st.DrawFn) -> tuple[tuple[Group, ...], dict[int, tuple[str, ...]]]:
    """Groups over the devices of a machine, and who holds some of them."""
    total = draw(st.integers(1, 16))
    groups, start = [], 0
    while start < total:
        size = draw(st.integers(1, total - start))
        groups.append(Group(tuple(range(start, start + size)), whole=draw(st.booleans())))
        start += size
    held = draw(st.sets(st.integers(0, total - 1)))
    return tuple(groups), dict.fromkeys(held, ("session 0",))


def room(groups: tuple[Group, ...], held: dict[int, tuple[str, ...]], width: int) -> int:
    """How many replicas fit side by side, counted another way: the lengths of runs of free devices."""
    total = 0
    for group in groups:
        if group.whole:
            total += len(group.devices) >= width and not any(device in held for device in group.devices)
            continue
        text = "".join(" " if device in held else "x" for device in group.devices)
        total += sum(len(run) // width for run in text.split())
    return total


@given(machines(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 12))
def test_exclusive_replicas_never_share_and_use_all_the_room(
    machine: tuple[tuple[Group, ...], dict[int, tuple[str, ...]]], needs: list[int], replicas: int
) -> None:
    groups, held = machine
    width = max(needs)
    fits = room(groups, held, width)
    try:
        spots = place(needs, groups, replicas, holders=held, exclusive=True, backend="b")
    except CoresUnavailable as error:
        assert fits < replicas
        assert f"room for {fits}" in error.message
        assert ("by session 0" in error.message) is bool(held)
        return
    assert len(spots) == replicas <= fits
    taken = [device for spot in spots for device in spot.held]
    assert len(set(taken)) == len(taken)
    assert not set(taken) & set(held)
    for spot in spots:
        first = spot.devices[0]
        assert spot.devices == tuple(range(first, first + width))
        assert set(spot.devices) <= set(spot.held)
        (group,) = [group for group in groups if first in group.devices]
        assert set(spot.held) <= set(group.devices)
        assert not group.whole or spot.held == group.devices


@given(machines(), st.integers(1, 4), st.integers(1, 40))
def test_shared_devices_take_any_number_evenly(
    machine: tuple[tuple[Group, ...], dict[int, tuple[str, ...]]], width: int, replicas: int
) -> None:
    groups, _ = machine
    if room(groups, {}, width) == 0:
        with pytest.raises(CoresUnavailable):
            place([width], groups, replicas)
        return
    spots = place([width], groups, replicas)
    assert len(spots) == replicas
    if width == 1 and not any(group.whole for group in groups):
        counts = [sum(device in spot.held for spot in spots) for group in groups for device in group.devices]
        assert max(counts) - min(counts) <= 1


@given(machines(), st.integers(1, 4))
def test_named_devices_get_as_many_replicas_as_fit(
    machine: tuple[tuple[Group, ...], dict[int, tuple[str, ...]]], width: int
) -> None:
    groups, _ = machine
    everything = (Group(tuple(device for group in groups for device in group.devices)),)
    fits = len(everything[0].devices) // width
    if not fits:
        with pytest.raises(CoresUnavailable):
            place([width], groups, named=everything)
        return
    spots = place([width], groups, named=everything, exclusive=True)
    assert [spot.devices for spot in spots] == [tuple(range(n * width, (n + 1) * width)) for n in range(fits)]


def test_models_loaded_in_order_take_the_next_free_group() -> None:
    """The documented layout: eight cores, four single ones, two pairs."""
    sizes, start, groups = (8, 1, 1, 1, 1, 2, 2), 0, []
    for size in sizes:
        groups.append(Group(tuple(range(start, start + size)), whole=True))
        start += size
    held: dict[int, tuple[str, ...]] = {}
    for number, size in enumerate(sizes):
        (spot,) = place([size], groups, holders=held, exclusive=True, backend="neuron")
        assert spot == Spot(groups[number].devices, groups[number].devices)
        held |= dict.fromkeys(spot.held, (f"session {number}",))
    with pytest.raises(CoresUnavailable, match=r"neuron:15 by session 6"):
        place([1], groups, holders=held, exclusive=True, backend="neuron")


def test_a_pool_is_used_in_sequence() -> None:
    """NEURON_RT_NUM_CORES=13 and models of 2, 4, 3 and 4 cores."""
    pool, held, starts = [Group(tuple(range(13)))], {}, []
    for size in (2, 4, 3, 4):
        (spot,) = place([size], pool, holders=held, exclusive=True)
        starts.append(spot.devices[0])
        held |= dict.fromkeys(spot.held, ("x",))
    assert starts == [0, 2, 6, 9]


def test_a_small_model_holds_its_whole_group() -> None:
    (spot,) = place([1, 2], [Group((0,), whole=True), Group((1, 2, 3), whole=True)])
    assert spot == Spot((1, 2), (1, 2, 3))


def test_named_devices_must_be_there_and_free() -> None:
    pool = [Group((0, 1, 2, 3))]
    with pytest.raises(CoresUnavailable, match=r"no device 5; it has \[0, 1, 2, 3\]"):
        place([1], pool, named=[Group((3, 5))], backend="b")
    with pytest.raises(
        CoresUnavailable, match=r"4 replicas of 1 device asked for on 'b', room for 3 among 4. Held: b:2 by me"
    ):
        place([1], pool, named=[Group((0, 1, 2, 3))], holders={2: ("me",)}, exclusive=True, backend="b")
    with pytest.raises(CoresUnavailable, match="1 replica of 2 devices asked for"):
        place([2], pool, named=[Group((0, 2))], backend="b")


# The ledger


def taking(*devices: int) -> Callable[[Holders], tuple[Spot, ...]]:
    def choose(holders: Holders) -> tuple[Spot, ...]:
        for device in devices:
            if device in holders:
                raise CoresUnavailable(f"{device} is held by {holders[device]}")
        return (Spot(devices, devices),)

    return choose


def test_released_devices_are_free_again() -> None:
    ledger = Ledger()
    hold = ledger.acquire("b", "first", taking(0, 1))
    with pytest.raises(CoresUnavailable, match=r"1 is held by .*first"):
        ledger.acquire("b", "second", taking(1, 2))
    other = ledger.acquire("c", "third", taking(1))
    assert ledger.holders("b") == {0: ("first",), 1: ("first",)}
    hold.release()
    hold.release()
    assert ledger.holders("b") == {}
    assert ledger.acquire("b", "second", taking(1, 2)).owner == "second"
    assert other.spots == (Spot((1,), (1,)),)


def test_what_is_dropped_without_being_closed_is_free_again() -> None:
    class Holder:
        def __init__(self, hold: Hold) -> None:
            self.hold, self.me = hold, self  # a cycle, as in a session: only the collector frees it

    ledger = Ledger()
    gc.disable()
    try:
        Holder(ledger.acquire("b", "leak", taking(0)))
        assert 0 in ledger.holders("b")
        assert ledger.acquire("b", "next", taking(0)).owner == "next"
    finally:
        gc.enable()


def test_one_hundred_threads_get_devices_of_their_own() -> None:
    ledger, holds, start = Ledger(), [], threading.Barrier(20)
    pool = [Group(tuple(range(100)))]

    def take(number: int) -> None:
        start.wait()
        for _ in range(5):
            holds.append(ledger.acquire("b", str(number), lambda held: place([1], pool, holders=held, exclusive=True)))

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(take, range(20)))
    assert sorted(device for hold in holds for spot in hold.spots for device in spot.held) == list(range(100))
    with pytest.raises(CoresUnavailable):
        ledger.acquire("b", "late", lambda held: place([1], pool, holders=held, exclusive=True))
