"""Models made to be wrong: an error of accelrt's within seconds, or a right answer; never a crash, never a leak.

All are compiled by one child process, which must live: onnx's checker and inference are C++ and have crashed before.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import accelrt
from accelrt.errors import AccelrtError, GraphError, SourceError
from accelrt.testing import models

SECONDS = 10.0
SECRET = np.arange(4096, dtype=np.float32).tobytes()

CHILD = """
import json, os, resource, sys, time
import math
import numpy as np
import accelrt
from accelrt.errors import AccelrtError

resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # a bomb is to hit this child alone
accelrt.compile(sys.argv[2])  # imports are not what is measured
for name in sorted(os.listdir(sys.argv[1])):
    start = time.monotonic()
    kind, detail = "compiled", ""
    try:
        artifact = accelrt.compile(os.path.join(sys.argv[1], name), fallback="allow", cache=False)
        with accelrt.load(artifact) as session:
            feeds = {}
            for port in session.signature.inputs:
                shape = [d if isinstance(d, int) else 2 for d in port.type.shape or ()]
                if math.prod(shape) < 1e6:
                    feeds[port.name] = np.zeros(shape, port.type.dtype)
            session.predict(feeds)
    except AccelrtError as error:
        kind, detail = type(error).__name__, str(error)
    except BaseException as error:
        kind, detail = "untyped", f"{type(error).__name__}: {error}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps([name, kind, detail[:2000], time.monotonic() - start, peak]), flush=True)
"""


def compile_all(folder: Path, sources: dict[str, bytes]) -> dict[str, tuple[str, str]]:
    """Compile every source in a child; return the class of the error, or ``compiled``, and the message of each."""
    (folder / "in").mkdir()
    for name, data in sources.items():
        (folder / "in" / (name if "." in name else f"{name}.onnx")).write_bytes(data)
    (folder / "good.onnx").write_bytes(models.mlp().SerializeToString())
    return _run(folder, folder / "in")


def _run(folder: Path, inside: Path) -> dict[str, tuple[str, str]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(inside), str(folder / "good.onnx")],
        cwd=folder, env={**os.environ, "ACCELRT_CACHE_DIR": str(folder / "cache")},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    last = lines[-1][0] if lines else "nothing"
    assert done.returncode == 0, f"died with {done.returncode} after {last}: {done.stderr[-3000:]}"
    assert len(lines) == len(list(inside.iterdir()))
    assert {name: detail for name, kind, detail, *_ in lines if kind == "untyped"} == {}
    assert {name: seconds for name, _, _, seconds, _ in lines if seconds > SECONDS} == {}
    assert all(detail and "\n\n" not in detail for _, kind, detail, *_ in lines if kind != "compiled")
    assert max(peak for *_, peak in lines) < 3000, "gigabytes for files of kilobytes"
    return {name.removesuffix(".onnx"): (kind, detail) for name, kind, detail, *_ in lines}


def value(name: str, shape: Sequence[Any] | None = (2, 4), dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto] = (value("x"),),
    outputs: Sequence[onnx.ValueInfoProto] = (value("y"),),
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = 17,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(initializers)),
        opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)],
        ir_version=8,
        functions=list(functions),
    )


def op(op_type: str, inputs: Sequence[str] = ("x",), outputs: Sequence[str] = ("y",), **attributes: Any) -> Any:
    return helper.make_node(op_type, list(inputs), list(outputs), **attributes)


def raw(name: str, dims: Sequence[int], data: bytes, dtype: int = TensorProto.FLOAT) -> onnx.TensorProto:
    return TensorProto(name=name, data_type=dtype, dims=list(dims), raw_data=data)


def external(name: str, dims: Sequence[int], **place: object) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=list(dims))
    tensor.data_location = TensorProto.EXTERNAL
    for key, item in place.items():
        tensor.external_data.add(key=key, value=str(item))
    return tensor


def body(nodes: Sequence[onnx.NodeProto], outputs: Sequence[onnx.ValueInfoProto], **more: Any) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "body", [], list(outputs), **more)


def test_bytes_that_are_no_model(tmp_path: Path) -> None:
    rng = random.Random(0)
    sources: dict[str, bytes] = {"empty": b"", "text": b"this is no model\n" * 50, "zeros": bytes(4096)}
    sources.update({f"random{n}": rng.randbytes(rng.choice([1, 10, 100, 3000])) for n in range(60)})
    sources.update(
        png=b"\x89PNG\r\n\x1a\n" + rng.randbytes(500), zip=b"PK\x03\x04" + rng.randbytes(500), elf=b"\x7fELF" + bytes(500),
        json=b'{"graph": {}}', html=b"<html></html>", pickle=b"\x80\x04\x95" + bytes(50), gzip=b"\x1f\x8b\x08" + bytes(50),
    )  # fmt: skip
    results = compile_all(tmp_path, sources)
    assert {kind for kind, _ in results.values()} <= {"GraphError", "SourceError"}


@pytest.mark.parametrize(
    "suffix", ["onnx", "json", "textproto", "onnxtxt", "onnxjson", "pbtxt", "prototxt", "pb", "txt", ""]
)
def test_garbage_under_any_suffix(suffix: str, tmp_path: Path) -> None:
    contents = [
        b"",
        b"{",
        b"garbage",
        b"\xff\xfe\x00",
        b"[" * 20_000,
        b'{"graph":' * 5000,
        b"graph {" * 5000,
        b"ir_version: x",
    ]
    for number, content in enumerate(contents):
        path = tmp_path / (f"m{number}.{suffix}" if suffix else f"m{number}")
        path.write_bytes(content)
        with pytest.raises(SourceError):
            accelrt.compile(path, cache=False)
        with pytest.raises(SourceError):
            accelrt.compile(content, cache=False)


def test_truncated_models(tmp_path: Path) -> None:
    data = models.small_cnn(image=8, widths=(4,)).SerializeToString()
    cuts = sorted({*range(0, len(data), len(data) // 120), len(data) - 1})
    results = compile_all(tmp_path, {f"cut{cut:06}": data[:cut] for cut in cuts})
    assert sum(kind == "compiled" for kind, _ in results.values()) < 5


def test_models_with_flipped_bits(tmp_path: Path) -> None:
    """Whatever they mean now, no crash, no hang, no gigabytes."""
    rng = random.Random(1)
    sources = {}
    bases = [models.mlp(hidden=(8,)), models.small_cnn(image=8, widths=(4,)), _control_flow()]
    for number in range(360):
        data = bytearray(bases[number % len(bases)].SerializeToString())
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        sources[f"flip{number:04}"] = bytes(data)
    compile_all(tmp_path, sources)


def _control_flow() -> onnx.ModelProto:
    def branch(op_type: str) -> onnx.GraphProto:
        return body([op(op_type, ["x", "w"], ["inner"])], [value("inner")])

    nodes = [
        op("ReduceSum", ["x"], ["total"], keepdims=0),
        op("Greater", ["total", "zero"], ["flag"]),
        op("If", ["flag"], ["y"], then_branch=branch("Add"), else_branch=branch("Mul")),
    ]
    weights = [numpy_helper.from_array(np.ones((2, 4), np.float32), "w")]
    return model(nodes, initializers=[*weights, numpy_helper.from_array(np.float32(0), "zero")])


def test_fields_changed_at_random(tmp_path: Path) -> None:
    """Models that parse, but whose names, types, dims and attributes have been swapped about."""
    rng = random.Random(2)
    sources = {}
    names = ["x", "y", "", "w", "inner", "flag", "total", "zero", "new"]
    for number in range(300):
        made = _control_flow() if number % 2 else models.small_cnn(image=8, widths=(4,))
        for _ in range(rng.choice([1, 2, 3])):
            _disturb(made, rng, names)
        sources[f"odd{number:04}"] = made.SerializeToString()
    results = compile_all(tmp_path, sources)
    assert 20 < sum(kind == "compiled" for kind, _ in results.values()) < 280


def _disturb(made: onnx.ModelProto, rng: random.Random, names: Sequence[str]) -> None:
    graph = made.graph
    node = rng.choice(graph.node)
    match rng.randrange(14):
        case 0 if node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        case 1 if node.output:
            node.output[rng.randrange(len(node.output))] = rng.choice(names)
        case 2:
            node.op_type = rng.choice(["Relu", "Conv", "Nope", "", "If", "Loop", "Add", "Constant", "Split", "Cast"])
        case 3:
            node.domain = rng.choice(["", "ai.onnx", "com.nobody", "ai.onnx.ml", "com.microsoft"])
        case 4 if node.attribute:
            node.attribute.pop(rng.randrange(len(node.attribute)))
        case 5 if node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.type = rng.randrange(16) % 15
        case 6 if node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.ints.extend([rng.choice([0, -1, 2**40, 2**62, -(2**63)])])
        case 7 if graph.initializer:
            tensor = rng.choice(graph.initializer)
            tensor.dims[:] = rng.choice([[], [0], [-1], [2**40], [2**31, 2**31, 4], [1], [3, 3], [2**62] * 8])
        case 8 if graph.initializer:
            rng.choice(graph.initializer).data_type = rng.randrange(40)
        case 9 if graph.initializer:
            tensor = rng.choice(graph.initializer)
            tensor.raw_data = tensor.raw_data[: rng.randrange(8)]
        case 10:
            port = rng.choice([*graph.input, *graph.output])
            port.type.tensor_type.elem_type = rng.randrange(40)
        case 11:
            port = rng.choice([*graph.input, *graph.output])
            port.type.tensor_type.shape.dim.add(dim_value=rng.choice([-1, 0, 2**40, 2**63 - 1]))
        case 12:
            entry = rng.choice(made.opset_import)
            entry.version = rng.choice([0, -1, 1, 5, 13, 25, 28, 100, 2**62])
        case 13:
            graph.node.append(node)


def cases() -> dict[str, onnx.ModelProto]:
    """Each must be refused, with a GraphError or CompileError."""
    found: dict[str, onnx.ModelProto] = {}
    found["no-graph"] = onnx.ModelProto(ir_version=8)
    found["cycle"] = model([op("Add", ["x", "b"], ["a"]), op("Relu", ["a"], ["b"]), op("Neg", ["b"])])
    found["self-cycle"] = model([op("Add", ["x", "y"])])
    inside = body([op("Add", ["y", "x"], ["i"])], [value("i")])
    flag = numpy_helper.from_array(np.array(True), "flag")
    found["cycle-by-capture"] = model(
        [op("If", ["flag"], ["y"], then_branch=inside, else_branch=inside)], initializers=[flag]
    )
    found["output-twice"] = model([op("Relu"), op("Neg")])
    found["output-twice-in-a-node"] = model([op("Split", outputs=["y", "y"], axis=1)])
    found["output-is-an-input"] = model([op("Relu", outputs=["x"])], outputs=[value("x")])
    found["output-is-an-initialiser"] = model(
        [op("Relu", outputs=["w"]), op("Add", ["x", "w"])], initializers=[raw("w", [2, 4], bytes(32))]
    )
    found["undefined-input"] = model([op("Add", ["x", "nowhere"])])
    found["undefined-capture"] = model(
        [op("If", ["flag"], ["y"], then_branch=body([op("Relu", ["no"], ["i"])], [value("i")]), else_branch=inside)],
        initializers=[flag],
    )
    found["undefined-output"] = model([op("Relu")], outputs=[value("elsewhere")])
    found["undefined-body-output"] = model(
        [op("If", ["flag"], ["y"], then_branch=body([], [value("i")]), else_branch=inside)], initializers=[flag]
    )
    found["input-without-type"] = model([op("Relu")], inputs=[onnx.ValueInfoProto(name="x")])
    found["input-of-no-element-type"] = model([op("Relu")], inputs=[value("x", dtype=0)])
    found["input-of-unknown-type"] = model([op("Relu")], inputs=[value("x", dtype=99)])
    found["input-without-name"] = model([op("Relu", [""])], inputs=[value("")])
    found["inputs-of-one-name"] = model([op("Add", ["x", "x"])], inputs=[value("x"), value("x", (3, 3))])
    found["outputs-of-one-name"] = model([op("Relu")], outputs=[value("y"), value("y")])
    found["types-contradict"] = model([op("Relu")], outputs=[value("y", dtype=TensorProto.STRING)])
    found["unknown-operator"] = model([op("NoSuchThing")])
    found["unknown-domain"] = model([op("Thing", domain="com.nobody")], domains=["com.nobody"])
    found["domain-not-imported"] = model([op("Thing", domain="com.nobody")])
    found["no-operator"] = model([op("")])
    found["missing-attribute"] = model([op("Cast")])
    found["wrong-attribute"] = model([op("Cast", to="float")])
    found["unknown-attribute"] = model([op("Relu", no_such_attribute=1)])
    found["too-many-inputs"] = model([op("Relu", ["x", "x", "x"])])
    found["no-inputs-at-all"] = model([op("Relu", [])])
    found["too-short"] = model([op("Add", ["x", "w"])], initializers=[raw("w", [2, 4], bytes(28))])
    found["too-short-weight"] = model([op("Add", ["x", "w"])], [value("x", (64, 64))], [value("y", (64, 64))],
                                      [raw("w", [64, 64], bytes(64))])  # fmt: skip
    found["too-long"] = model([op("Add", ["x", "w"])], initializers=[raw("w", [2, 4], bytes(36))])
    found["float-data-too-short"] = model(
        [op("Add", ["x", "w"])],
        initializers=[TensorProto(name="w", data_type=1, dims=[2, 4], float_data=[1.0, 2.0])],
    )
    for name, dims in (
        ("huge", [2**40]),
        ("overflow", [2**31, 2**31, 2**31]),
        ("negative", [-1, 4]),
        ("most", [2**63 - 1]),
    ):
        found[f"dims-{name}"] = model([op("Add", ["x", "w"])], initializers=[raw("w", dims, bytes(32))])
        found[f"dims-{name}-without-data"] = model([op("Add", ["x", "w"])], initializers=[raw("w", dims, b"")])
        constant = op("Constant", [], ["w"], value=raw("w", dims, bytes(32)))
        found[f"constant-dims-{name}"] = model([constant, op("Add", ["x", "w"])])
    found["initialiser-of-no-type"] = model([op("Add", ["x", "w"])], initializers=[raw("w", [2, 4], bytes(32), 0)])
    found["initialiser-of-unknown-type"] = model(
        [op("Add", ["x", "w"])], initializers=[raw("w", [2, 4], bytes(32), 77)]
    )
    found["initialisers-of-one-name"] = model(
        [op("Add", ["x", "w"])], initializers=[raw("w", [2, 4], bytes(32)), raw("w", [2, 4], b"\1" * 32)]
    )
    found["initialiser-and-constant-of-one-name"] = model(
        [op("Constant", [], ["w"], value=raw("", [2, 4], b"\1" * 32)), op("Add", ["x", "w"])],
        initializers=[raw("w", [2, 4], bytes(32))],
    )
    found["constants-of-one-name"] = model(
        [op("Constant", [], ["w"], value_float=float(n)) for n in (1, 2)] + [op("Add", ["x", "w"])]
    )
    found["constant-of-nothing"] = model([op("Constant", [], ["w"]), op("Add", ["x", "w"])])
    found["constant-of-two"] = model([op("Constant", [], ["w"], value_float=1.0, value_int=1), op("Add", ["x", "w"])])
    no_opset = model([op("Relu")])
    del no_opset.opset_import[:]
    found["no-opset"] = no_opset
    for name, version in (("zero", 0), ("negative", -1), ("future", 10**6), ("huge", 2**62)):
        found[f"opset-{name}"] = model([op("Relu")])
        found[f"opset-{name}"].opset_import[0].version = version
    twice = model([op("Relu")])
    twice.opset_import.add(domain="", version=9)
    twice.opset_import.add(domain="ai.onnx", version=13)
    found["opset-thrice"] = twice

    def function(name: str, calls: Sequence[str]) -> onnx.FunctionProto:
        nodes, last = [], "a"
        for number, callee in enumerate(calls):
            nodes.append(op(callee, [last], [f"t{number}"], domain="local"))
            last = f"t{number}"
        nodes.append(op("Relu", [last], ["b"]))
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        return helper.make_function("local", name, ["a"], ["b"], nodes, imports)

    call = [op("F", domain="local")]
    found["function-recursive"] = model(call, functions=[function("F", ["F"])], domains=["local"])
    found["functions-in-a-ring"] = model(
        call, functions=[function("F", ["G"]), function("G", ["H"]), function("H", ["F"])], domains=["local"]
    )
    found["function-missing"] = model(call, functions=[function("G", [])], domains=["local"])
    return found


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    return compile_all(
        tmp_path_factory.mktemp("cases"), {name: made.SerializeToString() for name, made in cases().items()}
    )


@pytest.mark.parametrize("name", cases())
def test_models_that_contradict_themselves_are_refused(name: str, refused: dict[str, tuple[str, str]]) -> None:
    kind, detail = refused[name]
    assert kind in ("GraphError", "CompileError"), detail
    assert len(detail) < 2000


def test_functions_that_grow_without_bound(tmp_path: Path) -> None:
    """Thirty functions that each call the one below twice: a billion nodes if inlined."""
    functions = []
    for level in range(30):
        callee = f"F{level - 1}" if level else "Relu"
        domain = "local" if level else ""
        nodes = [op(callee, ["a"], ["t"], domain=domain), op(callee, ["t"], ["b"], domain=domain)]
        imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
        functions.append(helper.make_function("local", f"F{level}", ["a"], ["b"], nodes, imports))
    bomb = model([op("F29", domain="local")], functions=functions, domains=["local"])
    results = compile_all(tmp_path, {"bomb": bomb.SerializeToString()})
    assert results["bomb"][0] == "GraphError"


def test_deep_models(tmp_path: Path) -> None:
    """A long chain computes; bodies in bodies compute or are refused."""
    chain = model(
        [
            op("Relu" if n % 2 else "Neg", [f"v{n}" if n else "x"], [f"v{n + 1}" if n < 2999 else "y"])
            for n in range(3000)
        ]
    )
    sources = {"chain": chain.SerializeToString()}
    for depth in (5, 20, 30):
        graph = body([op("Relu", ["x"], [f"d{depth}"])], [value(f"d{depth}")])
        for level in range(depth - 1, -1, -1):
            node = op(
                "If",
                ["flag"],
                [f"d{level}"],
                then_branch=graph,
                else_branch=graph if level > depth - 3 else _leaf(level),
            )
            graph = body([node], [value(f"d{level}")])
        top = op("If", ["flag"], ["y"], then_branch=graph, else_branch=_leaf(-1))
        flag = numpy_helper.from_array(np.array(True), "flag")
        sources[f"deep{depth}"] = model([top], initializers=[flag]).SerializeToString()
    results = compile_all(tmp_path, sources)
    assert results["chain"][0] == "compiled", results["chain"]
    assert results["deep5"][0] == "compiled", results["deep5"]


def _leaf(level: int) -> onnx.GraphProto:
    return body([op("Neg", ["x"], [f"leaf{level}"])], [value(f"leaf{level}")])


def test_bodies_nested_too_deep_in_memory() -> None:
    """Deeper than protobuf can write; the proto is handed over as it is."""
    graph = _leaf(0)
    for level in range(1, 150):
        outer = body([], [value(f"d{level}")])
        node = outer.node.add(op_type="If", input=["flag"], output=[f"d{level}"])
        for name in ("then_branch", "else_branch"):
            attribute = node.attribute.add(name=name, type=onnx.AttributeProto.GRAPH)
            if name == "then_branch":
                attribute.g.CopyFrom(graph)
            else:
                attribute.g.CopyFrom(_leaf(-level))
        graph = outer
    made = model([op("If", ["flag"], ["y"])], initializers=[numpy_helper.from_array(np.array(True), "flag")])
    for name in ("then_branch", "else_branch"):
        made.graph.node[0].attribute.add(name=name, type=onnx.AttributeProto.GRAPH).g.CopyFrom(graph)
    with pytest.raises(SourceError):
        accelrt.compile(made, cache=False)


# ---------------------------------------------------------------- what is odd, but right


def predict(source: Any, **feeds: Any) -> dict[str, Any]:
    with accelrt.load(source) as session:
        return session.predict(feeds)


X = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)


def test_names_that_collide_with_ours() -> None:
    """An output that is an initialiser gets an inner name; a model may use that name already."""
    made = model(
        [op("Relu", ["x"], ["w__value"]), op("Add", ["x", "w"], ["sum"])],
        outputs=[value("w"), value("w__value"), value("sum")],
        initializers=[raw("w", [2, 4], np.full(8, 7, np.float32).tobytes())],
    )
    outputs = predict(made, x=X)
    np.testing.assert_array_equal(outputs["w"], np.full((2, 4), 7, np.float32))
    np.testing.assert_array_equal(outputs["w__value"], np.maximum(X, 0))
    np.testing.assert_array_equal(outputs["sum"], X + 7)


def test_an_initialiser_that_is_an_output_and_is_captured() -> None:
    inside = body([op("Add", ["x", "w"], ["i"])], [value("i")])
    other = body([op("Identity", ["w"], ["j"])], [value("j")])
    made = model(
        [op("If", ["flag"], ["y"], then_branch=inside, else_branch=other)],
        inputs=[value("x"), value("flag", (), TensorProto.BOOL)],
        outputs=[value("w"), value("y")],
        initializers=[raw("w", [2, 4], np.full(8, 7, np.float32).tobytes())],
    )
    assert (predict(made, x=X, flag=True)["y"] == X + 7).all()
    outputs = predict(made, x=X, flag=False)
    assert (outputs["y"] == 7).all()
    assert (outputs["w"] == 7).all()


def test_nodes_of_one_name_and_of_none(caplog: pytest.LogCaptureFixture) -> None:
    nodes = [op("Relu", ["x"], ["a"], name="n"), op("Neg", ["a"], ["b"], name="n"), op("Abs", ["b"], name="n#2")]
    made = model(nodes)
    np.testing.assert_array_equal(predict(made, x=X)["y"], np.maximum(X, 0))
    artifact = accelrt.compile(made)
    names = [place.name for segment in artifact.placement.segments for place in segment.nodes]
    assert len(set(names)) == 3
    assert [n.name for n in artifact.source_graph().nodes] == names


def test_nodes_out_of_order_and_unused_ones() -> None:
    nodes = [op("Abs", ["b"]), op("Neg", ["a"], ["b"]), op("Relu", ["x"], ["a"]), op("NoSuchThing", ["x"], ["unused"])]
    np.testing.assert_array_equal(predict(model(nodes), x=X)["y"], np.maximum(X, 0))


def test_models_that_compute_nothing_or_need_nothing() -> None:
    through = model([], outputs=[value("x")])
    np.testing.assert_array_equal(predict(through, x=X)["x"], X)
    constant = model([op("Identity", ["w"])], inputs=[], initializers=[raw("w", [2, 4], X.tobytes())])
    np.testing.assert_array_equal(predict(constant)["y"], X)
    nothing = model([], outputs=[])
    assert predict(nothing, x=X) == {}


def test_renaming_to_names_in_use() -> None:
    inside = body([op("Relu", ["x"], ["i"])], [value("i")])
    made = model(
        [op("If", ["flag"], ["y"], then_branch=inside, else_branch=inside)],
        inputs=[value("x"), value("flag", (), TensorProto.BOOL)],
    )
    with pytest.raises(SourceError):
        accelrt.compile(made, output_names=["x"])
    with pytest.raises(SourceError):
        accelrt.compile(made, input_names=["a", "a"])
    with pytest.raises(SourceError):
        accelrt.compile(made, input_names=["i", "flag"])  # a name inside a body: the body would read its own value
    with pytest.raises(SourceError):
        accelrt.compile(made, input_names=["only one"])
    swapped = accelrt.compile(made, input_names=["flag", "x"])
    outputs = predict(swapped, flag=X, x=np.array(True))
    np.testing.assert_array_equal(outputs["y"], np.maximum(X, 0))


def test_errors_say_what_is_wrong_in_one_line() -> None:
    """Not `Error calling _deserialize_graph with ...`, which is all that onnx-ir says at first."""
    made = model([op("Add", ["x", "w"])], initializers=[raw("w", [2, 4], bytes(32), 77)])
    with pytest.raises(GraphError) as caught:
        accelrt.compile(made)
    assert "_deserialize" not in str(caught.value)


# ---------------------------------------------------------------- external data

SIZES = {"small": 8, "large": 1024}


def with_external(size: int, where: str, **place: object) -> onnx.ModelProto:
    """A model that reads one tensor from another file: an initialiser, or the value of a Constant, or one in a body."""
    tensor = external("w", [size], **place)
    ports = {"inputs": [value("x", [size])], "outputs": [value("y", [size])]}
    add = op("Add", ["x", "w"])
    if where == "initialiser":
        return model([add], initializers=[tensor], **ports)
    if where == "constant":
        return model([op("Constant", [], ["w"], value=tensor), add], **ports)
    result = [value("i", [size])]
    if where == "body":
        inside = helper.make_graph([op("Add", ["x", "w"], ["i"])], "body", [], result, [tensor])
    else:
        inside = body([op("Constant", [], ["w"], value=tensor), op("Add", ["x", "w"], ["i"])], result)
    other = body([op("Neg", ["x"], ["i"])], result)
    flag = numpy_helper.from_array(np.array(True), "flag")
    return model([op("If", ["flag"], ["y"], then_branch=inside, else_branch=other)], initializers=[flag], **ports)


WHERE = ["initialiser", "constant", "body", "body-constant"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with a good data file, and secrets around it; the current folder holds one as well."""
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "data.bin").write_bytes(SECRET)
    (inside / "short.bin").write_bytes(b"1234")
    (inside / "empty.bin").write_bytes(b"")
    (inside / "sub").mkdir()
    (inside / "sub" / "data.bin").write_bytes(SECRET)
    (inside / "loop.bin").symlink_to("loop.bin")
    (tmp_path / "secret.bin").write_bytes(SECRET)
    (inside / "link.bin").symlink_to(tmp_path / "secret.bin")
    (inside / "out").symlink_to(tmp_path)
    (tmp_path / "current").mkdir()
    (tmp_path / "current" / "here.bin").write_bytes(SECRET)
    monkeypatch.chdir(tmp_path / "current")
    return inside


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_external_data_beside_the_model_is_read(where: str, size: int, folder: Path, monkeypatch: Any) -> None:
    x = np.ones(size, np.float32)
    for location, offset in (("data.bin", 0), ("data.bin", 64), ("sub/data.bin", 4), ("./data.bin", 0)):
        made = with_external(size, where, location=location, offset=offset, length=4 * size)
        (folder / "m.onnx").write_bytes(made.SerializeToString())
        expected = np.arange(offset // 4, offset // 4 + size, dtype=np.float32) + 1
        np.testing.assert_array_equal(predict(folder / "m.onnx", x=x)["y"], expected)
    monkeypatch.chdir(folder)
    np.testing.assert_array_equal(predict("m.onnx", x=x)["y"], np.arange(size, dtype=np.float32) + 1)
    bare = with_external(size, where, location="data.bin")
    (folder / "m.onnx").write_bytes(bare.SerializeToString())
    np.testing.assert_array_equal(predict("m.onnx", x=x)["y"], np.arange(size, dtype=np.float32) + 1)


PLACES: dict[str, dict[str, object]] = {
    "parent": {"location": "../secret.bin"},
    "absolute": {"location": "{root}/secret.bin"},
    "passwd": {"location": "/etc/passwd"},
    "through-a-folder": {"location": "sub/../../secret.bin"},
    "back-inside": {"location": "../model/data.bin"},
    "through-a-link": {"location": "out/secret.bin"},
    "link": {"location": "link.bin"},
    "loop": {"location": "loop.bin"},
    "missing": {"location": "missing.bin"},
    "folder": {"location": "sub"},
    "itself": {"location": "."},
    "nothing": {"location": ""},
    "no-location": {},
    "current-folder": {"location": "here.bin"},
    "short": {"location": "short.bin"},
    "empty": {"location": "empty.bin"},
    "device": {"location": "/dev/zero"},
    "nul": {"location": "data.bin\0x"},
    "long-name": {"location": "a" * 5000},
    "beyond": {"location": "data.bin", "offset": 16384},
    "nearly-beyond": {"location": "data.bin", "offset": 16384 - 4},
    "far": {"location": "data.bin", "offset": 2**63},
    "negative": {"location": "data.bin", "offset": -4},
    "words": {"location": "data.bin", "offset": "zero"},
    "too-little": {"location": "data.bin", "offset": 0, "length": 4},
    "too-much": {"location": "data.bin", "offset": 0, "length": 1 << 40},
    "less-than-nothing": {"location": "data.bin", "offset": 0, "length": -1},
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", PLACES)
def test_external_data_elsewhere_is_refused(name: str, where: str, folder: Path) -> None:
    place = {key: str(item).replace("{root}", str(folder.parent)) for key, item in PLACES[name].items()}
    for size in SIZES.values():
        made = with_external(size, where, **place)
        (folder / "m.onnx").write_bytes(made.SerializeToString())
        for given in (folder / "m.onnx", made, made.SerializeToString()):
            with pytest.raises(SourceError):
                accelrt.compile(given)


@pytest.mark.parametrize("where", WHERE)
def test_external_data_without_a_folder_is_refused(where: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in memory has no folder; the current one is not it, even if the file is there."""
    monkeypatch.chdir(folder)
    for size in SIZES.values():
        made = with_external(size, where, location="data.bin")
        for given in (made, made.SerializeToString(), bytearray(made.SerializeToString())):
            with pytest.raises(SourceError, match="not given as a path"):
                accelrt.compile(given)


def test_external_data_that_vanishes_or_shrinks_while_it_is_read(folder: Path) -> None:
    from accelrt.graph.load import load_graph

    made = with_external(1024, "initialiser", location="data.bin")
    (folder / "m.onnx").write_bytes(made.SerializeToString())
    for damage in (lambda: (folder / "data.bin").write_bytes(b"12"), lambda: (folder / "data.bin").unlink()):
        (folder / "data.bin").write_bytes(SECRET)
        graph = load_graph(folder / "m.onnx")
        damage()
        with pytest.raises(AccelrtError):
            _ = graph.digest


# ---------------------------------------------------------------- things that are no models


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.onnx", "", "a\0b.onnx", Path(), "/dev/null"):
        with pytest.raises(AccelrtError):
            accelrt.compile(path, cache=False)
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    with pytest.raises(SourceError):
        accelrt.compile(tmp_path / "loop.onnx")


@pytest.mark.parametrize(
    "thing",
    [
        None,
        1,
        1.5,
        [],
        {},
        object(),
        Ellipsis,
        np.zeros(3),
        print,
        type,
        onnx.GraphProto(),
        onnx.NodeProto(),
        io.BytesIO(),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_objects_that_are_no_models(thing: Any) -> None:
    with pytest.raises(SourceError, match="not a model"):
        accelrt.compile(thing)
    with pytest.raises(SourceError, match="not a model"):
        accelrt.load(thing)


def test_a_path_that_is_too_long() -> None:
    with pytest.raises(AccelrtError):
        accelrt.compile("a" * 5000 + ".onnx", cache=False)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    code = f"import accelrt\ntry: accelrt.compile({str(tmp_path / 'pipe.onnx')!r})\nexcept accelrt.errors.AccelrtError: print('typed')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=15, check=False)
    assert done.stdout.strip() == "typed", done.stderr


def test_models_of_every_kind_of_bytes() -> None:
    data = models.mlp().SerializeToString()
    for given in (data, bytearray(data), memoryview(data)):
        assert accelrt.compile(given).signature.input_names == ("x",)


def test_headers_that_promise_more_than_there_is(tmp_path: Path) -> None:
    """Length prefixes of protobuf that reach far beyond the end."""
    sources = {}
    for field in range(1, 26):
        for number, length in enumerate((2**31 - 1, 2**32, 2**63)):
            sources[f"f{field}-{number}"] = _varint(field << 3 | 2) + _varint(length) + b"abc"
    sources["ints"] = struct.pack("<Q", 2**64 - 1) * 100
    results = compile_all(tmp_path, sources)
    assert {kind for kind, _ in results.values()} == {"GraphError"}


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])
