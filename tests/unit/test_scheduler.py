"""Replicas on devices: every answer right and in order, whoever computes it, whoever is slow, whatever is lost."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import accelrt
from accelrt.errors import (
    CoresUnavailable,
    CorruptArtifact,
    ExecutionError,
    OptionError,
    SessionClosed,
    TargetError,
)
from accelrt.registry import REGISTRY
from accelrt.runtime.ledger import LEDGER
from accelrt.runtime.session import Session
from accelrt.testing.fake import FakeBackend, FakeEngine, _FakeExecutable


def affine() -> onnx.ModelProto:
    """y = 3 x + 1, in two operators."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("x", "y")]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("a", 3.0), ("b", 1.0))]
    nodes = [helper.make_node("Mul", ["x", "a"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])]
    graph = helper.make_graph(nodes, "affine", ports[:1], ports[1:], constants)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def numbered(number: int, rows: int = 1) -> np.ndarray:
    """An input of its own for every number that a test uses: float32 counts exactly to 16 million."""
    return np.full((rows, 2), number, np.float32)


def answered(outputs: dict[str, Any], number: int, rows: int = 1) -> bool:
    return bool(outputs["y"].shape == (rows, 2) and (outputs["y"] == 3 * number + 1).all())


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    numbers = itertools.count()
    used: list[str] = []

    def make(**behaviour: Any) -> str:
        used.append(f"sched-fake{next(numbers)}")
        accelrt.register(FakeBackend.configured(used[-1], **behaviour))
        return used[-1]

    yield make
    for name in used:
        REGISTRY.unregister(name)


def devices_of(session: Session) -> list[tuple[int, ...]]:
    return [tuple(int(name.partition(":")[2]) for name in r.devices) for r in session.stats().replicas]


# Where replicas go


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ({}, [(0,)]),
        ({"replicas": 3}, [(0,), (1,), (2,)]),
        ({"replicas": 6}, [(0,), (1,), (2,), (3,), (0,), (1,)]),
        ({"devices": "0-3"}, [(0,), (1,), (2,), (3,)]),
        ({"devices": "2,1"}, [(2,), (1,)]),
        ({"devices": 3}, [(3,)]),
        ({"devices": [1, 3], "replicas": 1}, [(1,)]),
        ({"devices": ["0-1", "2-3"]}, [(0,), (2,)]),
    ],
)
def test_replicas_are_where_they_were_asked_for(
    arguments: dict[str, Any], places: list[tuple[int, ...]], fake: Callable[..., str]
) -> None:
    with accelrt.load(affine(), backend=fake(devices=4), **arguments) as session:
        assert devices_of(session) == places
        assert session.stats().workers == len(places)


def test_each_segment_is_given_the_devices_it_needs(fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, ...]] = []
    needs, load = itertools.cycle((1, 3)), FakeEngine.load

    def noted(self: FakeEngine, program: Any, devices: Any) -> Any:
        given.append(tuple(device.index for device in devices))
        return load(self, program, devices)

    model = affine()
    model.graph.node[1].op_type = "Sub"
    model.graph.node.append(helper.make_node("Mul", ["s", "a"], ["y"]))
    model.graph.node[1].output[0] = "s"
    artifact = accelrt.compile(model, fake(devices=7, operators={"Mul"}), fallback="allow", cache=False)
    monkeypatch.setattr(FakeEngine, "load", noted)
    monkeypatch.setattr(FakeEngine, "devices_needed", lambda *_: next(needs))
    with accelrt.load(artifact, devices="0-6") as session:
        assert devices_of(session) == [(0, 1, 2), (3, 4, 5)]
        np.testing.assert_array_equal(session.predict(numbered(2))["y"], numbered(15))
    assert given == [(0,), (0, 1, 2), (3,), (3, 4, 5)]


def test_devices_may_name_their_backend(fake: Callable[..., str]) -> None:
    name = fake(devices=4, cores=2)
    with accelrt.load(affine(), backend=name, devices=f"{name}:0-3") as session:
        assert devices_of(session) == [(0, 1), (2, 3)]
    with accelrt.load(affine(), backend=f"{name}:2-3") as session:
        assert devices_of(session) == [(2, 3)]
    with accelrt.load(affine(), devices=f"{name}:1-2") as session:
        assert session.stats().engines == (f"{name}/fake",)
        assert devices_of(session) == [(1, 2)]
    with pytest.raises(TargetError, match="'cpu'"):
        accelrt.load(affine(), backend=name, devices="cpu:0")
    for wrong in ("a b:0", ["0-1", "1-2"], ["x:0", "y:1"], "", [], [True], ["0", 1], ":0-"):
        with pytest.raises(TargetError):
            accelrt.load(affine(), backend=name, devices=wrong)


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, "2", 10**9])
def test_numbers_out_of_range_are_refused(wrong: Any) -> None:
    for name in ("replicas", "workers"):
        with pytest.raises(OptionError, match=name):
            accelrt.load(affine(), **{name: wrong})


def test_sessions_take_the_next_free_group_and_closing_frees_it(
    fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURONCORE_GROUP_SIZES", "2,1x1,1")
    monkeypatch.setenv("NEURON_RT_VISIBLE_CORES", "2-6")
    name = fake(devices=8, exclusive=True, neuron_variables=True)
    artifact = accelrt.compile(affine(), name)
    sessions = [accelrt.load(artifact, fallback="error") for _ in range(3)]
    assert [devices_of(session) for session in sessions] == [[(2,)], [(4,)], [(5,)]]
    assert set(LEDGER.holders(name)) == {2, 3, 4, 5}
    with pytest.raises(CoresUnavailable, match=rf"{name}:3 by session \d+ \({name}\)"):
        accelrt.load(artifact, fallback="error")
    sessions[1].close()
    with accelrt.load(artifact, fallback="error") as again:
        assert devices_of(again) == [(4,)]
        assert answered(again.predict(numbered(5)), 5)
    for session in sessions:
        session.close()
    assert LEDGER.holders(name) == {}


def test_a_named_device_that_another_session_holds(fake: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    name = fake(devices=2, exclusive=True)
    artifact = accelrt.compile(affine(), name)
    with accelrt.load(artifact, devices=1) as first, caplog.at_level(logging.WARNING, "accelrt"):
        for arguments in ({"devices": "0-1"}, {"replicas": 2}, {"devices": "0-2"}):
            with pytest.raises(CoresUnavailable):
                accelrt.load(artifact, **arguments)
        with accelrt.load(artifact) as second:
            assert devices_of(second) == [(0,)]
            assert not caplog.records
            # Nothing was asked for by number, so the policy says what happens: the CPU answers.
            with accelrt.load(artifact) as third:
                assert third.stats().engines == ("cpu",)
                assert answered(third.predict(numbered(4)), 4)
                assert "Held:" in caplog.text
        assert answered(first.predict(numbered(2)), 2)
    with accelrt.load(artifact, devices="0-1") as both:
        assert devices_of(both) == [(0,), (1,)]


def test_a_session_that_is_dropped_frees_its_devices(fake: Callable[..., str]) -> None:
    artifact = accelrt.compile(affine(), fake(devices=1, exclusive=True))
    dropped = accelrt.load(artifact, fallback="error")
    assert answered(dropped.predict(numbered(1)), 1)
    assert answered(dropped.submit(numbered(2)).result(), 2)
    assert len(list(dropped.map(map(numbered, range(5))))) == 5
    del dropped
    with accelrt.load(artifact, fallback="error") as session:
        assert devices_of(session) == [(0,)]


def test_a_load_that_fails_holds_nothing(fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = fake(devices=3, exclusive=True)
    artifact = accelrt.compile(affine(), name)
    opened, load = [], FakeEngine.load

    def fails_on_the_third(self: FakeEngine, program: Any, devices: Any) -> Any:
        if len(opened) == 2:
            raise RuntimeError("no more")
        opened.append(load(self, program, devices))
        return opened[-1]

    closed: list[object] = []
    monkeypatch.setattr(FakeEngine, "load", fails_on_the_third)
    monkeypatch.setattr(_FakeExecutable, "close", lambda self: closed.append(self))
    with pytest.raises(accelrt.errors.IncompatibleProgram, match="no more"):
        accelrt.load(artifact, devices="0-2", fallback="error")
    assert sorted(map(id, closed)) == sorted(map(id, opened))
    assert LEDGER.holders(name) == {}


def test_a_replica_that_does_not_fit_is_left_out(
    fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = accelrt.compile(affine(), fake(devices=3))
    load = FakeEngine.load

    def full(self: FakeEngine, program: Any, devices: Any) -> Any:
        if devices[0].index == 1:
            raise accelrt.errors.OutOfDeviceMemory("device 1 is full")
        return load(self, program, devices)

    monkeypatch.setattr(FakeEngine, "load", full)
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(artifact, devices="0-2") as session:
        assert devices_of(session) == [(0,), (2,)]
        assert [record.message for record in caplog.records] == ["2 of 3 replicas could be loaded: device 1 is full"]
    with pytest.raises(accelrt.errors.OutOfDeviceMemory):
        accelrt.load(artifact, devices="0-2", fallback="error")


def test_workers_come_from_the_call_else_the_artifact_else_the_engine(fake: Callable[..., str]) -> None:
    artifact = accelrt.compile(affine(), fake(devices=2, parallelism=3), cache=False)
    with accelrt.load(artifact, devices="0-1") as session:
        assert session.stats().workers == 6
    manifest = artifact.manifest.options
    manifest["workers"] = 4  # type: ignore[index]
    with accelrt.load(artifact, devices="0-1") as session:
        assert session.stats().workers == 4
    with accelrt.load(artifact, devices="0-1", workers=1) as session:
        assert session.stats().workers == 1
        assert list(map(answered, session.map(map(numbered, range(9))), range(9))) == [True] * 9
    for wrong in ("4", 0, 10**9, True, [2]):
        manifest["workers"] = wrong  # type: ignore[index]
        with pytest.raises(CorruptArtifact, match="workers"):
            accelrt.load(artifact)


def test_replicas_of_the_cpu_share_it() -> None:
    with accelrt.load(affine(), replicas=3, options={"threads": 1}) as session:
        assert devices_of(session) == [(0,)] * 3
        assert list(map(answered, session.map(map(numbered, range(50))), range(50))) == [True] * 50
        stats = session.stats()
        assert sum(replica.calls for replica in stats.replicas) == 50
        assert all(replica.calls and replica.busy_s > 0 for replica in stats.replicas)
        assert "3 replicas" in repr(session)
    assert [replica.calls for replica in session.stats().replicas] == [r.calls for r in stats.replicas]


# Answers


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), max_size=40),
    devices=st.integers(1, 6),
    cores=st.integers(1, 3),
    replicas=st.none() | st.integers(1, 5),
    workers=st.none() | st.integers(1, 9),
    concurrent=st.booleans(),
    split=st.booleans(),
    grouped=st.booleans(),
)
def test_any_replicas_and_groups_answer_as_one_thread_does(
    sizes: list[int],
    devices: int,
    cores: int,
    replicas: int | None,
    workers: int | None,
    concurrent: bool,
    split: bool,
    grouped: bool,
) -> None:
    cores = min(cores, devices)
    generator = random.Random(7)
    name = "sched-property"
    accelrt.register(
        FakeBackend.configured(
            name,
            devices=devices,
            cores=cores,
            concurrent=concurrent,
            operators={"Mul"} if split else None,
            latency_s=lambda device: generator.random() * 3e-4,
        )
    )
    try:
        inputs = [np.random.default_rng(n).standard_normal((rows, 2), np.float32) for n, rows in enumerate(sizes)]
        artifact = accelrt.compile(affine(), name, fallback="allow")
        with accelrt.load(affine(), backend="cpu") as single:
            wanted = [single.predict(x)["y"] for x in inputs]
        arguments: dict[str, Any] = {"devices": f"0-{devices - 1}", "replicas": replicas, "workers": workers}
        if grouped:
            arguments["devices"] = [f"{n * cores}-{n * cores + cores - 1}" for n in range(devices // cores)]
        with accelrt.load(artifact, fallback="error", **arguments) as session:
            for got in (
                [outputs["y"] for outputs in session.map(inputs)],
                [future.result()["y"] for future in [session.submit(x) for x in inputs]],
            ):
                assert len(got) == len(wanted)
                for one, other in zip(got, wanted, strict=True):
                    np.testing.assert_array_equal(one, other)
            stats = session.stats()
        assert len(stats.replicas) == (replicas or devices // cores)
        assert sum(replica.calls for replica in stats.replicas) == 2 * len(inputs)
        assert (stats.errors, stats.fallbacks, stats.moved) == (0, 0, 0)
    finally:
        REGISTRY.unregister(name)


def storm(session: Session, requests: int) -> None:
    """Send requests from eight threads, each way of asking, and hold every answer against its request."""
    numbers, tally, lock = itertools.count(), Counter[int](), threading.Lock()

    def ask(kind: int) -> None:
        mine: list[int] = []
        take = iter(lambda: next(numbers), None)
        own = itertools.takewhile(lambda number: number is not None and number < requests, take)
        if kind == 0:
            for number in own:
                assert answered(session.predict(numbered(number, 1 + number % 3)), number, 1 + number % 3)
                mine.append(number)
        elif kind == 1:
            while batch := list(itertools.islice(own, 64)):
                futures = [session.submit(numbered(number)) for number in batch]
                for number, future in zip(batch, futures, strict=True):
                    assert answered(future.result(), number)
                mine += batch
        else:
            sent: list[int] = []
            items = (numbered(sent[-1]) for number in own if not sent.append(number))  # type: ignore[func-returns-value]
            for place, outputs in enumerate(session.map(items)):
                assert answered(outputs, sent[place])
                mine.append(sent[place])
        with lock:
            tally.update(mine)

    with ThreadPoolExecutor(8) as threads:
        for future in [threads.submit(ask, worker % 3) for worker in range(8)]:
            future.result()
    assert len(tally) == requests
    assert set(tally.values()) == {1}
    assert session.stats().calls == requests
    assert session.stats().errors == 0


@pytest.mark.parametrize(
    ("requests", "longest_s"), [(3_000, 5e-4), pytest.param(100_000, 5e-4, marks=pytest.mark.suite)]
)
@pytest.mark.parametrize("concurrent", [True, False])
def test_no_request_is_lost_doubled_or_swapped(
    requests: int, longest_s: float, concurrent: bool, fake: Callable[..., str]
) -> None:
    generator = random.Random(3)
    name = fake(
        devices=4, concurrent=concurrent, parallelism=2, latency_s=lambda device: generator.random() * longest_s
    )
    with accelrt.load(affine(), backend=name, devices="0-3") as session:
        storm(session, requests)
        stats = session.stats()
    assert sum(replica.calls for replica in stats.replicas) == requests
    assert all(replica.calls > requests / 20 for replica in stats.replicas)


def test_each_replica_of_a_serial_engine_gets_one_call_at_a_time(
    fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, crowds = _FakeExecutable.run, []
    inside: Counter[int] = Counter()
    lock = threading.Lock()

    def counted(self: _FakeExecutable, inputs: Any) -> Any:
        with lock:
            inside[id(self)] += 1
            crowds.append((inside[id(self)], sum(inside.values())))
        try:
            return run(self, inputs)
        finally:
            with lock:
                inside[id(self)] -= 1

    monkeypatch.setattr(_FakeExecutable, "run", counted)
    name = fake(devices=3, concurrent=False, parallelism=2, latency_s=0.001)
    with accelrt.load(affine(), backend=name, devices="0-2") as session, ThreadPoolExecutor(8) as threads:
        list(threads.map(session.predict, map(numbered, range(100))))
    assert max(own for own, _ in crowds) == 1
    assert max(together for _, together in crowds) == 3


def test_a_slow_device_takes_less(fake: Callable[..., str]) -> None:
    name = fake(devices=3, latency_s=lambda device: 0.03 if device == 0 else 0.002)
    with accelrt.load(affine(), backend=name, devices="0-2") as session:
        for number, outputs in enumerate(session.map(map(numbered, range(300)))):
            assert answered(outputs, number)
        slow, *fast = (replica.calls for replica in session.stats().replicas)
    assert slow < 50
    assert min(fast) > 100


def test_predict_uses_the_idle_replica(fake: Callable[..., str]) -> None:
    name = fake(devices=2, latency_s=0.1)
    with accelrt.load(affine(), backend=name, devices="0-1") as session, ThreadPoolExecutor(2) as threads:
        start = time.perf_counter()
        list(threads.map(session.predict, [numbered(1), numbered(2)]))
        assert time.perf_counter() - start < 0.19
        assert [replica.calls for replica in session.stats().replicas] == [1, 1]


# Ends


def test_an_endless_iterator_stops_cleanly(fake: Callable[..., str]) -> None:
    ended = threading.Event()

    def endless() -> Iterator[np.ndarray]:
        try:
            for number in itertools.count():
                yield numbered(number)
        finally:
            ended.set()

    name = fake(devices=3, latency_s=0.001)
    with accelrt.load(affine(), backend=name, devices="0-2") as session:
        results = session.map(endless())
        for number, outputs in enumerate(itertools.islice(results, 100)):
            assert answered(outputs, number)
        results.close()
        del results
        assert ended.wait(5)
        calls = session.stats().calls
        assert calls < 200
    assert session.stats().calls < calls + 10


def test_closing_while_calls_are_in_flight(fake: Callable[..., str]) -> None:
    for concurrent in (True, False):
        name = fake(devices=3, latency_s=0.01, concurrent=concurrent)
        session = accelrt.load(affine(), backend=name, devices="0-2")
        outcomes: list[str] = []
        start = threading.Barrier(9)

        def ask(
            kind: int,
            session: Session = session,
            start: threading.Barrier = start,
            outcomes: list[str] = outcomes,
        ) -> None:
            start.wait()
            try:
                if kind == 0:
                    for number, outputs in enumerate(session.map(map(numbered, itertools.count()))):
                        assert answered(outputs, number)
                for number in itertools.count():
                    if kind == 1:
                        assert answered(session.predict(numbered(number)), number)
                    else:
                        assert answered(session.submit(numbered(number)).result(), number)
            except (SessionClosed, CancelledError) as error:
                outcomes.append(type(error).__name__)

        threads = [threading.Thread(target=ask, args=(n % 3,)) for n in range(8)]
        for thread in threads:
            thread.start()
        start.wait()
        time.sleep(0.05)
        session.close()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert len(outcomes) == 8, outcomes
        assert LEDGER.holders(name) == {}


@pytest.mark.suite
def test_a_million_inputs_in_bounded_memory() -> None:
    """Resident memory stays flat while a million inputs of 8 KB pass: kept, they would be 8 GB."""

    def resident() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmRSS")

    shape = (1000, 2)
    inputs = (np.full(shape, number % 1000, np.float32) for number in range(1_000_000))
    with accelrt.load(affine(), replicas=2, workers=2, options={"threads": 1}) as session:
        early = most = 0
        for number, outputs in enumerate(session.map(inputs)):
            assert outputs["y"][0, 0] == 3 * (number % 1000) + 1
            if number == 20_000:
                early = resident()
            elif number > 20_000 and number % 20_000 == 0:
                most = max(most, resident())
        assert session.stats().calls == 1_000_000
    assert most < early + (32 << 20)


# Failures


@pytest.mark.parametrize("way", ["predict", "submit", "map"])
@pytest.mark.parametrize("split", [False, True])
def test_one_lost_device_under_load(
    way: str, split: bool, fake: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = fake(devices=3, latency_s=0.001, parallelism=2, lost_after={1: 20}, operators={"Mul"} if split else None)
    artifact = accelrt.compile(affine(), name, fallback="allow")
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(artifact, devices="0-2") as session:
        if way == "map":
            got = list(session.map(map(numbered, range(400))))
        elif way == "submit":
            got = [future.result() for future in [session.submit(numbered(number)) for number in range(400)]]
        else:
            with ThreadPoolExecutor(8) as threads:
                got = list(threads.map(session.predict, map(numbered, range(400))))
        assert [answered(outputs, number) for number, outputs in enumerate(got)] == [True] * 400
        stats = session.stats()
    assert [replica.lost for replica in stats.replicas] == [False, True, False]
    assert (stats.calls, stats.errors, stats.fallbacks) == (400, 0, 0)
    assert 1 <= stats.moved <= 2  # as many calls as were on the device when it went
    assert sum(replica.calls for replica in stats.replicas) == 400
    said = [record.message for record in caplog.records]
    assert len(said) == 1
    assert f"{name}:1 is lost; its calls go to the other 2 of 3 replicas" in said[0]


def test_all_devices_lost_and_the_cpu_answers(fake: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    name = fake(devices=3, lost_after={0: 10, 1: 20, 2: 30}, latency_s=0.0005)
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(affine(), backend=name, devices="0-2") as session:
        got = list(session.map(map(numbered, range(300))))
        assert [answered(outputs, number) for number, outputs in enumerate(got)] == [True] * 300
        stats = session.stats()
    assert [replica.lost for replica in stats.replicas].count(True) == 2
    assert stats.engines == ("cpu",)
    assert stats.fallbacks == 300 - 60
    assert stats.errors == 0
    messages = [record.message for record in caplog.records]
    assert len(messages) == 3
    assert sum("the CPU answered instead" in message for message in messages) == 1


def test_a_lost_device_is_silent_or_an_error_if_so_asked(
    fake: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    artifact = accelrt.compile(affine(), fake(devices=2, lost_after={0: 3}))
    with (
        caplog.at_level(logging.WARNING, "accelrt"),
        accelrt.load(artifact, devices="0-1", fallback="allow") as session,
    ):
        assert all(answered(session.predict(numbered(n)), n) for n in range(20))
        assert not caplog.records
    with accelrt.load(artifact, devices="0-1", fallback="error") as session:
        failed = 0
        for number in range(20):
            try:
                assert answered(session.predict(numbered(number)), number)
            except ExecutionError as error:
                failed += 1
                assert "is gone" in str(error)
        # The call that met it fails; the device is not asked again.
        assert failed == 1
        assert [replica.lost for replica in session.stats().replicas] == [True, False]


def test_other_failures_retire_nobody(fake: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    name = fake(devices=2, fails_to_run=lambda operators, call: call % 5 == 4)
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(affine(), backend=name, devices="0-1") as session:
        got = list(session.map(map(numbered, range(100))))
        assert [answered(outputs, number) for number, outputs in enumerate(got)] == [True] * 100
        stats = session.stats()
    assert not any(replica.lost for replica in stats.replicas)
    assert stats.fallbacks == sum(replica.errors for replica in stats.replicas) > 10
    assert len(caplog.records) == 1


def test_many_threads_lose_devices_together(fake: Callable[..., str]) -> None:
    for _ in range(5):
        name = fake(devices=4, parallelism=4, lost_after={0: 5, 1: 5, 2: 5, 3: 40})
        with (
            accelrt.load(affine(), backend=name, devices="0-3", fallback="allow") as session,
            ThreadPoolExecutor(16) as threads,
        ):
            futures: list[Future[Any]] = [threads.submit(session.predict, numbered(n)) for n in range(200)]
            assert all(answered(future.result(20), n) for n, future in enumerate(futures))
            stats = session.stats()
        assert stats.errors == 0
        assert sum(replica.lost for replica in stats.replicas) == 3


def test_trace_says_that_a_device_was_lost_and_then_goes_around_it(fake: Callable[..., str]) -> None:
    name = fake(devices=2, lost_after={0: 0}, operators={"Mul"})
    artifact = accelrt.compile(affine(), name, fallback="allow")
    with accelrt.load(artifact, devices="0-1", fallback="allow") as session:
        for number in range(4):
            assert answered(session.predict(numbered(number)), number)
        (_, _), (_, last) = session.trace(numbered(6))
        assert answered(last, 6)
    with accelrt.load(artifact, devices="0-1", fallback="allow") as session:
        with pytest.raises(ExecutionError, match="in the middle of a trace"):
            list(session.trace(numbered(6)))
        (_, _), (_, last) = session.trace(numbered(6))
        assert answered(last, 6)
