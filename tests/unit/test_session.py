"""Sessions: what goes in is checked, what comes out is right, on many threads and when engines fail."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import accelrt
from accelrt.errors import ExecutionError, IncompatibleProgram, InputError, SessionClosed
from accelrt.registry import REGISTRY
from accelrt.runtime.metrics import LatencyHistogram
from accelrt.runtime.session import Session
from accelrt.testing.fake import FakeBackend, FakeEngine, _FakeExecutable


def identity(elem_type: int, shape: list[Any] | None = None) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(name, elem_type, ["n"] if shape is None else shape) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", ports[:1], ports[1:])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def chain(length: int = 6) -> onnx.ModelProto:
    """y = x times 1 times 2 times 3 ... plus as many ones, two operators a step."""
    nodes, name = [], "x"
    for step in range(length):
        nodes += [
            helper.make_node("Mul", [name, f"c{step}"], [f"m{step}"], name=f"mul{step}"),
            helper.make_node("Add", [f"m{step}", "one"], [f"a{step}" if step < length - 1 else "y"], name=f"add{step}"),
        ]
        name = f"a{step}"
    constants = [helper.make_tensor(f"c{s}", TensorProto.FLOAT, [], [1.0 + s / 10]) for s in range(length)]
    constants.append(helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]))
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "chain", ports[:1], ports[1:], constants)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def expected(x: np.ndarray, length: int = 6) -> np.ndarray:
    for step in range(length):
        x = x * np.float32(1.0 + step / 10) + np.float32(1.0)
    return x


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    names = itertools.count()
    used: list[str] = []

    def make(**behaviour: Any) -> str:
        used.append(f"session-fake{next(names)}")
        accelrt.register(FakeBackend.configured(used[-1], **behaviour))
        return used[-1]

    yield make
    for name in used:
        REGISTRY.unregister(name)


@pytest.fixture(scope="module")
def floats() -> Iterator[Session]:
    with accelrt.load(accelrt.compile(identity(TensorProto.FLOAT), cache=False)) as session:
        yield session


# What goes in


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.ones(3, np.int64), "dtype int64"),
        (np.ones(3, np.float64), "dtype float64"),
        (np.ones(3, np.float16), "dtype float16"),
        (np.ones(3, np.complex64), "dtype complex64"),
        (np.array([True]), "dtype bool"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([1.0], object), "dtype object"),
        (np.ones((3, 1), np.float32), r"shape \[3, 1\]"),
        (np.float32(1), r"shape \[\]"),
        ("text", "holds other things than numbers"),
        ([[1.0], [2.0, 3.0]], "ragged"),
        (None, "None"),
        ([True, False], "kind bool"),
        ([1e300], "too large for float32"),
        (object(), "a object"),
        ({1.0, 2.0}, "a set"),
    ],
)
def test_a_misfit_names_the_input_what_is_expected_and_what_came(floats: Session, value: Any, found: str) -> None:
    with pytest.raises(InputError, match=rf"Input 'x' takes float32\[n\]; found .*{found}"):
        floats.predict({"x": value})


@pytest.mark.parametrize(
    "value",
    [
        np.arange(6, dtype=">f4"),
        np.arange(12, dtype=np.float32)[::2] / 2,
        np.arange(6, dtype=np.float32)[::-1][::-1],
        [0, 1, 2, 3, 4, 5],
        (0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
        memoryview(np.arange(6, dtype=np.float32)).tolist(),
    ],
    ids=["big-endian", "strided", "reversed twice", "ints", "tuple", "list"],
)
def test_the_same_numbers_in_other_clothes(floats: Session, value: Any) -> None:
    out = floats.predict({"x": value})["y"]
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, np.arange(6))


class Arrayish:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array


class Dlpackish:
    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("wrap", [Arrayish, Dlpackish])
def test_what_speaks_array_or_dlpack_is_taken_and_its_type_is_checked(floats: Session, wrap: type) -> None:
    np.testing.assert_array_equal(floats.predict(wrap(np.arange(3, dtype=np.float32)))["y"], [0, 1, 2])
    with pytest.raises(InputError, match="int64"):
        floats.predict(wrap(np.arange(3)))


@pytest.mark.torch
def test_tensors_of_torch(floats: Session) -> None:
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(floats.predict(torch.arange(3.0))["y"], [0, 1, 2])
    with pytest.raises(InputError, match=r"requires? grad"):
        floats.predict(torch.arange(3.0, requires_grad=True))
    with pytest.raises(InputError):
        floats.predict(torch.arange(3))


@given(st.lists(st.integers(-(2**70), 2**70), max_size=5))
def test_python_integers_are_taken_exactly_or_not_at_all(values: list[int]) -> None:
    session = _cached(TensorProto.INT8)
    if all(-128 <= value <= 127 for value in values):
        assert session.predict({"x": values})["y"].tolist() == values
    else:
        with pytest.raises(InputError):
            session.predict({"x": values})


_SESSIONS: dict[int, Session] = {}


def _cached(elem_type: int) -> Session:
    if elem_type not in _SESSIONS:
        _SESSIONS[elem_type] = accelrt.load(accelrt.compile(identity(elem_type), cache=False, fallback="allow"))
    return _SESSIONS[elem_type]


def test_integers_take_no_floats_and_no_bools() -> None:
    session = _cached(TensorProto.INT64)
    assert session.predict([1, 2])["y"].dtype == np.int64
    for wrong in ([1.0], [True], [2**63], [1.5], np.ones(1, np.int32)):
        with pytest.raises(InputError):
            session.predict({"x": wrong})


def test_bools_take_bools_only() -> None:
    session = _cached(TensorProto.BOOL)
    assert session.predict([True, False])["y"].tolist() == [True, False]
    for wrong in ([1], [0.0], np.ones(1, np.uint8)):
        with pytest.raises(InputError):
            session.predict({"x": wrong})


def test_text() -> None:
    session = _cached(TensorProto.STRING)
    for value in (["a", "ß"], np.array(["a", "ß"]), np.array(["a", "ß"], object), np.array(["a", "ß".encode()], "S")):
        assert session.predict({"x": value})["y"].tolist() == ["a", "ß"]
    objects = (np.array([None], object), np.array(["a", 1], object), np.array([["a"]], object))
    for wrong in ([1], ["a", 1], np.array([1]), [b"\xff"], [[]], *objects):
        with pytest.raises(InputError, match="'x'"):
            session.predict({"x": wrong})


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "int4", "uint4"])
def test_types_that_numpy_lacks_go_in_and_out(name: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, name))
    model = identity(helper.np_dtype_to_tensor_dtype(dtype))
    x = np.array([0, 1, 2, 3]).astype(dtype)
    with accelrt.load(accelrt.compile(model, cache=False, fallback="allow")) as session:
        out = session.predict(x)["y"]
        assert out.dtype == dtype
        np.testing.assert_array_equal(out.astype(np.float32), [0, 1, 2, 3])
        with pytest.raises(InputError):
            session.predict(x.astype(np.float32))


def test_names() -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("a", "b", "y")]
    graph = helper.make_graph([helper.make_node("Sub", ["a", "b"], ["y"])], "sub", ports[:2], ports[2:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    a, b = np.float32([5, 7]), np.float32([1, 2])
    with accelrt.load(model) as session:
        for given_ in ((a, b), ({"b": b, "a": a},)):
            np.testing.assert_array_equal(session.predict(*given_)["y"], [4, 5])
        for wrong, text in (
            (({"a": a},), "missing: b"),
            (({"a": a, "b": b, "c": b},), "unknown: 'c'"),
            ((a,), "takes 2 inputs"),
            ((a, b, b), "takes 2 inputs"),
            (({},), "missing: a, b"),
        ):
            with pytest.raises(InputError, match=text):
                session.predict(*wrong)


def test_an_npz_file_is_a_mapping(floats: Session, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(3, dtype=np.float32))
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(floats.predict(file)["y"], [0, 1, 2])


def test_static_sizes_are_held() -> None:
    with accelrt.load(identity(TensorProto.FLOAT, [2, "n", 3])) as session:
        assert session.predict(np.ones((2, 5, 3), np.float32))["y"].shape == (2, 5, 3)
        assert session.predict(np.ones((2, 0, 3), np.float32))["y"].shape == (2, 0, 3)
        for shape in ((1, 5, 3), (2, 5, 4), (2, 5)):
            with pytest.raises(InputError, match="shape"):
                session.predict(np.ones(shape, np.float32))


def test_sequences_and_optionals() -> None:
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"])
    sequence = helper.make_sequence_type_proto(tensor)
    x = helper.make_value_info("x", sequence)
    y = helper.make_value_info("y", sequence)
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "sequence", [x], [y])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    with accelrt.load(model, fallback="allow") as session:
        out = session.predict({"x": [np.float32([1, 2]), [3]]})["y"]
        assert [item.tolist() for item in out] == [[1, 2], [3]]
        for wrong in (np.ones(3, np.float32), [np.ones(1, np.int64)], None):
            with pytest.raises(InputError, match="Input 'x'"):
                session.predict({"x": wrong})


def test_an_input_that_is_an_output_and_one_that_nothing_reads() -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "unused", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ports[:2], [ports[0], ports[2]])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    x = np.float32([1, 2])
    with accelrt.load(model) as session:
        out = session.predict(x, x)
        assert list(out) == ["x", "y"]
        np.testing.assert_array_equal(out["x"], x)
        np.testing.assert_array_equal(out["y"], -x)


# Threads


@pytest.mark.parametrize("behaviour", [None, {"operators": {"Mul"}}, {"operators": {"Mul"}, "concurrent": False}])
def test_sixteen_threads_on_one_session(behaviour: dict[str, Any] | None, fake: Callable[..., str]) -> None:
    target = "cpu" if behaviour is None else fake(**behaviour)
    artifact = accelrt.compile(chain(), target, fallback="allow", cache=False)
    assert len(artifact.placement.segments) == (1 if behaviour is None else 12)
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((int(rng.integers(1, 9)), 4), dtype=np.float32) for _ in range(320)]
    wants = [expected(x) for x in inputs]
    with accelrt.load(artifact) as session, ThreadPoolExecutor(16) as pool:
        start = threading.Barrier(16)

        def work(worker: int) -> None:
            start.wait()
            for number in range(worker, len(inputs), 16):
                np.testing.assert_allclose(session.predict(inputs[number])["y"], wants[number], rtol=1e-5)

        for future in [pool.submit(work, worker) for worker in range(16)]:
            future.result()
        assert session.stats().calls == len(inputs)
        assert session.stats().errors == 0


def test_map_keeps_order_and_is_lazy(fake: Callable[..., str]) -> None:
    read = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield np.full((1, 4), number, np.float32)

    with accelrt.load(chain(), backend=fake(latency_s=0.001)) as session:
        results = session.map(endless())
        firsts = [next(results)["y"][0, 0] for _ in range(20)]
        np.testing.assert_allclose(firsts, [expected(np.float32(n)) for n in range(20)], rtol=1e-5)
        assert read < 30
        results.close()


def test_map_takes_mappings_values_and_tuples() -> None:
    x = np.ones((1, 4), np.float32)
    with accelrt.load(chain()) as session:
        for item in ({"x": x}, x, (x,)):
            (out,) = session.map([item])
            np.testing.assert_allclose(out["y"], expected(x), rtol=1e-5)


def test_map_stops_at_an_exception_in_its_turn() -> None:
    good, bad = np.ones((1, 4), np.float32), np.ones((1, 4), np.int64)
    with accelrt.load(chain()) as session:
        results = session.map([good, good, bad, good])
        assert len([next(results), next(results)]) == 2
        with pytest.raises(InputError):
            next(results)
        assert next(results, None) is None
        np.testing.assert_allclose(session.predict(good)["y"], expected(good), rtol=1e-5)


def test_an_exception_of_the_iterable_reaches_the_caller() -> None:
    def broken() -> Iterator[np.ndarray]:
        yield np.ones((1, 4), np.float32)
        raise KeyError("no more")

    with accelrt.load(chain()) as session, pytest.raises(KeyError, match="no more"):
        list(session.map(broken()))


def test_submit_gives_futures() -> None:
    x = np.ones((1, 4), np.float32)
    with accelrt.load(chain()) as session:
        futures = [session.submit({"x": x * n}) for n in range(50)]
        for n, future in enumerate(futures):
            np.testing.assert_allclose(future.result()["y"], expected(x * n), rtol=1e-5)
        with pytest.raises(InputError):
            session.submit({"z": x}).result()


# Ends


def test_a_closed_session_says_so_and_closing_twice_is_fine() -> None:
    session = accelrt.load(chain())
    session.close()
    session.close()
    for call in (session.predict, session.submit):
        with pytest.raises(SessionClosed):
            call(np.ones((1, 4), np.float32))
    with pytest.raises(SessionClosed):
        list(session.map([np.ones((1, 4), np.float32)]))
    assert "closed" in repr(session)


def test_close_waits_for_calls_under_way(fake: Callable[..., str]) -> None:
    session = accelrt.load(chain(), backend=fake(latency_s=0.2))
    results: list[Any] = []
    worker = threading.Thread(target=lambda: results.append(session.predict(np.ones((1, 4), np.float32))))
    worker.start()
    while session.stats().calls == 0:
        time.sleep(0.001)
    session.close()
    assert results or not worker.is_alive() or worker.join() is None
    worker.join()
    np.testing.assert_allclose(results[0]["y"], expected(np.ones((1, 4), np.float32)), rtol=1e-5)


def test_close_cancels_what_waits(fake: Callable[..., str]) -> None:
    session = accelrt.load(chain(), backend=fake(latency_s=0.05))
    futures = [session.submit(np.ones((1, 4), np.float32)) for _ in range(20)]
    session.close()
    done = [future for future in futures if not future.cancelled()]
    assert len(done) < 20
    for future in futures:
        try:
            np.testing.assert_allclose(future.result()["y"], expected(np.ones((1, 4), np.float32)), rtol=1e-5)
        except CancelledError:
            continue


# Failures


@pytest.mark.parametrize(
    ("behaviour", "fallbacks"),
    [
        ({"fails_to_run": lambda operators, call: call % 2 == 1}, 5),
        ({"lost_after": 3}, 7),
        ({"operators": {"Mul"}, "fails_to_run": lambda operators, call: True}, 60),
    ],
    ids=["every second call", "lost", "every segment"],
)
def test_failures_at_run_are_answered_counted_and_said_once(
    behaviour: dict[str, Any], fallbacks: int, fake: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    artifact = accelrt.compile(chain(), fake(**behaviour), fallback="allow", cache=False)
    x = np.ones((2, 4), np.float32)
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(artifact) as session:
        for _ in range(10):
            np.testing.assert_allclose(session.predict(x)["y"], expected(x), rtol=1e-5)
        assert session.stats().fallbacks == fallbacks
        assert session.stats().errors == 0
    said = [record for record in caplog.records if "the CPU answered instead" in record.message]
    assert len(said) == 1


def test_failures_at_run_are_errors_if_so_asked(fake: Callable[..., str]) -> None:
    artifact = accelrt.compile(chain(), fake(fails_to_run=lambda operators, call: call == 1), cache=False)
    x = np.ones((2, 4), np.float32)
    with accelrt.load(artifact, fallback="error") as session:
        session.predict(x)
        with pytest.raises(ExecutionError, match="told to fail"):
            session.predict(x)
        np.testing.assert_allclose(session.predict(x)["y"], expected(x), rtol=1e-5)
        assert session.stats().errors == 1


def test_without_its_source_a_failed_segment_has_nowhere_to_go(fake: Callable[..., str], tmp_path: Path) -> None:
    target = fake(fails_to_run=lambda operators, call: True)
    path = accelrt.compile(chain(), target, cache=False).save(tmp_path / "bare.accel", sources=False)
    with accelrt.load(path) as session, pytest.raises(ExecutionError, match="sources=False"):
        session.predict(np.ones((2, 4), np.float32))


def test_what_no_engine_can_answer_is_one_error_with_both_causes() -> None:
    ports = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("shape", TensorProto.INT64, [1]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "g", ports[:2], ports[2:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    with accelrt.load(model) as session:
        with pytest.raises(ExecutionError, match=r"cpu/onnxruntime failed: .*And the CPU failed too"):
            session.predict(np.ones(3, np.float32), np.int64([7]))
        assert session.predict(np.ones(4, np.float32), np.int64([4]))["y"].shape == (4,)


# Counts


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=400))
def test_percentiles_are_those_of_numpy_within_a_bucket(values: list[int]) -> None:
    histogram = LatencyHistogram()
    for value in values:
        histogram.record(value)
    summary = histogram.summary()
    assert summary.n == len(values)
    assert summary.min_ms == min(values) / 1e6
    assert summary.max_ms == max(values) / 1e6
    for percent, found in ((50, summary.p50_ms), (90, summary.p90_ms), (99, summary.p99_ms)):
        exact = float(np.percentile(values, percent, method="inverted_cdf")) / 1e6
        assert found == pytest.approx(exact, rel=0.025)


def test_stats() -> None:
    with accelrt.load(chain()) as session:
        assert session.stats().latency.p99_ms is None
        for _ in range(3):
            session.predict(np.ones((1, 4), np.float32))
        with pytest.raises(InputError):
            session.predict(np.ones((1, 5), np.float32))
        stats = session.stats()
        assert (stats.calls, stats.errors, stats.fallbacks, stats.latency.n) == (4, 1, 0, 3)
        assert stats.engines == ("cpu/onnxruntime",)
        assert 0 < stats.latency.min_ms <= stats.latency.p50_ms <= stats.latency.p99_ms <= stats.latency.max_ms


# What ends and what is held


@pytest.fixture
def executables(monkeypatch: pytest.MonkeyPatch) -> tuple[list[_FakeExecutable], list[_FakeExecutable]]:
    """Every program of the stand-in that was loaded, and every one that was closed."""
    opened: list[_FakeExecutable] = []
    closed: list[_FakeExecutable] = []
    make, close = _FakeExecutable.__init__, _FakeExecutable.close
    monkeypatch.setattr(_FakeExecutable, "__init__", lambda self, *a: (opened.append(self), make(self, *a))[1])
    monkeypatch.setattr(_FakeExecutable, "close", lambda self: (closed.append(self), close(self))[1])
    return opened, closed


@pytest.mark.parametrize("behaviour", [{}, {"lost_after": 1}, {"operators": {"Mul"}, "lost_after": 1}], ids=str)
def test_every_program_is_closed_once_its_device_lost_or_not(
    behaviour: dict[str, Any],
    executables: tuple[list[_FakeExecutable], list[_FakeExecutable]],
    fake: Callable[..., str],
) -> None:
    opened, closed = executables
    artifact = accelrt.compile(chain(), fake(**behaviour), fallback="allow", cache=False)
    with accelrt.load(artifact, fallback="allow") as session:
        for _ in range(3):
            session.predict(np.ones((2, 4), np.float32))
        assert closed == []
    assert len(opened) == (6 if "operators" in behaviour else 1)
    assert sorted(map(id, opened)) == sorted(map(id, closed))


def test_many_threads_lose_a_device_together(fake: Callable[..., str]) -> None:
    for _ in range(5):
        artifact = accelrt.compile(chain(), fake(lost_after=20), cache=False)
        with accelrt.load(artifact, fallback="allow") as session, ThreadPoolExecutor(16) as pool:
            xs = [np.full((1, 4), n, np.float32) for n in range(160)]
            for x, outputs in zip(xs, pool.map(session.predict, xs), strict=True):
                np.testing.assert_allclose(outputs["y"], expected(x), rtol=1e-5)
            assert session.stats().errors == 0
            assert session.stats().fallbacks == 140


def test_a_lost_device_is_not_in_use_and_not_asked_again(
    executables: tuple[list[_FakeExecutable], list[_FakeExecutable]], fake: Callable[..., str]
) -> None:
    artifact = accelrt.compile(chain(), fake(lost_after=3), cache=False)
    with accelrt.load(artifact, fallback="allow") as session:
        for _ in range(8):
            session.predict(np.ones((2, 4), np.float32))
        assert session.stats().engines == ("cpu",)
        (executable,) = executables[0]
        assert next(executable._calls) == 4


def test_what_cannot_be_loaded_is_counted_on_each_run_and_said_once(
    fake: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    artifact = accelrt.compile(chain(), fake(memory_bytes=10), cache=False)
    with caplog.at_level(logging.WARNING, "accelrt"), accelrt.load(artifact) as session:
        assert session.stats().fallbacks == 0
        for _ in range(3):
            session.predict(np.ones((2, 4), np.float32))
        assert session.stats().fallbacks == 3
        assert session.stats().engines == ("cpu",)
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


@pytest.mark.parametrize("concurrent", [True, False])
def test_an_engine_that_takes_one_call_at_a_time_gets_one(
    concurrent: bool, fake: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, most = itertools.count(), [0]
    left = itertools.count()
    run = _FakeExecutable.run

    def counted(self: _FakeExecutable, inputs: Any) -> Any:
        most[0] = max(most[0], next(inside) + 1 - left.__reduce__()[1][0])
        time.sleep(0.002)
        try:
            return run(self, inputs)
        finally:
            next(left)

    monkeypatch.setattr(_FakeExecutable, "run", counted)
    artifact = accelrt.compile(chain(), fake(concurrent=concurrent), cache=False)
    with accelrt.load(artifact) as session, ThreadPoolExecutor(8) as pool:
        list(pool.map(session.predict, [np.ones((2, 4), np.float32)] * 64))
    assert (most[0] > 1) is concurrent


def test_an_engine_that_raises_anything_at_load_falls_back(fake: Callable[..., str], monkeypatch: Any) -> None:
    artifact = accelrt.compile(chain(), fake(), cache=False)
    monkeypatch.setattr(FakeEngine, "load", lambda *_: {}["no such key"])
    x = np.ones((2, 4), np.float32)
    with accelrt.load(artifact, fallback="allow") as session:
        np.testing.assert_allclose(session.predict(x)["y"], expected(x), rtol=1e-5)
    with pytest.raises(IncompatibleProgram, match="KeyError"):
        accelrt.load(artifact, fallback="error")


@pytest.mark.parametrize(
    ("elem_type", "value", "fits"),
    [
        (TensorProto.FLOAT, 1e300, False), (TensorProto.FLOAT, 10**40, False), (TensorProto.FLOAT, float("inf"), True),
        (TensorProto.FLOAT, float("nan"), True), (TensorProto.FLOAT16, 65504, True), (TensorProto.FLOAT16, 70000, False),
        (TensorProto.BFLOAT16, 1.5, True), (TensorProto.BFLOAT16, 1e39, False), (TensorProto.INT4, 7, True),
        (TensorProto.INT4, 8, False), (TensorProto.INT4, 1.5, False), (TensorProto.UINT4, 16, False),
        (TensorProto.UINT64, 2**64 - 1, True), (TensorProto.UINT64, -1, False),
    ],
)  # fmt: skip
def test_python_numbers_too_large_for_the_type_are_refused(elem_type: int, value: Any, fits: bool) -> None:
    with accelrt.load(identity(elem_type)) as session:
        if fits:
            np.testing.assert_array_equal(session.predict({"x": [value]})["y"].astype(np.float64), [float(value)])
        else:
            with pytest.raises(InputError, match="'x'"):
                session.predict({"x": [value]})
