"""Batch sizes, stages and replicas at once: every copy on its own devices, every answer right, whatever is lost."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import accelrt
from accelrt.errors import CoresUnavailable, ExecutionError, OutOfDeviceMemory, SessionClosed
from accelrt.registry import REGISTRY
from accelrt.runtime.batching import RequestBatcher
from accelrt.runtime.ledger import LEDGER
from accelrt.runtime.pipeline import DEPTH
from accelrt.testing.fake import FakeBackend, FakeEngine, _FakeExecutable

MANY = 100_000


def chain_of(operators: str) -> onnx.ModelProto:
    """Operators in a row on rows of two numbers: ``*`` triples, ``+`` adds one."""
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in ("v0", "y")]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [], [value]) for name, value in (("*", 3.0), ("+", 1.0))]
    names = [*(f"v{number}" for number in range(len(operators))), "y"]
    nodes = [
        helper.make_node({"*": "Mul", "+": "Add"}[operator], [names[number], operator], [names[number + 1]])
        for number, operator in enumerate(operators)
    ]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], constants)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def numbers(*values: int) -> np.ndarray:
    return np.repeat(np.array(values, np.float32)[:, None], 2, axis=1)


def right(outputs: dict[str, Any], *values: int) -> bool:
    """Whether these are the answers of ``*+``."""
    return bool(np.array_equal(outputs["y"], 3 * numbers(*values) + 1))


def stage_threads() -> int:
    return sum(thread.name.startswith("accelrt-stage") for thread in threading.enumerate())


def settled(condition: Callable[[], bool]) -> bool:
    """Wait for what other threads are about to do."""
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        gc.collect()
        time.sleep(0.01)
    return condition()


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    names = (f"parts-fake{number}" for number in itertools.count())
    used: list[str] = []

    def make(**behaviour: Any) -> str:
        used.append(next(names))
        accelrt.register(FakeBackend.configured(used[-1], **behaviour))
        return used[-1]

    yield make
    for name in used:
        REGISTRY.unregister(name)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The devices that each program was given, in order."""
    given: list[tuple[int, ...]] = []
    load = FakeEngine.load

    def noted(self: FakeEngine, program: Any, devices: Any) -> Any:
        given.append(tuple(device.index for device in devices))
        return load(self, program, devices)

    monkeypatch.setattr(FakeEngine, "load", noted)
    return given


# Where they go


def test_each_stage_has_a_device_of_its_own(fake: Callable[..., str], loads: list[tuple[int, ...]]) -> None:
    name = fake(devices=5)
    artifact = accelrt.compile(chain_of("*+"), name, batch=(1, 4), cores=2)
    with accelrt.load(artifact, replicas=2) as session:
        stats = session.stats()
        assert [replica.devices for replica in stats.replicas] == [
            (f"{name}:0", f"{name}:1"),
            (f"{name}:2", f"{name}:3"),
        ]
        assert stats.workers == session.capacity == 2 * 2 * (1 + DEPTH)
        # Two stages for rows of 1, two for rows of 4, on the same devices; then the other copy.
        assert loads == [(0,), (1,), (0,), (1,), (2,), (3,), (2,), (3,)]
        assert all(right(outputs, *span) for span, outputs in _mapped(session, [(5,), (1, 2, 3), (7, 8, 9, 10, 11)]))
    with accelrt.load(artifact, devices=[f"{name}:3-4"]) as session:
        assert right(session.predict(numbers(6)), 6)
    assert loads[8:] == [(3,), (4,)] * 2


def test_a_stage_of_several_devices(fake: Callable[..., str], loads: list[tuple[int, ...]]) -> None:
    artifact = accelrt.compile(chain_of("*+"), fake(devices=8, cores=2), cores=2)
    with accelrt.load(artifact, devices="0-7") as session:
        assert loads == [(0, 1), (2, 3), (4, 5), (6, 7)]
        assert right(session.predict(numbers(6)), 6)


def test_a_stage_on_the_cpu_takes_no_device(fake: Callable[..., str], loads: list[tuple[int, ...]]) -> None:
    artifact = accelrt.compile(chain_of("*+"), fake(devices=2, operators={"Add"}), cores=2, fallback="allow")
    assert [(s.backend, s.stage) for s in artifact.manifest.segments] == [("cpu", 0), (artifact.manifest.target, 1)]
    with accelrt.load(artifact, replicas=2, fallback="error") as session:
        assert loads == [(0,), (1,)]
        assert all(right(outputs, *span) for span, outputs in _mapped(session, [(number,) for number in range(30)]))


@pytest.mark.parametrize("exclusive", [False, True])
def test_all_stages_share_the_only_device(
    exclusive: bool, fake: Callable[..., str], loads: list[tuple[int, ...]]
) -> None:
    artifact = accelrt.compile(chain_of("*+"), fake(exclusive=exclusive), cores=2)
    with accelrt.load(artifact, fallback="error") as session:
        assert loads == [(0,), (0,)]
        assert right(session.predict(numbers(6)), 6)


def test_too_few_devices_are_an_error_or_the_cpu(fake: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    name = fake(devices=3, exclusive=True)
    artifact = accelrt.compile(chain_of("*+*+"), name, cores=4)
    with pytest.raises(CoresUnavailable, match="1 replica of 4 devices asked for"):
        accelrt.load(artifact, fallback="error")
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(artifact) as session:
        assert session.stats().engines == ("cpu",) * 4
        np.testing.assert_array_equal(session.predict(numbers(2))["y"], numbers(22))
    assert "1 replica of 4 devices" in caplog.text
    two = accelrt.compile(chain_of("*+"), name, cores=2)
    with pytest.raises(CoresUnavailable, match=r"2 replicas of 2 devices asked for .* room for 1"):
        accelrt.load(two, replicas=2)
    with accelrt.load(two), pytest.raises(CoresUnavailable, match="Held"):
        accelrt.load(two, fallback="error")


def test_replicas_of_the_cpu_share_it_stages_and_all() -> None:
    artifact = accelrt.compile(chain_of("*+"), batch=(1, 3), cores=2)
    with accelrt.load(artifact, replicas=2) as session:
        assert all(right(o, *span) for span, o in _mapped(session, [(n, n + 1) for n in range(40)]))
        stats = session.stats()
        assert sum(replica.calls for replica in stats.replicas) == stats.calls == 40
        assert [replica.devices for replica in stats.replicas] == [("cpu:0",)] * 2


# Right answers


@given(
    batch=st.sampled_from([None, 2, (1, 4)]),
    cores=st.sampled_from([None, 2]),
    replicas=st.integers(1, 3),
    spans=st.lists(st.tuples(st.integers(0, 10**5), st.integers(1, 9)), min_size=1, max_size=30),
)
@settings(max_examples=30, deadline=None)
def test_any_copies_of_any_parts_answer_as_the_model_does(
    batch: Any, cores: int | None, replicas: int, spans: list[tuple[int, int]]
) -> None:
    name = "parts-any"
    accelrt.register(FakeBackend.configured(name, devices=6))
    try:
        artifact = accelrt.compile(chain_of("*+"), name, batch=batch, cores=cores)
        with accelrt.load(artifact, replicas=replicas) as session:
            wanted = [tuple(range(start, start + count)) for start, count in spans]
            assert all(right(outputs, *span) for span, outputs in _mapped(session, wanted))
            stats = session.stats()
            assert (stats.calls, stats.errors, stats.fallbacks) == (len(spans), 0, 0)
            assert sum(replica.calls for replica in stats.replicas) == len(spans)
            padding = sum(-count % 2 for _, count in spans) if batch == 2 else 0
            assert stats.padding_rows == padding
    finally:
        REGISTRY.unregister(name)
    assert not any(LEDGER.holders(name).values())


def test_copies_work_at_the_same_time(fake: Callable[..., str]) -> None:
    """Two copies of two stages of 10 ms each: 60 calls take 0.3 s, with one copy they would take 0.6 s."""
    artifact = accelrt.compile(chain_of("*+"), fake(devices=4, latency_s=0.01), cores=2)
    with accelrt.load(artifact, replicas=2) as session:
        start = time.perf_counter()
        assert all(right(outputs, *span) for span, outputs in _mapped(session, [(n,) for n in range(60)]))
        assert time.perf_counter() - start < 0.55
        assert all(replica.calls >= 20 for replica in session.stats().replicas)


def test_one_bad_call_fails_alone(fake: Callable[..., str]) -> None:
    def fails(operators: tuple[str, ...], call: int) -> bool:
        return operators == ("Add",) and call == 7

    artifact = accelrt.compile(chain_of("*+"), fake(devices=4, fails_to_run=fails), cores=2)
    with accelrt.load(artifact, replicas=2, fallback="error") as session:
        futures = [session.submit(numbers(number)) for number in range(60)]
        failed = [number for number, future in enumerate(futures) if future.exception(10) is not None]
        # Each copy counts its own calls.
        assert 1 <= len(failed) <= 2
        assert all(isinstance(futures[number].exception(), ExecutionError) for number in failed)
        assert all(right(futures[n].result(), n) for n in range(60) if n not in failed)
        stats = session.stats()
        assert stats.errors == len(failed) == sum(replica.errors for replica in stats.replicas)
        assert not any(replica.lost for replica in stats.replicas)


def test_requests_are_gathered_before_several_pipelines(fake: Callable[..., str]) -> None:
    artifact = accelrt.compile(chain_of("*+"), fake(devices=4, latency_s=0.001), batch=(1, 8), cores=2)
    session = accelrt.load(artifact, replicas=2)
    batcher = RequestBatcher(session, max_batch_size=8, max_queue_delay_us=2000, timeout=30)
    with ThreadPoolExecutor(16) as clients:
        answers = clients.map(lambda number: right(batcher.run({"v0": numbers(number)}), number), range(400))
        assert all(answers)
    assert batcher.stats().runs < 400
    assert all(replica.calls for replica in session.stats().replicas)
    batcher.close()
    with pytest.raises(SessionClosed):
        session.predict(numbers(1))


# Faults


@pytest.mark.parametrize("batch", [None, (1, 3)])
def test_a_stage_that_loses_its_device_takes_its_copy_along(
    batch: Any, fake: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    name = fake(devices=4, latency_s=0.001, lost_after={1: 10})
    artifact = accelrt.compile(chain_of("*+"), name, batch=batch, cores=2)
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(artifact, replicas=2) as session:
        spans = [(n,) if n % 2 else (n, n + 1, n + 2) for n in range(300)]
        assert all(right(outputs, *span) for span, outputs in _mapped(session, spans))
        stats = session.stats()
        assert [replica.lost for replica in stats.replicas] == [True, False]
        assert stats.moved >= 1 and (stats.errors, stats.fallbacks) == (0, 0)
        assert sum(replica.calls for replica in stats.replicas) == 300
        assert stats.replicas[0].calls <= 2 * 10  # its stage computes ten runs for each batch size
    assert caplog.text.count("its calls go to the other 1 of 2 replicas") == 1
    assert f"{name}:0, {name}:1 is lost" in caplog.text
    assert settled(lambda: stage_threads() == 0)


def test_the_last_copy_keeps_the_stages_that_it_has(fake: Callable[..., str]) -> None:
    name = fake(devices=4, lost_after={1: 10, 2: 20})
    with accelrt.load(accelrt.compile(chain_of("*+"), name, cores=2), replicas=2, fallback="allow") as session:
        assert all(right(outputs, *span) for span, outputs in _mapped(session, [(n,) for n in range(200)]))
        stats = session.stats()
        assert sorted(replica.lost for replica in stats.replicas) == [False, True]
        (left,) = (replica for replica in stats.replicas if not replica.lost)
        assert sorted(left.engines) == ["cpu", f"{name}/fake"]
        assert stats.errors == 0 and stats.fallbacks > 100


def test_a_copy_that_cannot_be_loaded_leaves_nothing(fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = fake(devices=4, exclusive=True)
    artifact = accelrt.compile(chain_of("*+"), name, cores=2)
    count, load, closed = itertools.count(), FakeEngine.load, itertools.count()
    close = _FakeExecutable.close

    def full(self: FakeEngine, program: Any, devices: Any) -> Any:
        if next(count) % 4 == 3:
            raise OutOfDeviceMemory("full")
        return load(self, program, devices)

    def noted(self: _FakeExecutable) -> None:
        next(closed)
        close(self)

    monkeypatch.setattr(FakeEngine, "load", full)
    monkeypatch.setattr(_FakeExecutable, "close", noted)
    before = stage_threads()
    with pytest.raises(OutOfDeviceMemory):
        accelrt.load(artifact, replicas=2, fallback="error")
    assert stage_threads() == before and not any(LEDGER.holders(name).values())
    assert next(closed) == 3
    with accelrt.load(artifact, replicas=2, fallback="allow") as session:  # the second is left out
        assert right(session.predict(numbers(3)), 3)
        assert len(session.stats().replicas) == 1
        assert stage_threads() == before + 2
    assert stage_threads() == before


def test_a_session_that_is_dropped_ends_its_threads_and_frees_its_devices(fake: Callable[..., str]) -> None:
    name = fake(devices=4, exclusive=True)
    artifact = accelrt.compile(chain_of("*+"), name, batch=(1, 2), cores=2)
    before = stage_threads()
    session = accelrt.load(artifact, replicas=2)
    assert right(session.submit(numbers(3)).result(10), 3)
    assert stage_threads() == before + 8
    del session
    assert settled(lambda: stage_threads() == before)
    with accelrt.load(artifact, replicas=2, fallback="error") as session:
        assert right(session.predict(numbers(3)), 3)


def test_closing_while_calls_are_in_the_stages(fake: Callable[..., str]) -> None:
    artifact = accelrt.compile(chain_of("*+"), fake(devices=4, latency_s=0.002), batch=(1, 2), cores=2)
    before = stage_threads()
    for _ in range(5):
        session = accelrt.load(artifact, replicas=2)
        futures = [session.submit(numbers(number)) for number in range(100)]
        session.close()
        assert all(future.done() for future in futures)
        ended = [future.cancelled() or future.exception() for future in futures]
        assert all(end in (None, True) or isinstance(end, SessionClosed | CancelledError) for end in ended)
        assert all(
            right(future.result(), n) for n, (future, end) in enumerate(zip(futures, ended, strict=True)) if not end
        )
        assert stage_threads() == before
        assert session.stats().engines and "closed" in repr(session)


@pytest.mark.suite
@pytest.mark.parametrize("lost", [None, {1: 5000}])
def test_no_request_of_many_is_lost_doubled_or_swapped(lost: Any, fake: Callable[..., str]) -> None:
    name = fake(devices=6, lost_after=lost)
    artifact = accelrt.compile(chain_of("*+"), name, batch=(1, 2), cores=2)
    with accelrt.load(artifact, replicas=3, fallback="allow") as session:
        found = session.map((numbers(n % 1000, n % 77),) for n in range(MANY))
        assert all(right(outputs, n % 1000, n % 77) for n, outputs in enumerate(found))
        stats = session.stats()
        assert (stats.calls, stats.errors) == (MANY, 0)
        assert sum(replica.calls for replica in stats.replicas) == MANY
        assert sum(replica.lost for replica in stats.replicas) == (lost is not None)


def _mapped(session: Any, spans: list[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    return zip(spans, session.map((numbers(*span),) for span in spans), strict=True)
