"""The reference engine: what it says it runs, what its programs hold, and the operators it mends."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from accelrt.backend import CompileJob, NoOptions, Program, Verdict
from accelrt.errors import CompileError, IncompatibleProgram
from accelrt.graph.load import load_graph
from accelrt.graph.weights import WeightFile
from accelrt_cpu.reference import ReferenceEngine
from accelrt_cpu.reference_ops import REPLACEMENTS

Array = np.ndarray[Any, Any]
ENGINE = ReferenceEngine()


def parse(text: str, opset: int = 21, more: str = "") -> onnx.ModelProto:
    return parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{more}]> {text}')


def compiled(model: onnx.ModelProto, folder: Path) -> Program:
    graph = load_graph(model)
    source, out = folder / "source", folder / "program"
    source.mkdir()
    out.mkdir()
    weights = WeightFile(source / "weights.bin")
    graph.write(source / "model.onnx", weights)
    weights.close()
    program = ENGINE.compile(CompileJob(source / "model.onnx", graph.signature, "fp32", NoOptions()), out)
    for file in source.iterdir():  # a program needs nothing but its own files
        file.unlink()
    return program


def run(model: onnx.ModelProto, folder: Path, *inputs: Any) -> list[Any]:
    program = compiled(model, folder)
    with ENGINE.load(program, []) as executable:
        return list(executable.run(dict(zip(program.signature.input_names, inputs, strict=True))).values())


def verdicts(model: onnx.ModelProto) -> list[Verdict]:
    return [ENGINE.supports(node, "fp32") for node in load_graph(model).nodes]


# Programs


def test_it_is_there_and_says_which() -> None:
    status = ENGINE.status()
    assert status.usable
    assert status.version == onnx.__version__
    assert ENGINE.fingerprint() == {"onnx": onnx.__version__, "numpy": np.__version__}
    assert ENGINE.caps.last_resort


@pytest.fixture
def weighted() -> tuple[onnx.ModelProto, Array]:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model = parse("g (float[n, 64] x) => (float[n, 64] y) { y = MatMul(x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model, weight


def test_weights_stay_in_their_file(weighted: tuple[onnx.ModelProto, Array], tmp_path: Path) -> None:
    model, weight = weighted
    program = compiled(model, tmp_path)
    assert list(program.files) == ["model.onnx"]
    assert program.files["model.onnx"].stat().st_size < 1024
    assert program.files["model.onnx"].with_name("weights.bin").stat().st_size == weight.nbytes
    executable = ENGINE.load(program, [])
    held = executable._evaluator  # type: ignore[attr-defined]
    mapped = held.rt_inits_["w"]
    assert isinstance(mapped.base, np.memmap)
    assert not mapped.flags.writeable
    assert not any(tensor.raw_data for tensor in held.proto_.graph.initializer)
    x = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(executable.run({"x": x})["y"], x @ weight, rtol=1e-5)


def test_weights_of_bodies_and_packed_weights_are_found(tmp_path: Path) -> None:
    int4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    packed, plain = (np.arange(4000) % 16 - 8).astype(int4), np.arange(4000, dtype=np.float32)
    model = parse(
        """g (bool c) => (float[4000] y) {
            y = If (c) <
                then_branch = t () => (float[4000] a) { a = Cast <to = 1> (packed) },
                else_branch = e () => (float[4000] b) { b = Identity (plain) }
            >
        }"""
    )
    model.graph.initializer.append(numpy_helper.from_array(packed, "packed"))
    inner = next(a.g for a in model.graph.node[0].attribute if a.name == "else_branch")
    inner.initializer.append(numpy_helper.from_array(plain, "plain"))
    program = compiled(model, tmp_path)
    with ENGINE.load(program, []) as executable:
        np.testing.assert_array_equal(executable.run({"c": np.array(True)})["y"], packed.astype(np.float32))
        np.testing.assert_array_equal(executable.run({"c": np.array(False)})["y"], plain)


def test_results_are_the_callers_own(tmp_path: Path) -> None:
    model = parse("g (float[3] x) => (float[3] y, float[3] w) { y = Identity(x) w = Identity(k) }")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "k"))
    x = np.zeros(3, np.float32)
    with ENGINE.load(compiled(model, tmp_path), []) as executable:
        first = executable.run({"x": x})
        first["y"] += 5
        first["w"] += 5
        second = executable.run({"x": x})
    assert not x.any()
    np.testing.assert_array_equal(second["w"], np.ones(3))


def test_text_comes_back_in_object_arrays(tmp_path: Path) -> None:
    model = parse('g (string[2] x) => (string[n] y) { y = StringNormalizer <case_change_action = "UPPER"> (x) }')
    (result,) = run(model, tmp_path, np.array(["a", "b"], object))
    assert result.dtype == object
    assert result.tolist() == ["A", "B"]


def test_runs_side_by_side_do_not_meet(weighted: tuple[onnx.ModelProto, Array], tmp_path: Path) -> None:
    model = _looped(weighted[1])
    inputs = [np.full((3, 64), k / 10, np.float32) for k in range(16)]
    with ENGINE.load(compiled(model, tmp_path), []) as executable:

        def call(x: Array) -> Array:
            return executable.run({"x": x, "times": np.array(20)})["all"]

        expected = [call(x) for x in inputs]
        with ThreadPoolExecutor(8) as pool:
            for got, want in zip(pool.map(call, inputs * 4), expected * 4, strict=True):
                np.testing.assert_array_equal(got, want)


def _looped(weight: Array) -> onnx.ModelProto:
    f = TensorProto.FLOAT
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["c"], ["d"]),
            helper.make_node("MatMul", ["s", "w"], ["m"]),
            helper.make_node("Tanh", ["m"], ["r"]),
            helper.make_node("Identity", ["r"], ["o"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", f, ["n", 64]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            *(helper.make_tensor_value_info(name, f, ["n", 64]) for name in ("r", "o")),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["times", "", "x"], ["y", "all"], body=body)],
        "graph",
        [
            helper.make_tensor_value_info("x", f, ["n", 64]),
            helper.make_tensor_value_info("times", TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info("y", f, ["n", 64]),
            helper.make_tensor_value_info("all", f, ["t", "n", 64]),
        ],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_weights_outside_the_folder_are_refused(weighted: tuple[onnx.ModelProto, Array], tmp_path: Path) -> None:
    model, weight = weighted
    signature = load_graph(model).signature
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(weight.tobytes())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "in" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CompileError, match="not in one file beside it"):
        ENGINE.compile(CompileJob(tmp_path / "in" / "model.onnx", signature, "fp32", NoOptions()), tmp_path / "in")
    program = Program({"model.onnx": tmp_path / "in" / "model.onnx"}, {}, signature, NoOptions())
    with pytest.raises(IncompatibleProgram, match="secret"):
        ENGINE.load(program, [])


# What it says it runs


@pytest.mark.parametrize(
    ("text", "opset", "more"),
    [
        ("g (float[3] x) => (float[3] y) { y = Relu(x) }", 21, ""),
        ("g (float[3] x) => (float[3] y) { y = HardSwish(x) }", 21, ""),  # a function in its schema
        ("g (float[3] x) => (float[3] y) { y = Gelu(x) }", 21, ""),  # a function of its input types
        ("g (float[3] x) => (float[3] y) { y = ai.onnx.ml.Binarizer(x) }", 21, ', "ai.onnx.ml": 1'),
        (
            "g (float r, int64 t, float x, float g, float h) => (float a, float b)"
            "{ a, b = ai.onnx.preview.training.Adagrad(r, t, x, g, h) }",
            21,
            ', "ai.onnx.preview.training": 1',
        ),
        ("g (float[3] x, float[3] z) => (float[3] y) { y = Add <axis = 0, broadcast = 1> (x, z) }", 6, ""),
        *[(f"g (float[3] x) => (float[3] y) {{ y = {name}(x) }}", 10, "") for name in ("Softmax", "Hardmax")],
    ],
)
def test_supported(text: str, opset: int, more: str) -> None:
    assert [(v.supported, v.reason) for v in verdicts(parse(text, opset, more))] == [(True, "")]


@pytest.mark.parametrize(
    ("text", "opset", "more", "reason"),
    [
        (
            "g (float[1,1,2,2] x) => (float[1,1,1,1] y) { y = GlobalLpPool(x) }",
            21,
            "",
            "no implementation of GlobalLpPool",
        ),
        (
            "g (float x) => (float y, float d)"
            '{ y = Erf(x) d = ai.onnx.preview.training.Gradient <xs = ["x"], y = "y"> (x) }',
            21,
            ', "ai.onnx.preview.training": 1',
            "no implementation of ai.onnx.preview.training.Gradient",
        ),
        (
            "g (float[3] x) => (float[3] y) { y = com.example.Own(x) }",
            21,
            ', "com.example": 1',
            "domain of com.example",
        ),
        (
            "g (float[2,3] x, float[2] z) => (float[2,3] y) { y = Add <axis = 0, broadcast = 1> (x, z) }",
            6,
            "",
            "ignores the axis of Add-6",
        ),
    ],
)
def test_refused_with_the_reason(text: str, opset: int, more: str, reason: str) -> None:
    answers = verdicts(parse(text, opset, more))
    assert not answers[-1].supported
    assert reason in answers[-1].reason


def test_a_refusal_inside_a_body_is_a_refusal() -> None:
    model = parse(
        """g (bool c, float[1,1,2,2] x) => (float[1,1,1,1] y) {
            y = If (c) <
                then_branch = t () => (float[1,1,1,1] a) { a = GlobalLpPool (x) },
                else_branch = e () => (float[1,1,1,1] b) { b = GlobalMaxPool (x) }
            >
        }"""
    )
    (verdict,) = verdicts(model)
    assert not verdict.supported
    assert verdict.reason.startswith("in the body of If: ")


def test_precision_is_not_silently_ignored() -> None:
    (node,) = load_graph(parse("g (float[3] x) => (float[3] y) { y = Relu(x) }")).nodes
    assert not ENGINE.supports(node, "fp16").supported


def test_images_need_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (uint8[n] x) => (uint8[h, w, 3] y) { y = ImageDecoder(x) }")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    (verdict,) = verdicts(model)
    assert "pip install pillow" in verdict.reason


def test_every_supported_claim_holds_for_functions_of_types(tmp_path: Path) -> None:
    # The type of `x` inside the body is not declared, so the evaluator has to find it out while it runs.
    model = parse(
        """g (bool c, float[3] x) => (float[3] y) {
            y = If (c) <
                then_branch = t () => (float[3] a) { r = Relu (x) a = Gelu (r) },
                else_branch = e () => (float[3] b) { b = Relu (x) }
            >
        }"""
    )
    assert all(v.supported for v in verdicts(model))
    (y,) = run(model, tmp_path, np.array(True), np.array([0, 1, 2], np.float32))
    np.testing.assert_allclose(y, [0, 0.841345, 1.954500], rtol=1e-5)


# The operators it mends


def node_model(
    op_type: str, inputs: list[Array | None], outputs: list[Any], opset: int, **attributes: Any
) -> onnx.ModelProto:
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(inputs)]
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in zip(names, inputs, strict=True)
        if value is not None
    ]
    made = [helper.make_tensor_value_info(f"y{i}", kind, None) for i, kind in enumerate(outputs)]
    node = helper.make_node(op_type, names, [info.name for info in made], **attributes)
    graph = helper.make_graph([node], "graph", infos, made)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def apply(folder: Path, op_type: str, inputs: list[Any], count: int = 1, opset: int = 16, **attributes: Any) -> Any:
    arrays = [None if value is None else np.asarray(value) for value in inputs]
    float_type = helper.np_dtype_to_tensor_dtype(next(a.dtype for a in reversed(arrays) if a is not None))
    model = node_model(op_type, arrays, [float_type] * count, opset, **attributes)
    results = run(model, folder, *[a for a in arrays if a is not None])
    return results if count > 1 else results[0]


def running_sum(element: list[int], *, loop: bool = False, typed: bool = True) -> onnx.GraphProto:
    f = TensorProto.FLOAT
    shape = element if typed else None
    control = [("i", TensorProto.INT64), ("c", TensorProto.BOOL)] if loop else []
    inputs = [helper.make_tensor_value_info(name, kind, []) for name, kind in control]
    inputs += [helper.make_tensor_value_info(n, f, element) for n in (["s"] if loop else ["s", "e"])]
    nodes = [
        helper.make_node("Add", ["s", "s" if loop else "e"], ["t"]),
        helper.make_node("Identity", ["t"], ["o"]),
    ]
    outputs = [helper.make_tensor_value_info(name, f, shape) for name in ("t", "o")]
    if loop:
        nodes.append(helper.make_node("Identity", ["c"], ["d"]))
        outputs.insert(0, helper.make_tensor_value_info("d", TensorProto.BOOL, []))
    return helper.make_graph(nodes, "body", inputs, outputs)


@pytest.mark.parametrize("start", [np.float32(1), np.ones(2, np.float32), np.ones((2, 2), np.float32)])
def test_loop_stacks_scan_outputs(start: Array, tmp_path: Path) -> None:
    body = running_sum(list(np.shape(start)), loop=True)
    last, scans = apply(tmp_path, "Loop", [np.array(3), None, start], 2, body=body)
    np.testing.assert_array_equal(last, start * 8)
    np.testing.assert_array_equal(scans, np.stack([start * 2, start * 4, start * 8]))


@pytest.mark.parametrize("inputs", [[0, None], [3, False], [None, False]])
def test_loop_that_never_runs(inputs: list[Any], tmp_path: Path) -> None:
    head = [None if v is None else np.array(v) for v in inputs]
    last, scans = apply(tmp_path, "Loop", [*head, np.ones(2, np.float32)], 2, body=running_sum([2], loop=True))
    np.testing.assert_array_equal(last, [1, 1])
    assert (scans.shape, scans.dtype) == ((0, 2), np.float32)


def test_loop_carries_a_sequence_whose_first_element_has_no_axes(tmp_path: Path) -> None:
    # What test_loop16_seq_none of ONNX's suite computes; its runner cannot compare the result.
    model = parse(
        """g (int64 n, bool go, seq(float) start) => (seq(float) all) {
            all = Loop (n, go, start) <body = b (int64 i, bool c, seq(float) s) => (bool d, seq(float) r) {
                d = Identity (c)
                x = Constant <value = float[5] {1, 2, 3, 4, 5}> ()
                one = Constant <value = int64[1] {1}> ()
                zero = Constant <value = int64[1] {0}> ()
                end = Add (i, one)
                part = Slice (x, zero, end)
                r = SequenceInsert (s, part)
            }>
        }""",
        16,
    )
    (result,) = run(model, tmp_path, np.array(5), np.array(True), [np.float32(0).reshape(())])
    expected = [np.array(0, np.float32), *(np.arange(1, k + 2, dtype=np.float32) for k in range(5))]
    assert len(result) == 6
    for got, want in zip(result, expected, strict=True):
        assert got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_an_empty_optional_passes_through_if(tmp_path: Path) -> None:
    model = parse(
        """g (bool c, float[2] x) => (optional(float[2]) y, bool z) {
            y = If (c) <
                then_branch = t () => (optional(float[2]) a) { a = Optional (x) },
                else_branch = e () => (optional(float[2]) b) { b = Optional <type = float[2]> () }
            >
            z = OptionalHasElement (y)
        }""",
        18,
    )
    x = np.array([1, 2], np.float32)
    with ENGINE.load(compiled(model, tmp_path), []) as executable:
        full = executable.run({"c": np.array(True), "x": x})
        empty = executable.run({"c": np.array(False), "x": x})
    np.testing.assert_array_equal(full["y"], x)
    assert (full["z"].item(), empty["y"], empty["z"].item()) == (True, None, False)


def test_scan_directions_and_axes(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    last, scans = apply(
        tmp_path, "Scan", [np.zeros(2, np.float32), x], 2, body=running_sum([2]), num_scan_inputs=1,
        scan_input_axes=[1], scan_input_directions=[1], scan_output_axes=[-1], scan_output_directions=[1],
    )  # fmt: skip
    np.testing.assert_array_equal(last, x.sum(1))
    np.testing.assert_array_equal(scans, x[:, ::-1].cumsum(1)[:, ::-1])


def test_scan_over_nothing(tmp_path: Path) -> None:
    zeros = np.zeros(2, np.float32)
    last, scans = apply(
        tmp_path, "Scan", [zeros, np.zeros((0, 2), np.float32)], 2, body=running_sum([2]), num_scan_inputs=1
    )
    np.testing.assert_array_equal(last, zeros)
    assert scans.shape == (0, 2)


def test_scan_of_opset_8_takes_a_batch_and_lengths(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    lengths, start = np.array([3, 2]), np.zeros((2, 2), np.float32)
    last, scans = apply(tmp_path, "Scan", [lengths, start, x], 2, 8, body=running_sum([2]), num_scan_inputs=1)
    np.testing.assert_array_equal(last, [x[0].sum(0), x[1, :2].sum(0)])
    np.testing.assert_array_equal(scans[0], x[0].cumsum(0))
    np.testing.assert_array_equal(scans[1, :2], x[1, :2].cumsum(0))
    assert scans.shape == (2, 3, 2)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_is_scatter_elements_by_its_old_name(axis: int, tmp_path: Path) -> None:
    data, indices = np.zeros((3, 4), np.float32), np.array([[0, 2, -1], [1, 0, 2]])
    updates = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    old = apply(tmp_path / "a", "Scatter", [data, indices, updates], opset=10, axis=axis)
    new = apply(tmp_path / "b", "ScatterElements", [data, indices, updates], opset=18, axis=axis)
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1])
def test_softmax_flattened_its_input_before_opset_13(op_type: str, axis: int | None, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    attributes = {} if axis is None else {"axis": axis}
    lead = int(np.prod(x.shape[: 1 if axis is None else axis % 3], dtype=int))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    old = apply(tmp_path / "a", op_type, [x], opset=11, **attributes)
    flat = apply(tmp_path / "b", op_type, [x.reshape(lead, -1)], opset=13, axis=1)
    np.testing.assert_allclose(old, flat.reshape(x.shape), rtol=1e-6)
    if op_type == "Softmax":
        np.testing.assert_allclose(flat.sum(1), np.ones(lead), rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("onesided", [0, 1])
def test_stft(parts: int, onesided: int, tmp_path: Path) -> None:
    signal = np.random.default_rng(0).normal(size=(2, 50, parts)).astype(np.float32)
    window = np.hanning(20).astype(np.float32)
    y = apply(tmp_path, "STFT", [signal, np.array(7), window], opset=17, onesided=onesided)
    values = signal[..., 0] + (1j * signal[..., 1] if parts == 2 else 0)
    frames = np.stack([values[:, i : i + 20] * window for i in range(0, 31, 7)], 1)
    spectrum = np.fft.fft(frames)[..., : 11 if onesided else 20]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y[..., 0] + 1j * y[..., 1], spectrum, rtol=1e-4, atol=1e-5)


def test_every_replacement_is_an_operator_of_onnx() -> None:
    for domain, name in REPLACEMENTS:
        assert onnx.defs.has(name, domain)
