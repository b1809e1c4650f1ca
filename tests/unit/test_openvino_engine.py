"""The OpenVINO engine: what it refuses and why, and that what it runs is right."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from accelrt import isolation
from accelrt.backend import CompileJob, Executable, Program, Verdict
from accelrt.errors import CompileError, ExecutionError, IncompatibleProgram, IsolatedError, OptionError
from accelrt.graph.load import load_graph
from accelrt.graph.weights import WeightFile
from accelrt.testing import models
from accelrt_cpu import openvino as module
from accelrt_cpu.openvino import OpenVinoEngine, OpenVinoOptions
from accelrt_cpu.openvino_runtime import properties_of

pytest.importorskip("openvino")
pytestmark = pytest.mark.openvino

Array = np.ndarray[Any, Any]
ENGINE = OpenVinoEngine()
RANDOM = np.random.default_rng(0)


def parse(text: str, opset: int = 21, more: str = "") -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{more}]> {text}')


def verdict(text: str, opset: int = 21, more: str = "") -> Verdict:
    """The first refusal among the nodes of a model, or a yes."""
    answers = ENGINE.supports_all(load_graph(parse(text, opset, more)).nodes, "fp32")
    return next((answer for answer in answers if not answer.supported), answers[0])


def compiled(model: onnx.ModelProto, folder: Path, **options: Any) -> Program:
    graph = load_graph(model)
    source, out = folder / "source", folder / "program"
    source.mkdir()
    out.mkdir()
    weights = WeightFile(source / "weights.bin")
    graph.write(source / "model.onnx", weights)
    weights.close()
    job = CompileJob(source / "model.onnx", graph.signature, "fp32", OpenVinoOptions(**options))
    program = ENGINE.compile(job, out)
    assert sorted(file.name for file in source.iterdir()) in (["model.onnx"], ["model.onnx", "weights.bin"])
    for file in source.iterdir():  # a program needs nothing but its own files
        file.unlink()
    return program


def loaded(model: onnx.ModelProto, folder: Path, **options: Any) -> Executable:
    return ENGINE.load(compiled(model, folder, **options), [])


def oracle(model: onnx.ModelProto, inputs: dict[str, Array]) -> list[Array]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


# Status and options


def test_it_is_there_and_says_which() -> None:
    status = ENGINE.status()
    assert status.usable, status.reason
    assert status.version and status.version[0].isdigit()
    assert set(ENGINE.fingerprint()) == {"openvino", "device", "cpu"}


def test_a_crash_in_the_probe_is_a_status(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise IsolatedError("it was killed by SIGFPE in its child process.")

    monkeypatch.setattr(isolation, "call", crash)
    module._facts.cache_clear()
    status = ENGINE.status()
    module._facts.cache_clear()
    assert not status.usable
    assert status.reason is not None and "SIGFPE" in status.reason
    assert status.remedy == "pip install 'accelrt[openvino]'"


def test_options_out_of_range() -> None:
    for options in ({"threads": -1}, {"streams": 0}):
        with pytest.raises(OptionError):
            OpenVinoOptions(**options)


# What it refuses


def test_a_precision_is_offered_only_where_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = load_graph(parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")).nodes
    facts = dict(module._facts())
    for computed, offered in (("bf16", True), ("f32", False), ("f16", False)):
        monkeypatch.setattr(module, "_facts", lambda computed=computed: {**facts, "computes_bf16": computed})
        verdict = OpenVinoEngine().supports(node, "bf16")
        assert verdict.supported is offered
        assert offered or f"computes in {computed}" in verdict.reason
    assert ENGINE.supports(node, "fp32").supported


def test_being_off_by_one_step_is_no_reason_in_int8() -> None:
    text = "g (float[n] x) => (uint8[n] y) <float s = {0.1}, uint8 z = {3}> { y = QuantizeLinear(x, s, z) }"
    (node,) = load_graph(parse(text)).nodes
    assert "off by one" in ENGINE.supports(node, "fp32").reason
    assert ENGINE.supports(node, "int8").supported


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (double[n] x) => (double[n] y) { y = Relu(x) }", "float64 as float32"),
        ("g (float[n] x) => (double[n] y) { y = Cast<to = 11>(x) }", "float64 as float32"),
        ("g (uint32[n] x) => (uint32[n] y) { y = Identity(x) }", "uint32"),
        ("g (uint64[n] x) => (uint64[n] y) { y = Identity(x) }", "uint64"),
        ("g (string[n] x) => (string[n] y) { y = Identity(x) }", "text"),
        ("g (float[n] x) => (seq(float[n]) y) { y = SequenceConstruct(x) }", "tensors only"),
        ("g (float[n] x) => (float[n] y) { y = NoSuchOperator(x) }", ""),
        ("g (float[n] x) => (float[n] y) { y = com.example.Custom(x) }", "com.example"),
    ],
)
def test_types_are_refused_with_a_reason(text: str, reason: str) -> None:
    answer = verdict(text, more=', "com.example": 1')
    assert not answer.supported
    assert answer.reason
    assert reason in answer.reason


@pytest.mark.parametrize("operator", ["Add", "Mul", "Sub", "Div", "Max"])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_wide_integers_are_not_computed_with(operator: str, dtype: str) -> None:
    answer = verdict(f"g ({dtype}[n] a, {dtype}[n] b) => ({dtype}[n] y) {{ y = {operator}(a, b) }}")
    assert not answer.supported
    assert dtype in answer.reason


@pytest.mark.parametrize(
    "text",
    [
        "g (int64[n] x) => (bool[n] y) { y = Equal(x, x) }",
        "g (float[n] x) => (int64[n] y) { y = Cast<to = 7>(x) }",
        "g (int32[n] x) => (int16[n] y) { y = Cast<to = 5>(x) }",
        "g (int64[n] x) => (bool[n] y) { y = Cast<to = 9>(x) }",
        "g (int8[n] x) => (int8[n] y) { y = Add(x, x) }",
        "g (int64[n] x) => (int64[m] y) <int64[1] c = {3000000000}> { y = Concat<axis = 0>(x, c) }",
        "g (uint8[2,n] x, int8[n,2] w) => (int32[2,2] y) { y = MatMulInteger(x, w) }",
    ],
)
def test_what_integers_would_lose(text: str) -> None:
    answer = verdict(text)
    assert not answer.supported
    assert "OpenVINO" in answer.reason


@pytest.mark.parametrize(
    "text",
    [
        "g (float[v,8] table, int64[n,s] ids) => (float[n,s,8] y) { y = Gather(table, ids) }",
        "g (int64[n,s] mask) => (float[n,s] y) { y = Cast<to = 1>(mask) }",
        "g (float[n,s,8] x) => (float[m,8] y) <int64[1] zero = {0}, int64[2] two = {-1, 8}> "
        "{ shape = Shape(x) size = Gather(shape, zero) all = Concat<axis = 0>(size, two) z = Reshape(x, all) "
        "y = Reshape(z, two) }",
        "g (float[n,m] x) => (float[n,k] y) <int64[1] one = {1}, int64[1] end = {9223372036854775807}> "
        "{ y = Slice(x, one, end, one) }",
        "g (int8[n] a, int8[n] b) => (bool[n] y) { y = Less(a, b) }",
        "g (float[n] x, int32[n] i) => (float[n] y) { f = Cast<to = 1>(i) y = Add(x, f) }",
    ],
)
def test_integers_that_say_where_are_taken(text: str) -> None:
    answer = verdict(text)
    assert answer.supported, answer.reason


def test_a_body_is_judged_too() -> None:
    text = (
        "g (bool c, {0}[n] x) => ({0}[n] y) {{ y = If (c) <then_branch = t () => ({0}[n] a) {{ a = {1}(x, x) }}, "
        "else_branch = e () => ({0}[n] b) {{ b = Identity(x) }}> }}"
    )
    assert verdict(text.format("float", "Add")).supported
    answer = verdict(text.format("int64", "Add"))
    assert not answer.supported
    assert "its body holds" in answer.reason


def test_all_are_asked_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = isolation.call

    def spy(function: str, **arguments: Any) -> Any:
        calls.append(function)
        return real(function, **arguments)

    monkeypatch.setattr(isolation, "call", spy)
    engine = OpenVinoEngine()
    nodes = load_graph(models.small_cnn()).nodes
    assert all(answer.supported for answer in engine.supports_all(nodes, "fp32"))
    assert all(answer.supported for answer in engine.supports_all(nodes, "fp32"))
    assert calls == ["accelrt_cpu.openvino_child:try_out"]


def test_a_crash_on_trial_refuses_the_guilty_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = isolation.call

    def brittle(function: str, **arguments: Any) -> Any:
        if any(b"Tanh" in module.base64.b64decode(model) for model in arguments["models"]):
            return real("os:abort")
        return real(function, **arguments)

    monkeypatch.setattr(isolation, "call", brittle)
    text = "g (float[n] x) => (float[n] y) { a = Relu(x) b = Tanh(a) c = Exp(b) d = Sigmoid(c) y = Neg(d) }"
    answers = OpenVinoEngine().supports_all(load_graph(parse(text)).nodes, "fp32")
    assert [answer.supported for answer in answers] == [True, False, True, True, True]
    assert "SIGABRT" in answers[1].reason


# Programs


@pytest.mark.parametrize("build", [models.mlp, models.small_cnn])
def test_results_are_those_of_onnxruntime(build: Any, tmp_path: Path) -> None:
    model = build()
    program = compiled(model, tmp_path, threads=1)
    assert list(program.files) == ["model.blob"]
    (port,) = program.signature.inputs
    with ENGINE.load(program, []) as executable:
        for batch in (1, 5, 2, 1):
            x = RANDOM.normal(size=(batch, *port.type.shape[1:])).astype(np.float32)  # type: ignore[union-attr, index]
            (expected,) = oracle(model, {port.name: x})
            (actual,) = executable.run({port.name: x}).values()
            assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_eight_threads_get_their_own_answers(tmp_path: Path) -> None:
    model = models.small_cnn()
    inputs = [RANDOM.normal(size=(1 + n % 3, 3, 16, 16)).astype(np.float32) for n in range(48)]
    expected = [oracle(model, {"image": x})[0] for x in inputs]
    with loaded(model, tmp_path, threads=2) as executable, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda x: executable.run({"image": x})["scores"], inputs * 4))
    for actual, wanted in zip(results, expected * 4, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-5)


def test_outputs_outlive_the_next_run_and_inputs_are_left_alone(tmp_path: Path) -> None:
    with loaded(parse("g (float[n] x) => (float[n] y) { y = Relu(x) }"), tmp_path) as executable:
        x = np.array([-1, 2, 3], np.float32)
        first = executable.run({"x": x})["y"]
        executable.run({"x": np.array([7, 8, 9], np.float32)})
        np.testing.assert_array_equal(first, [0, 2, 3])
        np.testing.assert_array_equal(x, [-1, 2, 3])
        x.flags.writeable = False
        np.testing.assert_array_equal(executable.run({"x": x})["y"], [0, 2, 3])


def test_names_order_and_types_are_kept(tmp_path: Path) -> None:
    text = (
        "g (float[n] b, int64[n] a, float[n] unread, bool[n] c) => "
        "(bool[n] c2, int64[n] a2, float16[n] h, float[n] b2, float s) "
        "{ c2 = Not(c) a2 = Identity(a) h = Cast<to = 10>(b) b2 = Identity(b) s = ReduceSum<keepdims = 0>(b) }"
    )
    inputs = {
        "b": np.array([1, 2], np.float32),
        "a": np.array([2**31 - 1, -(2**31)], np.int64),
        "unread": np.zeros(2, np.float32),
        "c": np.array([True, False]),
    }
    model = parse(text)
    with loaded(model, tmp_path) as executable:
        outputs = executable.run(inputs)
    assert list(outputs) == ["c2", "a2", "h", "b2", "s"]
    for actual, expected in zip(outputs.values(), oracle(model, inputs), strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(actual, expected)


def test_bfloat16_travels_with_its_bits(tmp_path: Path) -> None:
    with loaded(parse("g (bfloat16[n] x) => (bfloat16[n] y) { y = Neg(x) }"), tmp_path) as executable:
        x = np.array([1.5, -3e38, 0.1], ml_dtypes.bfloat16)
        y = executable.run({"x": x})["y"]
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y.view(np.uint16), (-x).view(np.uint16))


def test_integers_beyond_32_bits_are_an_error_at_run(tmp_path: Path) -> None:
    with loaded(parse("g (int64[n] x) => (int64[n] y) { y = Identity(x) }"), tmp_path) as executable:
        for value in (2**31, -(2**31) - 1):
            with pytest.raises(ExecutionError, match="'x' holds integers that exceed 32 bits"):
                executable.run({"x": np.array([1, value], np.int64)})
        np.testing.assert_array_equal(executable.run({"x": np.array([5])})["y"], [5])


def test_an_empty_batch_is_an_error_unless_compiled_for(tmp_path: Path) -> None:
    with loaded(models.small_cnn(), tmp_path) as executable, pytest.raises(ExecutionError, match="is empty"):
        executable.run({"image": np.zeros((0, 3, 16, 16), np.float32)})
    (tmp_path / "static").mkdir()
    with loaded(parse("g (float[0,3] x) => (float[0,3] y) { y = Relu(x) }"), tmp_path / "static") as executable:
        assert executable.run({"x": np.zeros((0, 3), np.float32)})["y"].shape == (0, 3)


def test_weights_beyond_32_bits_are_an_error_at_compile(tmp_path: Path) -> None:
    model = parse("g (int64[n] i) => (int64[n] y) { y = Gather(w, i) }")
    model.graph.initializer.append(numpy_helper.from_array(np.full(500, 2**40), "w"))
    with pytest.raises(CompileError, match="exceed 32 bits"):
        compiled(model, tmp_path)


def test_a_foreign_blob_is_incompatible(tmp_path: Path) -> None:
    program = compiled(models.mlp(), tmp_path)
    blob = program.files["model.blob"]
    whole = blob.read_bytes()
    for data in (b"", b"no blob" * 100, whole[: len(whole) // 2]):
        blob.write_bytes(data)
        with pytest.raises(IncompatibleProgram):
            ENGINE.load(program, [])


def test_a_crash_of_the_compiler_is_an_error_and_the_host_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = isolation.call
    with monkeypatch.context() as patch:
        patch.setattr(isolation, "call", lambda *_, **__: real("os:abort"))
        with pytest.raises(IsolatedError, match="SIGABRT"):
            compiled(models.mlp(), tmp_path)
    assert os.getpid()
    (tmp_path / "again").mkdir()
    assert compiled(models.mlp(), tmp_path / "again").files


# Why the rules are there: each shows OpenVINO itself doing what it is refused for


def raw(model: onnx.ModelProto, *inputs: Array) -> Array:
    import openvino

    properties = properties_of(OpenVinoOptions(threads=1), "fp32")
    core = openvino.Core()
    result = core.compile_model(core.read_model(model.SerializeToString()), "CPU", properties)(list(inputs))
    return np.array(result[0])


def unary(operator: str, dtype: int, to: int | None = None, **attributes: Any) -> onnx.ModelProto:
    ports = [helper.make_tensor_value_info(n, t, [None]) for n, t in (("x", dtype), ("y", to or dtype))]
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    graph = helper.make_graph([node], "g", ports[:1], ports[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_openvino_computes_int64_as_int32() -> None:
    assert raw(unary("Identity", TensorProto.INT64), np.array([2**40 + 3]))[0] == 3


def test_openvino_computes_float64_as_float32() -> None:
    assert raw(unary("Neg", TensorProto.DOUBLE), np.array([1 + 1e-12]))[0] == -1


def test_openvino_reduces_int32_in_float32() -> None:
    value = raw(unary("ReduceMax", TensorProto.INT32, keepdims=1), np.array([2**24 + 1], np.int32))[0]
    assert value != 2**24 + 1


def test_openvino_saturates_int8() -> None:
    model = parse("g (int8[n] x) => (int8[n] y) { y = Add(x, x) }")
    assert raw(model, np.array([100], np.int8))[0] == 127


def test_openvino_loses_recurrent_layers_on_export() -> None:
    import openvino

    weights = [RANDOM.normal(size=shape).astype(np.float32) for shape in ((1, 16, 3), (1, 16, 4))]
    model = parse("g (float[5,2,3] x) => (float[5,1,2,4] y) { y = LSTM<hidden_size = 4>(x, w, r) }")
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for a, n in zip(weights, "wr", strict=True))
    x = RANDOM.normal(size=(5, 2, 3)).astype(np.float32)
    core = openvino.Core()
    direct = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    again = core.import_model(direct.export_model().getvalue(), "CPU")
    assert np.allclose(direct([x])[0], oracle(model, {"x": x})[0], atol=1e-2)
    assert not np.allclose(direct([x])[0], again([x])[0], atol=1e-2)
