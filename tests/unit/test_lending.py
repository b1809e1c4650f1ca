"""Slices of an accelerator: whose turn it is, what a lease holds, and clients that want more than theirs."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelrt.errors import (
    ModelNotFound,
    NotAllowed,
    OptionError,
    OutOfDeviceMemory,
    Overloaded,
    RequestError,
    RequestTimeout,
)
from accelrt.protocol.leases import PRECISION, SLICE, content_name, is_token
from accelrt.serve.interface import InferRequest
from accelrt.serve.lending.lender import Lender
from accelrt.serve.lending.sizes import MIB, SIZES, LendingSettings, Size, size_of
from accelrt.serve.lending.slice import FILE, Slice
from accelrt.serve.lending.turns import Party, Turns
from accelrt.testing.models import mlp, small_cnn


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 300))


# Turns


class Simulation:
    """Clients that queue calls of one step each; notes in which order they were computed."""

    def __init__(self, most: int, limits: list[int]) -> None:
        self.turns = Turns(most)
        self.parties = [Party(limit, 1000) for limit in limits]
        self.order: list[int] = []
        self.most, self.highest = most, Counter[int]()

    async def call(self, who: int, steps: int = 1) -> None:
        party = self.parties[who]
        await self.turns.enter(party)
        try:
            assert self.turns.running <= self.most
            assert party.running <= party.limit
            self.highest[who] = max(self.highest[who], party.running)
            self.order.append(who)
            for _ in range(steps):
                await asyncio.sleep(0)
        finally:
            self.turns.leave(party)


def test_a_client_that_floods_does_not_hold_up_one_that_asks_little() -> None:
    async def scene() -> list[int]:
        simulation = Simulation(1, [1, 1])
        flood = [asyncio.create_task(simulation.call(0, 3)) for _ in range(200)]
        await asyncio.sleep(0.001)
        before = len(simulation.order)
        for _ in range(5):
            await simulation.call(1)
        place = len(simulation.order) - before
        await asyncio.gather(*flood)
        assert Counter(simulation.order) == {0: 200, 1: 5}
        return simulation.order[: before + place]

    order = run(scene())
    # Of those that came after it, each of its calls waited for one or two of the other's.
    last = len(order) - 1 - order[::-1].index(1)
    first = order.index(1)
    assert order[first : last + 1].count(0) <= 2 * 5


@settings(max_examples=60, deadline=None)
@given(
    most=st.integers(1, 4),
    limits=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    calls=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=40),
)
def test_turns_keep_their_limits_and_lose_none(
    most: int, limits: list[int], calls: list[tuple[int, int, bool]]
) -> None:
    async def scene() -> None:
        simulation = Simulation(most, limits)
        tasks = []
        for who, steps, given_up in calls:
            task = asyncio.create_task(simulation.call(who % len(limits), steps))
            tasks.append(task)
            await asyncio.sleep(0)
            if given_up:
                task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
        # Whatever was given up in whichever moment: nothing runs, nothing waits, and every turn can be had again.
        assert simulation.turns.running == 0
        assert all(party.running == 0 and not party.waiting for party in simulation.parties)
        assert not simulation.turns._ring
        await asyncio.gather(*(simulation.call(who % len(limits)) for who in range(8)))

    run(scene())


def test_as_many_wait_as_may_and_as_long_as_they_want() -> None:
    async def scene() -> None:
        turns, party = Turns(1), Party(1, 1)
        assert turns.try_enter(party)
        assert not turns.try_enter(party)
        with pytest.raises(RequestTimeout, match="turn did not come"):
            await turns.enter(party, 0.01)
        waiting = asyncio.create_task(turns.enter(party, 5))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="1 calls of this client wait") as refused:
            await turns.enter(party)
        assert refused.value.retry_after_s
        turns.leave(party)
        await waiting
        turns.leave(party)
        assert turns.running == 0

    run(scene())


# Sizes


def test_sizes_are_those_of_the_vendors_table() -> None:
    assert {name: size.memory_bytes >> 30 for name, size in SIZES.items()} == {
        "eia1.medium": 1, "eia1.large": 2, "eia1.xlarge": 4, "eia2.medium": 2, "eia2.large": 4, "eia2.xlarge": 8,
    }  # fmt: skip
    assert size_of("eia2.large", None, None) is SIZES["eia2.large"]
    assert size_of("eia2.large", None, 7) == Size("custom", 4 << 30, 7)
    assert size_of(None, 64, None) == Size("custom", 64 * MIB, 1)
    for wrong in (("eia3.medium", None, None), (None, None, None), (None, None, 2)):
        with pytest.raises(OptionError):
            size_of(*wrong)
    for wrong_settings in ({"slices": 0}, {"lease_s": 0.1}, {"turns": 0}, {"max_queue": 0}):
        with pytest.raises(OptionError):
            LendingSettings("cpu:0", SIZES["eia1.medium"], **wrong_settings)  # type: ignore[arg-type]


def test_a_device_is_lent_as_often_as_its_memory_has_room() -> None:
    import os

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert Lender(LendingSettings("cpu:0", Size("x", 1 << 30, 1))).slices == memory >> 30
    with pytest.raises(OptionError, match="Lend smaller slices"):
        Lender(LendingSettings("cpu:0", Size("x", 2 * memory, 1)))


# Leases


CNN, MLP = small_cnn().SerializeToString(), mlp().SerializeToString()
IMAGE = {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}


def token() -> str:
    return secrets.token_urlsafe(32)


@asynccontextmanager
async def lending(memory: int = 8 * MIB, **more: Any) -> AsyncIterator[Lender]:
    size = Size("small", memory, more.pop("concurrency", 2))
    chosen = LendingSettings("cpu:0", size, **{"slices": 2, "lease_s": 3600.0, **more})
    async with Lender(chosen, drain_s=2.0) as made:
        yield made


async def scores_of(slice_: Slice, name: str) -> tuple[int, ...]:
    """Call a program; what is held of it for that is let go, for unloading waits for it."""
    return (await (await slice_.model(name)).infer(InferRequest(dict(IMAGE)))).outputs["scores"].shape  # type: ignore[union-attr]


async def put(slice_: Slice, model: bytes, **more: Any) -> str:
    name = content_name(model)
    await slice_.load(name, {FILE: model, **more})
    return name


def test_clients_hold_their_own_programs_and_equal_ones_are_there_once() -> None:
    async def scene() -> None:
        async with lending() as lender:
            one, other = lender.of(None, token()), lender.of(None, token())
            name = await put(one, CNN)
            # Another client does not see it, nor reach it by its name alone.
            assert other.find(name) is None
            assert [row.name for row in one.index()] == [name]
            assert other.index() == []
            for ask in (other.model(name), other.load(name, {}), other.unload(name)):
                with pytest.raises(ModelNotFound):
                    await ask
            with pytest.raises(ModelNotFound):
                other.statistics(name)
            loaded = [row.name for row in lender.index()]
            await put(other, CNN)
            assert [row.name for row in lender.index()] == loaded == [name]
            for client in (one, other):
                assert await scores_of(client, name) == (1, 10)
            state = lender.state(None)
            assert [holder.programs for holder in state.holders] == [1, 1]
            # It counts for each of them, stays while anybody holds it, and goes with the last.
            assert all(holder.held_bytes >= max(len(CNN), MIB) for holder in state.holders)
            await one.unload(SLICE)
            assert one.find(name) is None
            assert other.find(name) is not None
            await other.unload(name)
            assert lender.index() == []

    run(scene())


def test_the_quota_is_held_before_and_after_loading() -> None:
    async def scene() -> None:
        async with lending(2 * MIB) as lender:
            client = lender.of(None, token())
            name = await put(client, CNN)
            await put(client, MLP)
            await put(client, CNN)  # what is held already counts once
            third = mlp(features=5).SerializeToString()
            with pytest.raises(OutOfDeviceMemory) as refused:
                await put(client, third)
            # Quota, held and needed, in bytes.
            for figure in (2 * MIB, MIB):
                assert str(figure) in refused.value.message
            assert len(client.index()) == 2
            await client.unload(name)
            await put(client, third)
            assert lender.state(None).holders[0].held_bytes == 2 * MIB
        async with lending(MIB) as lender:
            client = lender.of(None, token())
            with pytest.raises(OutOfDeviceMemory, match=str(2 * MIB)):
                await put(client, bytes(2 * MIB))  # refused by its size; nobody tried to read it

    run(scene())


def test_a_lease_ends_when_nobody_uses_it() -> None:
    async def scene() -> None:
        async with lending(lease_s=3600.0) as lender:
            client, busy = lender.of(None, token()), lender.of(None, token())
            name = await put(client, CNN)
            await put(busy, CNN)
            silent, lively = lender.leases.values()
            await asyncio.sleep(0.01)
            assert busy.find(SLICE) is not None  # a sign of life, such as any call is
            assert lively.used > silent.used
            await lender.expire((lively.used + silent.used) / 2 + 3600)
            assert client.find(name) is None
            assert client.find(SLICE) is None
            assert busy.find(name) is not None
            lively.busy += 1  # a call that takes long
            await lender.expire(lively.used + 7200)
            assert busy.find(name) is not None
            lively.busy -= 1
            await lender.expire(lively.used + 7200)
            assert lender.index() == []
            await put(client, CNN)  # it begins anew
            assert client.find(name) is not None

    run(scene())


def test_a_lease_under_which_nothing_lies_ends_sooner() -> None:
    async def scene() -> None:
        async with lending(lease_s=3600.0) as lender:
            await lender.of(None, token()).load(SLICE, {})
            (lease,) = lender.leases.values()
            await lender.expire(lease.used + 9)
            assert lender.leases
            await lender.expire(lease.used + 11)
            assert not lender.leases

    run(scene())


def test_slices_are_lent_to_so_many_and_freed_for_others() -> None:
    async def scene() -> None:
        async with lending(slices=2) as lender:
            clients = [lender.of(None, token()) for _ in range(3)]
            await put(clients[0], CNN)
            await clients[1].load(SLICE, {})
            for attempt in (clients[2].load(SLICE, {}), put(clients[2], CNN)):
                with pytest.raises(Overloaded, match="All 2 slices") as refused:
                    await attempt
                assert refused.value.retry_after_s
            await clients[0].unload(SLICE)
            await put(clients[2], CNN)

    run(scene())


def test_processes_of_one_key_share_a_slice() -> None:
    async def scene() -> None:
        async with lending(slices=1) as lender:
            mine, yours = lender.of("key", token()), lender.of("key", token())
            name = await put(mine, CNN)
            assert yours.find(name) is not None
            await put(yours, CNN)
            other = await put(mine, MLP)
            await mine.unload(SLICE)
            # What the other process wants stays, and so does the lease.
            assert yours.find(name) is not None
            assert yours.find(other) is None
            await yours.unload(SLICE)
            assert lender.state(None).holders == ()
            # Whoever has another key, or says to have this one's lease as a token, has a slice of its own.
            await put(lender.of("another", None), CNN)
            with pytest.raises(Overloaded):
                await put(lender.of(None, "key" + token()), CNN)

    run(scene())


def test_more_processes_than_may_share_a_key() -> None:
    async def scene() -> None:
        async with lending(slices=1) as lender:
            for _ in range(64):
                await lender.of("key", token()).load(SLICE, {})
            with pytest.raises(Overloaded, match="64 processes"):
                await lender.of("key", token()).load(SLICE, {})

    run(scene())


# Clients that lie


def test_what_reports_show_opens_nothing() -> None:
    async def scene() -> None:
        async with lending() as lender:
            victim_token = token()
            victim = lender.of(None, victim_token)
            name = await put(victim, CNN)
            shown = lender.state(None).holders[0].id
            assert shown not in victim_token and not is_token(shown)
            for taken in (shown, shown.ljust(32, "0"), victim_token[:-1], victim_token + "A"):
                thief = lender.of(None, taken)
                assert thief.find(name) is None and thief.find(SLICE) is None
                with pytest.raises(ModelNotFound):
                    await thief.unload(SLICE)
            assert victim.find(name) is not None

    run(scene())


def test_a_name_that_is_not_the_contents() -> None:
    async def scene() -> None:
        async with lending() as lender:
            liar, victim = lender.of(None, token()), lender.of(None, token())
            popular = content_name(CNN)
            with pytest.raises(RequestError, match=content_name(MLP)):
                await liar.load(popular, {FILE: MLP})
            # In another precision it is another program.
            wish = f'{{"parameters": {{"{PRECISION}": {{"string_value": "bf16"}}}}}}'
            with pytest.raises(RequestError, match=content_name(CNN, "bf16")):
                await liar.load(popular, {FILE: CNN, "config": wish})
            # Nor once somebody has the real one.
            await put(victim, CNN)
            with pytest.raises(RequestError):
                await liar.load(popular, {FILE: MLP})
            assert await scores_of(victim, popular) == (1, 10)
            assert [holder.programs for holder in lender.state(None).holders] == [0, 1]

    run(scene())


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({FILE: CNN, "config": '{"max_batch_size": 8}'}, "as they are"),
        ({FILE: CNN, "config": '{"instance_group": [{"count": 999}]}'}, "as they are"),
        ({FILE: CNN, "config": '{"parameters": {"other": {"string_value": "x"}}}'}, "as they are"),
        ({FILE: CNN, "config": '{"name": "another"}'}, "as they are"),
        ({FILE: CNN, "config": "[" * 10_000}, None),
        ({FILE: CNN, "file:1/model.pt": b"code"}, "model.pt"),
        ({"file:1/../../model.onnx": CNN}, "takes config"),
        ({FILE: CNN, "backend": "cuda"}, "backend"),
        ({FILE: b"\x80\x04no model"}, None),
        ({FILE: b""}, None),
    ],
)
def test_uploads_that_are_no_programs_leave_nothing(parameters: dict[str, Any], says: str | None) -> None:
    async def scene() -> None:
        async with lending() as lender:
            client = lender.of(None, token())
            name = content_name(parameters.get(FILE, b""))
            with pytest.raises(RequestError, match=says):
                await client.load(name, parameters)
            assert lender.index() == []
            assert sum(holder.held_bytes for holder in lender.state(None).holders) == 0
            assert lender.ready()
            await put(client, CNN)  # and harm nobody

    run(scene())


def test_a_precision_that_there_is_not() -> None:
    async def scene() -> None:
        async with lending() as lender:
            config = f'{{"parameters": {{"{PRECISION}": {{"string_value": "fp3"}}}}}}'
            with pytest.raises(RequestError, match="precision must be one of"):
                await lender.of(None, token()).load(content_name(CNN, "fp3"), {FILE: CNN, "config": config})

    run(scene())


def test_who_does_not_say_who_it_is_gets_nothing() -> None:
    async def scene() -> None:
        async with lending() as lender:
            stranger = lender.of(None, None)
            for name in (SLICE, content_name(CNN)):
                with pytest.raises(NotAllowed, match="to whom"):
                    await stranger.load(name, {FILE: CNN})
            assert stranger.find(SLICE) is None and stranger.index() == [] and stranger.statistics() == []
            assert not (await stranger.model(SLICE)).config["parameters"]["accelrt.slice"]["string_value"].count("true")
            with pytest.raises(RequestError, match="computes nothing"):
                await (await stranger.model(SLICE)).infer(InferRequest({}))
            with pytest.raises(NotAllowed):
                await lender.model(SLICE)
            with pytest.raises(RequestError, match="named by their content"):
                await lender.of(None, token()).load("resnet50", {FILE: CNN})

    run(scene())


def test_a_client_that_hangs_up_while_loading_pays_for_it() -> None:
    async def scene() -> None:
        async with lending() as lender:
            client = lender.of(None, token())
            task = asyncio.create_task(put(client, CNN))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            for _ in range(200):
                if client.find(content_name(CNN)) is not None:
                    break
                await asyncio.sleep(0.05)
            (holder,) = lender.state(None).holders
            assert (holder.programs, holder.held_bytes) == (1, MIB)

    run(scene())


def test_a_lease_given_back_while_its_program_is_loaded() -> None:
    async def scene() -> None:
        async with lending() as lender:
            client = lender.of(None, token())
            task = asyncio.create_task(put(client, CNN))
            await asyncio.sleep(0.005)
            await client.unload(SLICE)
            with pytest.raises(ModelNotFound, match="ended while"):
                await task
            assert lender.index() == [] and lender.state(None).holders == ()

    run(scene())


def test_a_flood_of_uploads_waits_in_a_line_that_ends() -> None:
    async def scene() -> None:
        async with lending(64 * MIB) as lender:
            flood, other = lender.of(None, token()), lender.of(None, token())
            models = [CNN + _padding(number) for number in range(40)]
            tasks = [asyncio.create_task(put(flood, model)) for model in models]
            await asyncio.sleep(0)
            # Another client's upload does not wait for the whole line.
            await put(other, CNN)
            assert not all(task.done() for task in tasks)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            refused = [one for one in results if isinstance(one, Overloaded)]
            assert len(refused) == 40 - 16
            assert sum(isinstance(one, str) for one in results) == 16
            assert max(holder.programs for holder in lender.state(None).holders) == 16

    run(scene())


def _padding(number: int) -> bytes:
    """Return bytes that make another file of the same model: its ``doc_string``, field 6."""
    text = f"number {number}".encode()
    return b"\x32" + bytes([len(text)]) + text


def test_calls_of_one_client_are_computed_so_many_at_a_time() -> None:
    async def scene() -> None:
        async with lending(concurrency=1, max_queue=4, turns=1) as lender:
            client = lender.of(None, token())
            name = await put(client, CNN)
            model = await client.model(name)
            assert lender.turns.try_enter(lender.leases[next(iter(lender.leases))].party)  # one is under way
            party = lender.leases[next(iter(lender.leases))].party
            assert model.infer_now(InferRequest(dict(IMAGE))) is None
            waiting = [asyncio.create_task(model.infer(InferRequest(dict(IMAGE)))) for _ in range(4)]
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await model.infer(InferRequest(dict(IMAGE)))
            with pytest.raises(Overloaded):
                await model.infer(InferRequest(dict(IMAGE), timeout_us=1000))
            lender.turns.leave(party)
            answers = await asyncio.gather(*waiting)
            assert len(answers) == 4
            assert lender.turns.running == 0

    run(scene())
