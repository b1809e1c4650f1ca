"""Tensors that stay on the device: the answers are those of the host, the bytes those foretold, and losses are borne."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import accelrt
from accelrt.artifact.artifact import Artifact
from accelrt.artifact.build import BuildRequest, build
from accelrt.errors import DeviceLost, ExecutionError, InputError, OptionError, OutOfDeviceMemory
from accelrt.graph.load import load_graph
from accelrt.graph.types import Port, Signature, TensorType
from accelrt.options import resolve
from accelrt.registry import CPU, REGISTRY, Candidate, find_engine
from accelrt.runtime.batching import RequestBatcher
from accelrt.runtime.dlpack import layout_of
from accelrt.runtime.inputs import Binder
from accelrt.runtime.residency import DeviceFeeds
from accelrt.testing.fake import FAKE_KIND, FakeBackend, FakeTensor

SHAPE = (3, 4)
BYTES = 3 * 4 * 4
FIRST, SECOND = ("Add", "Relu"), ("Mul", "Neg")
BINARY, UNARY = ("Add", "Mul", "Sub"), ("Relu", "Neg", "Abs")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def fake() -> Iterator[Callable[..., str]]:
    numbers = itertools.count()
    used: list[str] = []

    def make(**behaviour: Any) -> str:
        used.append(f"resident-fake{next(numbers)}")
        behaviour = {"operators": FIRST, "others": {"second": SECOND}, "device_tensors": True, **behaviour}
        accelrt.register(FakeBackend.configured(used[-1], **behaviour))
        return used[-1]

    yield make
    for name in used:
        REGISTRY.unregister(name)


def model(nodes: Sequence[tuple[str, Sequence[str], str]], outputs: Sequence[str], shape: Any = SHAPE) -> Any:
    """Build a model of inputs ``x`` and ``w`` from nodes given as operator, inputs and output."""
    protos = [helper.make_node(kind, list(reads), [gives], name=f"{kind}-{gives}") for kind, reads, gives in nodes]
    read = {name for _, reads, _ in nodes for name in reads}
    ins = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "w") if n in read]
    outs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in outputs]
    graph = helper.make_graph(protos, "made", ins, outs)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def cut(source: onnx.ModelProto, name: str) -> Artifact:
    """Compile a model over both engines of a fake backend, and the CPU for the rest."""
    backend, cpu = REGISTRY.backend(name), REGISTRY.backend(CPU)
    candidates = tuple(Candidate(backend, engine) for engine in backend.engines)
    candidates += (Candidate(cpu, find_engine(cpu, "onnxruntime")),)
    request = BuildRequest(name, candidates, resolve({"min_segment_nodes": 1}, candidates), "onnx")
    return build(load_graph(source), request, fallback="allow")


DIAMOND = model(
    [
        ("Add", ("x", "w"), "a"),  # first; stays for Mul, goes to the CPU too
        ("Abs", ("a",), "c"),  # CPU
        ("Mul", ("a", "a"), "m"),  # second; stays for Add
        ("Add", ("m", "c"), "s"),  # first
        ("Neg", ("s",), "y"),  # second
    ],
    ["y", "a"],
)


def diamond(x: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    a = x + w
    return {"y": -(a * a + np.abs(a)), "a": a}


def feeds(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name in ("x", "w")}


def same(found: Any, expected: dict[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert isinstance(found[name], np.ndarray)
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-6, err_msg=name)


def test_values_stay_where_the_next_segment_reads_them(fake: Callable[..., str]) -> None:
    seen: Counter[str] = Counter()
    name = fake(copies=lambda direction, count: seen.update({direction: count}))
    artifact = cut(DIAMOND, name)
    with accelrt.load(artifact, fallback="error") as session:
        same(session.predict(feeds()), diamond(**feeds()))
        (traffic,) = session.stats().traffic
        assert traffic.device == f"{name}:0"
        # x, w and c go there; a, which the CPU and the caller both need, and y come back: each once.
        assert (traffic.to_device, traffic.to_host) == (3 * BYTES, 2 * BYTES)
        assert seen == {"to_device": traffic.to_device, "to_host": traffic.to_host}
        session.predict(feeds(1))
        assert session.stats().host_bytes == 2 * 5 * BYTES
        assert session.stats().host_bytes_per_call == 5 * BYTES
    assert session.stats().host_bytes == 2 * 5 * BYTES
    foretold = artifact.placement.segments
    assert sum(segment.from_host or 0 for segment in foretold) == 3 * BYTES
    assert sum(segment.to_host or 0 for segment in foretold) == 2 * BYTES
    assert "from host" in str(artifact.explain())
    assert type(artifact.placement).from_json(artifact.placement.to_json()) == artifact.placement


def test_without_device_tensors_all_goes_through_the_host(fake: Callable[..., str]) -> None:
    name = fake(device_tensors=False)
    artifact = cut(DIAMOND, name)
    with accelrt.load(artifact) as session:
        same(session.predict(feeds()), diamond(**feeds()))
        crossed = session.stats().host_bytes
    assert crossed == sum((s.from_host or 0) + (s.to_host or 0) for s in artifact.placement.segments) > 5 * BYTES
    assert "from host" not in str(artifact.explain())


def test_open_dimensions_are_foretold_by_nobody_and_counted_all_the_same(fake: Callable[..., str]) -> None:
    nodes = [("Add", ("x", "w"), "a"), ("Mul", ("a", "w"), "y")]
    artifact = cut(model(nodes, ["y"], ["n", 4]), fake())
    assert all(segment.from_host is None for segment in artifact.placement.segments)
    with accelrt.load(artifact) as session:
        given = feeds(shape=(5, 4))
        same(session.predict(given), {"y": (given["x"] + given["w"]) * given["w"]})
        assert session.stats().host_bytes == 4 * 5 * 4 * 4  # x, w, w again, and y


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    """A graph of nodes of three owners, whose values are read and given back at random."""
    names, nodes = ["x", "w"], []
    for number in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(BINARY + UNARY))
        reads = [draw(st.sampled_from(names)) for _ in range(2 if kind in BINARY else 1)]
        nodes.append((kind, reads, f"v{number}"))
        names.append(f"v{number}")
    read = {name for _, reads, _ in nodes for name in reads}
    made = [gives for _, _, gives in nodes]
    extra = draw(st.sets(st.sampled_from(made)))
    # Every value is read or given back, so that no node is dropped.
    return model(nodes, [name for name in made if name not in read or name in extra])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=graphs(), seed=st.integers(0, 99))
def test_however_a_graph_is_cut_it_answers_as_uncut_and_moves_what_was_foretold(
    fake: Callable[..., str], both: tuple[str, Counter[str]], source: onnx.ModelProto, seed: int
) -> None:
    name, seen = both
    names = [port.name for port in source.graph.input]
    given = {key: value for key, value in feeds(seed).items() if key in names}
    with accelrt.load(source, backend="cpu/onnxruntime") as uncut:
        expected = uncut.predict(given)
    artifact = cut(source, name)
    seen.clear()
    with accelrt.load(artifact, fallback="error") as session:
        same(session.predict(given), {key: np.asarray(value) for key, value in expected.items()})
        stats = session.stats()
    moved = {each.device: (each.to_device, each.to_host) for each in stats.traffic}.get(f"{name}:0", (0, 0))
    foretold = artifact.placement.segments
    assert moved == (sum(s.from_host or 0 for s in foretold), sum(s.to_host or 0 for s in foretold))
    assert moved == (seen["to_device"], seen["to_host"])


@pytest.fixture(scope="module")
def both(fake: Callable[..., str]) -> tuple[str, Counter[str]]:
    seen: Counter[str] = Counter()
    return fake(copies=lambda direction, count: seen.update({direction: count})), seen


# Failures


def test_a_stand_in_on_the_cpu_reads_what_is_on_the_device(fake: Callable[..., str]) -> None:
    name = fake(fails_to_run=lambda kinds, number: kinds == ("Mul",))
    with accelrt.load(cut(DIAMOND, name), fallback="allow") as session:
        for seed in range(3):
            same(session.predict(feeds(seed)), diamond(**feeds(seed)))
        assert session.stats().fallbacks == 3
        assert session.stats().errors == 0


def test_a_value_lost_with_its_device_is_computed_again(fake: Callable[..., str]) -> None:
    """The device goes after the first segment of a call: what that left there is out of reach."""
    gone, calls = threading.Event(), itertools.count()

    def lose(kinds: tuple[str, ...], number: int) -> bool:
        if kinds == ("Mul",) and next(calls) == 1:
            gone.set()
        return False

    name = fake(fails_to_run=lose, gone=gone.is_set)
    with accelrt.load(cut(DIAMOND, name), fallback="allow") as session:
        same(session.predict(feeds()), diamond(**feeds()))
        assert session.stats().fallbacks == 0
        for seed in range(1, 4):
            same(session.predict(feeds(seed)), diamond(**feeds(seed)))
        assert session.stats().errors == 0
        assert session.stats().fallbacks >= 8
        assert all(engine.startswith("cpu") for engine in session.stats().engines)


def test_a_lost_device_is_an_error_where_the_policy_says_so(fake: Callable[..., str]) -> None:
    gone = threading.Event()
    with accelrt.load(cut(DIAMOND, fake(gone=gone.is_set)), fallback="error") as session:
        session.predict(feeds())
        gone.set()
        with pytest.raises(ExecutionError, match="gone"):
            session.predict(feeds())


@pytest.mark.parametrize("kind", [DeviceLost, RuntimeError])
def test_an_answer_that_cannot_be_fetched_is_computed_again(
    fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    with accelrt.load(cut(DIAMOND, fake()), fallback="allow") as session:
        from accelrt.testing.fake import _FakeExecutable

        def fail(self: Any, tensor: Any) -> Any:
            raise kind("nothing can be read")

        monkeypatch.setattr(_FakeExecutable, "to_host", fail)
        same(session.predict(feeds()), diamond(**feeds()))
        (replica,) = session.stats().replicas
        assert replica.errors == 1
        assert session.stats().errors == 0
        # Only a lost device is not asked again.
        assert (session.stats().fallbacks > 0) == (kind is DeviceLost)


def test_another_replica_takes_up_a_call_whose_values_are_lost(fake: Callable[..., str]) -> None:
    """Device 0 fails in its second segment only; the call begins again on device 1."""
    name = fake(devices=2)
    artifact = cut(DIAMOND, name)
    with accelrt.load(artifact, replicas=2, fallback="allow") as session:
        first = session._replicas[0]
        broken = next(step for step in first._steps if step.engine.endswith("second"))

        def lost(inputs: Any, keep: Any = ()) -> Any:
            raise DeviceLost("device 0 fell off")

        broken.executable.run = broken.executable.run_resident = lost  # type: ignore
        with ThreadPoolExecutor(4) as pool:
            for seed, found in enumerate(pool.map(session.predict, [feeds(n) for n in range(40)])):
                same(found, diamond(**feeds(seed)))
        stats = session.stats()
    assert stats.moved >= 1
    assert [replica.lost for replica in stats.replicas] == [True, False]
    assert stats.fallbacks == stats.errors == 0


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=graphs(), after=st.integers(0, 12), seed=st.integers(0, 99))
def test_whenever_the_device_goes_no_answer_is_wrong_or_lost(
    fake: Callable[..., str], losing: tuple[str, list[int]], source: onnx.ModelProto, after: int, seed: int
) -> None:
    name, left = losing
    names = [port.name for port in source.graph.input]
    given = {key: value for key, value in feeds(seed).items() if key in names}
    with accelrt.load(source, backend="cpu/onnxruntime") as uncut:
        expected = uncut.predict(given)
    left[0] = 10**9
    with accelrt.load(cut(source, name), fallback="allow") as session:
        left[0] = after
        for _ in range(3):
            same(session.predict(given), {key: np.asarray(value) for key, value in expected.items()})
        assert session.stats().errors == 0


@pytest.fixture(scope="module")
def losing(fake: Callable[..., str]) -> tuple[str, list[int]]:
    """A fake whose devices are gone after so many things were done there."""
    left = [10**9]

    def gone() -> bool:
        left[0] -= 1
        return left[0] < 0

    return fake(gone=gone), left


# Memory


def test_a_run_without_memory_waits_for_those_that_have_it(fake: Callable[..., str]) -> None:
    """16 threads on a device with room for two runs: each call is answered, most of them by the device."""
    nodes = [("Add", ("x", "w"), "a"), ("Mul", ("a", "a"), "y")]
    name = fake(room=2, latency_s=0.002)
    with accelrt.load(cut(model(nodes, ["y"]), name), fallback="allow") as session:
        with ThreadPoolExecutor(16) as pool:
            for seed, found in enumerate(pool.map(session.predict, [feeds(n) for n in range(200)])):
                given = feeds(seed)
                same(found, {"y": (given["x"] + given["w"]) ** 2})
        stats = session.stats()
        assert stats.errors == 0
        assert stats.calls == 200
        assert stats.replicas[0].errors > 0, "memory never was short"
        assert all(engine.startswith(name) for engine in stats.engines)


def test_a_run_without_memory_is_tried_once_more(fake: Callable[..., str]) -> None:
    held = threading.Event()
    name = fake(room=1, latency_s=lambda device: 0.0 if held.is_set() else 0.2, others={}, operators=("Add",))
    source = model([("Add", ("x", "w"), "y")], ["y"])
    with accelrt.load(source, backend=name, fallback="error") as session, ThreadPoolExecutor(1) as pool:
        other = pool.submit(session.predict, feeds(1))
        while not session._links[0]._begun.__reduce__()[1][0]:
            time.sleep(0.001)
        time.sleep(0.05)
        held.set()
        same(session.predict(feeds()), {"y": feeds()["x"] + feeds()["w"]})
        assert other.done(), "it did not wait for the run that had the memory"
        assert session.stats().replicas[0].errors == 1


def test_no_memory_at_all_is_answered_by_the_policy(fake: Callable[..., str]) -> None:
    name = fake(room=0, others={}, operators=("Add",))
    source = model([("Add", ("x", "w"), "y")], ["y"])
    with accelrt.load(source, backend=name, fallback="allow") as session:
        same(session.predict(feeds()), {"y": feeds()["x"] + feeds()["w"]})
        assert session.stats().fallbacks == 1
        assert session.stats().engines == (f"{name}/fake",), "it may have memory for the next call"
    with accelrt.load(source, backend=name, fallback="error") as session:
        with pytest.raises(ExecutionError, match="memory") as caught:
            session.predict(feeds())
        assert isinstance(caught.value.__cause__, OutOfDeviceMemory)


def test_no_memory_for_the_program_is_answered_by_the_policy(fake: Callable[..., str]) -> None:
    artifact = cut(DIAMOND, name := fake())
    artifact_small = cut(DIAMOND, fake(memory_bytes=1))
    with accelrt.load(artifact_small, fallback="allow") as session:
        same(session.predict(feeds()), diamond(**feeds()))
        assert not session.stats().traffic
    with pytest.raises(OutOfDeviceMemory):
        accelrt.load(artifact_small, fallback="error")
    with accelrt.load(artifact) as session:
        assert session.stats().traffic[0].device == f"{name}:0"


# Inputs and outputs on the device


@pytest.fixture
def linear(fake: Callable[..., str]) -> tuple[str, Artifact]:
    name = fake()
    return name, cut(model([("Add", ("x", "w"), "a"), ("Mul", ("a", "w"), "y")], ["y"]), name)


def test_outputs_stay_on_the_device_if_asked(linear: tuple[str, Artifact]) -> None:
    _, artifact = linear
    with accelrt.load(artifact) as session:
        given = feeds()
        found = session.predict(given, outputs="device")["y"]
        assert isinstance(found, FakeTensor)
        assert found.__dlpack_device__() == (FAKE_KIND, 0)
        np.testing.assert_allclose(found.array, (given["x"] + given["w"]) * given["w"])
        assert session.stats().traffic[0].to_host == 0
        with pytest.raises(OptionError, match="'disk'"):
            session.predict(given, outputs="disk")  # type: ignore[arg-type]


def test_what_the_caller_has_on_the_device_is_not_copied(linear: tuple[str, Artifact]) -> None:
    _, artifact = linear
    with accelrt.load(artifact) as session:
        given = feeds()
        there = {key: FakeTensor(value.copy()) for key, value in given.items()}
        first = session.predict(there, outputs="device")["y"]
        again = session.predict({"x": first, "w": there["w"]}, outputs="device")["y"]
        assert session.stats().host_bytes == 0
        expected = ((given["x"] + given["w"]) * given["w"] + given["w"]) * given["w"]
        np.testing.assert_allclose(again.array, expected, rtol=1e-6)  # type: ignore[union-attr]
        found = session.predict(there["x"], given["w"])["y"]
        np.testing.assert_allclose(found, (given["x"] + given["w"]) * given["w"])
        # w of the host is read by both segments; y comes back.
        assert session.stats().host_bytes == 3 * BYTES


def test_a_tensor_that_is_still_computed_is_waited_for(linear: tuple[str, Artifact]) -> None:
    _, artifact = linear
    given = feeds()
    with accelrt.load(artifact) as session:
        busy = FakeTensor(np.full(SHAPE, np.nan, np.float32), pending=given["x"])
        same(session.predict(busy, given["w"]), {"y": (given["x"] + given["w"]) * given["w"]})


def test_a_single_segment_takes_and_leaves_tensors(fake: Callable[..., str]) -> None:
    source = model([("Add", ("x", "w"), "y")], ["y"])
    with accelrt.load(source, backend=fake(others={}), fallback="error") as session:
        given = feeds()
        found = session.predict(FakeTensor(given["x"]), given["w"], outputs="device")["y"]
        assert isinstance(found, FakeTensor)
        assert session.stats().traffic[0].to_device == BYTES
        same(session.predict(FakeTensor(given["x"]), given["w"]), {"y": given["x"] + given["w"]})
        same(session.predict(given), {"y": given["x"] + given["w"]})
        assert len(list(session.trace(FakeTensor(given["x"]), given["w"]))) == 1


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (FakeTensor(np.zeros(SHAPE, np.float64)), "float64"),
        (FakeTensor(np.zeros(SHAPE, np.int32)), "int32"),
        (FakeTensor(np.zeros((4, 3), np.float32)), r"shape \[4, 3\]"),
        (FakeTensor(np.zeros(12, np.float32)), r"shape \[12\]"),
    ],
)
def test_a_tensor_on_the_device_that_does_not_fit_is_refused(
    linear: tuple[str, Artifact], tensor: FakeTensor, found: str
) -> None:
    _, artifact = linear
    with accelrt.load(artifact) as session, pytest.raises(InputError, match=f"Input 'x' takes .*{found}"):
        session.predict(tensor, feeds()["w"])


def test_a_tensor_with_gaps_is_copied(linear: tuple[str, Artifact]) -> None:
    _, artifact = linear
    with accelrt.load(artifact) as session:
        given = feeds()
        wide = np.repeat(given["x"], 2, axis=1)
        same(session.predict(FakeTensor(wide[:, ::2]), given["w"]), {"y": (given["x"] + given["w"]) * given["w"]})


def test_a_tensor_on_another_device_is_copied_to_the_host(linear: tuple[str, Artifact]) -> None:
    _, artifact = linear
    given = feeds()
    expected = {"y": (given["x"] + given["w"]) * given["w"]}
    with accelrt.load(artifact) as session:
        same(session.predict(FakeTensor(given["x"], device=3), given["w"]), expected)
    with accelrt.load(model([("Sub", ("x", "w"), "y")], ["y"])) as session:
        found = session.predict(FakeTensor(given["x"]), given["w"], outputs="device")
        same(found, {"y": given["x"] - given["w"]})


class Silent(FakeTensor):
    """A tensor of a library that knows DLPack before version 1 only."""

    def __dlpack__(self, *, stream: int | None = None) -> Any:  # type: ignore[override]
        return super().__dlpack__(stream=stream)


def test_a_tensor_that_gives_no_copy_is_refused_with_what_to_do(linear: tuple[str, Artifact]) -> None:
    _, artifact = linear
    given = feeds()
    refused = pytest.raises(InputError, match=r"'x' is a Silent on device \(12, 0\).*Copy it to the host first")
    with accelrt.load(model([("Sub", ("x", "w"), "y")], ["y"])) as session, refused:
        session.predict(Silent(given["x"]), given["w"])
    with accelrt.load(artifact) as session:
        same(session.predict(Silent(given["x"]), given["w"]), {"y": (given["x"] + given["w"]) * given["w"]})


def test_when_the_device_is_lost_a_callers_tensor_is_asked_for_a_copy(fake: Callable[..., str]) -> None:
    gone = threading.Event()
    source = model([("Add", ("x", "w"), "y")], ["y"])
    given = feeds()
    with accelrt.load(source, backend=fake(others={}, gone=gone.is_set), fallback="allow") as session:
        gone.set()
        same(session.predict(FakeTensor(given["x"]), given["w"]), {"y": given["x"] + given["w"]})
    gone.clear()
    with accelrt.load(source, backend=fake(others={}, gone=gone.is_set), fallback="allow") as session:
        gone.set()
        with pytest.raises(ExecutionError, match="'x' cannot be read"):
            session.predict(Silent(given["x"]), given["w"])


def test_replicas_read_each_others_tensors_through_the_host(fake: Callable[..., str]) -> None:
    source = model([("Add", ("x", "w"), "y")], ["y"])
    given = feeds()
    with accelrt.load(source, backend=fake(others={}, devices=2), replicas=2, fallback="error") as session:
        for device in (0, 1) * 4:
            found = session.predict(FakeTensor(given["x"], device=device), given["w"], outputs="device")["y"]
            np.testing.assert_allclose(found.array, given["x"] + given["w"])  # type: ignore[union-attr]


def test_what_cuts_rows_takes_tensors_to_the_host(fake: Callable[..., str]) -> None:
    source = model([("Add", ("x", "w"), "a"), ("Relu", ("a",), "y")], ["y"], ["n", 4])
    name = fake(others={})
    artifact = accelrt.compile(source, name, batch=[2, 4], fallback="error")
    given = feeds()
    expected = {"y": np.maximum(given["x"] + given["w"], 0)}
    with accelrt.load(artifact, fallback="error") as session:
        there = {key: FakeTensor(value) for key, value in given.items()}
        same(session.predict(there), expected)
        same(session.predict(there, outputs="device"), expected)
        batcher = RequestBatcher(session, max_batch_size=4)
        try:
            same(batcher.run(there), expected)
            with pytest.raises(InputError, match="gives no copy"):
                batcher.run({key: Silent(value) for key, value in given.items()})
        finally:
            batcher.close()


@given(
    dtype=st.sampled_from(["float32", "float16", "int64", "uint8", "bool", "complex64"]),
    shape=st.lists(st.integers(0, 4), max_size=4),
    order=st.sampled_from("CF"),
)
def test_a_tensor_is_told_from_its_capsule(dtype: str, shape: list[int], order: Any) -> None:
    array = np.zeros(shape, dtype, order=order)
    layout = layout_of(FakeTensor(array))
    assert layout.dtype == dtype
    assert layout.shape == tuple(shape)
    assert layout.contiguous == bool(array.flags.c_contiguous)


def test_host_arrays_are_bound_as_before() -> None:
    port = Port("x", TensorType("float32", SHAPE))
    binder = Binder(Signature((port,), (port,)))
    given = {"x": np.zeros(SHAPE, np.float32)}
    assert binder.bind((given,)) is given
    assert not isinstance(binder.bind(([[0.0] * 4] * 3,)), DeviceFeeds)


def test_sessions_of_the_cpu_have_no_traffic() -> None:
    with accelrt.load(model([("Add", ("x", "w"), "y")], ["y"])) as session:
        session.predict(feeds())
        assert session.stats().traffic == ()
        assert session.stats().host_bytes == 0


def test_sixteen_threads_lose_nothing_when_the_device_goes(fake: Callable[..., str]) -> None:
    gone = threading.Event()
    name = fake(gone=gone.is_set, latency_s=0.001)
    with accelrt.load(cut(DIAMOND, name), fallback="allow") as session:

        def call(number: int) -> Any:
            if number == 100:
                gone.set()
            return session.predict(feeds(number))

        with ThreadPoolExecutor(16) as pool:
            for seed, found in enumerate(pool.map(call, range(300))):
                same(found, diamond(**feeds(seed)))
        stats = session.stats()
    assert (stats.calls, stats.errors) == (300, 0)
    assert all(engine.startswith("cpu") for engine in stats.engines)
