"""The emulator: an instance's cores, memory, operators and roundings; it says what it is in every report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import accelrt
from accelrt.backend import Device
from accelrt.errors import (
    AccelrtError,
    CompileError,
    CoresUnavailable,
    ExecutionError,
    IncompatibleProgram,
    OptionError,
    OutOfDeviceMemory,
    UnsupportedNodes,
)
from accelrt.graph.load import load_graph
from accelrt.graph.rounding import round_array
from accelrt.registry import REGISTRY
from accelrt.testing.models import Builder, mlp, small_cnn
from accelrt_neuron import NeuronBackend
from accelrt_neuron.catalogue import INSTANCES
from accelrt_neuron.emulator import EmulatorEngine, EmulatorOptions
from accelrt_neuron.flags import cast_mode, neuron_cc_args, neuron_cc_environment, neuronx_cc_args

TARGET = "neuron/emulator"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("ACCELRT_NEURON_EMULATE", raising=False)
    if "neuron" in REGISTRY.names():
        yield
        return
    accelrt.register(NeuronBackend)
    yield
    REGISTRY.unregister("neuron")


def product(rows: int = 4, inner: int = 8, columns: int = 8) -> onnx.ModelProto:
    """Return y = Relu(x @ w): a matrix product and an operator that is none."""
    net = Builder("product")
    x = net.input("x", (rows, inner))
    net.output(net.node("Relu", net.node("MatMul", x, net.normal(inner, columns, std=0.5)), name="y"), (rows, columns))
    return net.model()


def weight_of(model: onnx.ModelProto) -> Any:
    return numpy_helper.to_array(model.graph.initializer[0])


def compiled(model: onnx.ModelProto, **arguments: Any) -> Any:
    options = {k: arguments.pop(k) for k in ("instance", "auto_cast", "auto_cast_type") if k in arguments}
    return accelrt.compile(model, TARGET, options=options, **{"fallback": "error", **arguments})


def predict(model: onnx.ModelProto, feeds: Any, **arguments: Any) -> Any:
    with accelrt.load(compiled(model, **arguments), fallback="error") as session:
        return session.predict(feeds)


def x_of(rows: int = 4, inner: int = 8) -> Any:
    return np.random.default_rng(1).standard_normal((rows, inner)).astype(np.float32)


# It says what it is


def test_it_is_emulated_in_every_report() -> None:
    assert EmulatorEngine.caps.nature == "emulated"
    artifact = compiled(mlp(batch=2))
    assert "emulator (emulated)" in artifact.explain()
    for device in EmulatorEngine().devices():
        assert "emulated" in device.description
        assert device.properties["nature"] == "emulated"
    assert REGISTRY.backend("neuron").devices() == ()


def test_it_is_never_chosen_unless_named() -> None:
    with pytest.raises(AccelrtError, match="emulator is an emulator and must be named"):
        accelrt.compile(mlp(batch=2), "neuron")


def test_the_doctor_calls_a_backend_unusable_of_which_only_the_emulator_is() -> None:
    from typer.testing import CliRunner

    from accelrt.cli import app

    done = CliRunner().invoke(app, ["doctor", "neuron"])
    assert done.exit_code == 1
    assert "only an emulator is usable here, and it must be named: neuron/emulator" in " ".join(done.output.split())
    done = CliRunner().invoke(app, ["doctor", "neuron/emulator"])
    assert done.exit_code == 0, done.output


# Instances


@pytest.mark.parametrize("name", INSTANCES)
def test_an_instance_has_its_cores_and_memory(name: str) -> None:
    one = INSTANCES[name]
    devices = EmulatorEngine(EmulatorOptions(instance=name)).devices()
    assert devices is not None
    assert len(devices) == one.cores
    assert {device.memory_bytes for device in devices} == {one.core_memory}


def test_the_instance_comes_from_the_option_then_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EmulatorEngine().fingerprint()["instance"] == "inf2.xlarge"
    monkeypatch.setenv("ACCELRT_NEURON_EMULATE", "trn2.48xlarge")
    assert EmulatorEngine().fingerprint()["instance"] == "trn2.48xlarge"
    assert EmulatorEngine(EmulatorOptions(instance="inf1.xlarge")).fingerprint()["instance"] == "inf1.xlarge"
    monkeypatch.setenv("ACCELRT_NEURON_EMULATE", "inf9.xlarge")
    status = EmulatorEngine().status()
    assert not status.usable
    assert "inf9.xlarge" in str(status.reason)
    with pytest.raises(OptionError, match="instance must be one of"):
        EmulatorOptions(instance="inf9.xlarge")


def test_an_artifact_remembers_its_instance(tmp_path: Path) -> None:
    path = compiled(product(), instance="inf1.xlarge").save(tmp_path / "m.accel")
    with accelrt.load(path, devices="0-3", fallback="error") as session:
        session.predict({"x": x_of()})
    with pytest.raises(CoresUnavailable, match="has no device 4"):
        accelrt.load(path, devices=4, fallback="error")
    path = compiled(product(), instance="trn2.48xlarge").save(tmp_path / "n.accel")
    accelrt.load(path, devices=63, fallback="error").close()


def test_another_instance_is_compiled_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = accelrt.compile(product(), TARGET).save(tmp_path / "m.accel")
    monkeypatch.setenv("ACCELRT_NEURON_EMULATE", "inf1.xlarge")
    with pytest.raises(IncompatibleProgram, match=r"instance inf2.xlarge \(here: inf1.xlarge\)"):
        accelrt.load(path, fallback="error")
    with accelrt.load(path, fallback="allow") as session:
        session.predict({"x": x_of()})


# What is taken


def test_an_open_batch_is_refused_with_the_vendors_reason() -> None:
    with pytest.raises(UnsupportedNodes, match="Neuron compiles for static shapes, every size and the batch included"):
        compiled(mlp())


def test_an_embedding_runs_on_the_cpu_of_an_inf1_and_on_the_core_of_an_inf2() -> None:
    net = Builder("embedding")
    ids = net.input("ids", (1, 6), "int64")
    net.output(net.node("Relu", net.node("Gather", net.normal(50, 16, std=1.0), ids), name="y"), (1, 6, 16))
    model = net.model()
    owners = {}
    for instance in ("inf1.xlarge", "inf2.xlarge"):
        artifact = compiled(model, instance=instance, fallback="allow")
        owners[instance] = {n.kind.split("-")[0]: s.engine for s in artifact.placement.segments for n in s.nodes}
        if instance.startswith("inf1"):
            assert any("aten::embedding" in refusal.reason for refusal in artifact.placement.refusals)
    assert owners == {
        "inf1.xlarge": {"Gather": "cpu/onnxruntime", "Relu": TARGET},
        "inf2.xlarge": {"Gather": TARGET, "Relu": TARGET},
    }


def test_integers_beyond_32_bits_are_an_error_not_an_answer() -> None:
    net = Builder("wide")
    ids = net.input("x", (4,), "int64")
    net.output(net.node("Add", ids, net.constant([1, 2, 3, 4]), name="y"), (4,), "int64")
    model = net.model()
    with accelrt.load(compiled(model), fallback="error") as session:
        np.testing.assert_array_equal(session.predict({"x": np.arange(4)})["y"], [1, 3, 5, 7])
        with pytest.raises(ExecutionError, match="exceed 32 bits"):
            session.predict({"x": np.full(4, 2**40)})
    net = Builder("wide weight")
    ids = net.input("x", (2,), "int64")
    net.output(net.node("Add", ids, net.constant([1, 2**40]), name="y"), (2,), "int64")
    artifact = compiled(net.model(), fallback="allow")
    assert artifact.placement.nodes_by_engine == {"cpu/onnxruntime": 1}
    assert "exceed 32 bits" in artifact.placement.refusals[0].reason


# Where it rounds


@pytest.mark.parametrize("instance", ["inf1.xlarge", "inf2.xlarge", "trn1.2xlarge", "trn2.48xlarge"])
@pytest.mark.parametrize("precision, kind", [("bf16", "bfloat16"), ("fp16", "float16")])
def test_all_rounds_what_every_operator_reads_and_writes(instance: str, precision: Any, kind: Any) -> None:
    model, x = product(), x_of()
    y = predict(model, {"x": x}, instance=instance, precision=precision)["y"]
    exact = round_array(x, kind).astype(np.float64) @ round_array(weight_of(model), kind).astype(np.float64)
    wanted = round_array(np.maximum(round_array(exact.astype(np.float32), kind), 0), kind)
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("kind, option", [("bfloat16", None), ("tf32", "tf32"), ("float8_e4m3fn", "fp8_e4m3")])
def test_matmult_rounds_operands_alone(kind: Any, option: str | None) -> None:
    net = Builder("product19")
    net._model.opset_import[0].version = 19
    x_name = net.input("x", (4, 8))
    net.output(net.node("Relu", net.node("MatMul", x_name, net.normal(8, 8, std=0.5)), name="y"), (4, 8))
    model, x = net.model(), x_of()
    arguments = {"auto_cast": "matmult"} | ({} if option is None else {"auto_cast_type": option})
    y = predict(model, {"x": x}, precision="bf16", **arguments)["y"]
    wanted = np.maximum(round_array(x, kind) @ round_array(weight_of(model), kind), 0)
    np.testing.assert_allclose(y, wanted, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(y, np.maximum(x @ weight_of(model), 0))
    assert not np.array_equal(y, round_array(y, kind)), "the result was rounded as well"


def test_fp32_is_exact_where_the_chip_has_it_and_refused_where_it_has_not() -> None:
    model, x = product(), x_of()
    y = predict(model, {"x": x}, precision="fp32", instance="inf2.xlarge")["y"]
    np.testing.assert_allclose(y, np.maximum(x @ weight_of(model), 0), rtol=1e-6, atol=1e-6)
    artifact = compiled(model, instance="inf1.xlarge", precision="fp32", fallback="allow")
    assert artifact.placement.nodes_by_engine == {TARGET: 1, "cpu/onnxruntime": 1}
    assert "Inf1 has no float32 matrix product" in artifact.placement.refusals[0].reason


def test_default_precision_is_bf16_and_is_recorded() -> None:
    assert {segment.precision for segment in compiled(product()).placement.segments} == {"bf16"}


@pytest.mark.parametrize(
    "precision, options, text",
    [
        ("int8", {}, "quantised"),
        ("fp32", {"auto_cast": "all"}, "casts nothing"),
        ("bf16", {"auto_cast": "none"}, "contradicts"),
        ("bf16", {"auto_cast_type": "fp16"}, "contradicts"),
        ("bf16", {"auto_cast_type": "tf32", "instance": "inf1.xlarge"}, "NeuronCore-v2 and later"),
        ("fp16", {"auto_cast_type": "fp8_e4m3"}, "goes with precision='bf16'"),
    ],
)
def test_what_contradicts_itself_is_refused(precision: Any, options: dict[str, Any], text: str) -> None:
    engine = EmulatorEngine(EmulatorOptions(**options))
    for node in load_graph(product()).nodes:
        verdict = engine.supports(node, precision)
        assert not verdict.supported
        assert text in verdict.reason


def test_options_take_the_compilers_words_only() -> None:
    with pytest.raises(OptionError, match="auto_cast must be one of none, matmult, all"):
        EmulatorOptions(auto_cast="some")
    with pytest.raises(OptionError, match="auto_cast_type must be one of"):
        EmulatorOptions(auto_cast_type="int4")
    with pytest.raises(OptionError, match="threads"):
        EmulatorOptions(threads=-1)


def test_the_program_says_what_the_vendors_compiler_would_be_told() -> None:
    for instance, wanted in (
        ("inf1.xlarge", ["--fast-math", "all"]),
        ("trn2.48xlarge", ["--target", "trn2", "--auto-cast", "all", "--auto-cast-type", "bf16", "--optlevel", "2",
                           "--model-type", "generic", "--logical-nc-config", "2"]),
    ):  # fmt: skip
        artifact = compiled(product(), instance=instance)
        (segment,) = artifact.manifest.segments
        facts = json.loads((artifact.folder / segment.files["neuron.json"]).read_text())
        assert facts["compiler_args"] == wanted
        assert facts["operators"] == {"MatMul": 1, "Relu": 1}
        assert facts["device_bytes"] == 2 * 64 + 4 * (32 + 32), "weights in bf16, ports in float32"


def test_flags_of_each_compiler() -> None:
    half = cast_mode("fp16", "v1", "matmult")
    assert neuron_cc_args(half) == ["--fast-math", "fp32-cast-matmult-fp16", "no-fast-relayout"]
    assert neuron_cc_environment(half) == "--fp32-cast=matmult-fp16"
    assert neuron_cc_environment(cast_mode("fp16", "v1")) == "--fp32-cast=all-fp16"
    assert cast_mode("fp32", "v1").what == "matmult"
    assert neuronx_cc_args(cast_mode("fp32", "v2"), "inf2", optlevel=1, model_type="transformer", lnc=None) == [
        "--target", "inf2", "--auto-cast", "none", "--optlevel", "1", "--model-type", "transformer"]  # fmt: skip


# Memory and cores


def heavy(megabytes: int) -> onnx.ModelProto:
    """Return a model whose weights take so much on a core, in bf16."""
    net = Builder("heavy")
    x = net.input("x", (1, 1024))
    columns = megabytes * (1 << 20) // 2 // 1024
    net.output(net.node("MatMul", x, net.weight(np.zeros((1024, columns), np.float32)), name="y"), (1, columns))
    return net.model()


def test_memory_is_counted_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt_neuron import catalogue

    monkeypatch.setitem(catalogue.CHIP_MEMORY, "v2", 8 << 20)  # 4 MiB a core
    artifact = compiled(heavy(3))
    with accelrt.load(artifact, devices=0, fallback="error"):
        with pytest.raises(CoresUnavailable, match=r"session \d+"):  # who holds it is told
            accelrt.load(artifact, devices=0, fallback="error")
        accelrt.load(artifact, devices=1, fallback="error").close()
    accelrt.load(artifact, devices=0, fallback="error").close()
    with pytest.raises(OutOfDeviceMemory, match="status=4 message=Allocation Failure"):
        accelrt.load(compiled(heavy(5)), devices=0, fallback="error")
    accelrt.load(artifact, devices="0-1", fallback="error").close()


def test_cores_of_an_inf1_borrow_from_their_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelrt_neuron import catalogue

    monkeypatch.setitem(catalogue.CHIP_MEMORY, "v1", 8 << 20)  # 2 MiB a core
    artifact = compiled(heavy(3), instance="inf1.6xlarge")
    with (
        accelrt.load(artifact, devices=0, fallback="error"),
        accelrt.load(artifact, devices=1, fallback="error"),
    ):
        with pytest.raises(OutOfDeviceMemory):
            accelrt.load(artifact, devices=2, fallback="error")
        accelrt.load(artifact, devices=4, fallback="error").close()  # another chip


def test_a_load_that_fails_gives_its_memory_back(tmp_path: Path) -> None:
    from accelrt_neuron import emulator

    artifact = compiled(product())
    (segment,) = artifact.manifest.segments
    engine = EmulatorEngine()
    model = tmp_path / "model.onnx"
    model.write_bytes(b"no model")
    facts = artifact.folder / segment.files["neuron.json"]
    options = EmulatorOptions()
    from accelrt.backend import Program

    files = {"model.onnx": model, "neuron.json": facts}
    before = dict(emulator._CHIPS._used)
    with pytest.raises(IncompatibleProgram):
        engine.load(Program(files, {}, artifact.signature, options, "bf16"), engine.devices() or ())
    assert {k: v for k, v in emulator._CHIPS._used.items() if v} == {k: v for k, v in before.items() if v}
    facts = tmp_path / "facts.json"
    facts.write_text('{"instance": "inf9"}')
    with pytest.raises(IncompatibleProgram, match="does not say what it was made for"):
        engine.load(Program({**files, "neuron.json": facts}, {}, artifact.signature, options, "bf16"), ())


def test_cores_that_the_instance_has_not_got_are_the_vendors_error() -> None:
    artifact = compiled(product())
    from accelrt.artifact.store import program_files
    from accelrt.backend import Program

    (segment,) = artifact.manifest.segments
    program = Program(program_files(artifact.folder, segment), {}, artifact.signature, EmulatorOptions(), "bf16")
    with pytest.raises(CoresUnavailable, match=r"NeuronCore\(s\) not available - Requested:nc7-nc7 Available:2"):
        EmulatorEngine().load(program, [Device("neuron", 7, "core 7")])


def test_a_segment_with_an_open_size_does_not_compile(tmp_path: Path) -> None:
    from accelrt.backend import CompileJob
    from accelrt.graph.weights import WeightFile

    graph = load_graph(small_cnn())
    weights = WeightFile(tmp_path / "weights.bin")
    graph.write(tmp_path / "m.onnx", weights)
    weights.close()
    (tmp_path / "out").mkdir()
    job = CompileJob(tmp_path / "m.onnx", graph.signature, "bf16", EmulatorOptions())
    with pytest.raises(CompileError, match="static shapes"):
        EmulatorEngine().compile(job, tmp_path / "out")


def test_comparisons_see_rounded_values() -> None:
    """Two floats that differ in the ninth bit are one number to a core that reads bfloat16."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in "ab"]
    output = helper.make_tensor_value_info("y", TensorProto.BOOL, [2])
    graph = helper.make_graph([helper.make_node("Equal", ["a", "b"], ["y"], "equal")], "g", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    feeds = {"a": np.float32([1.0, 1.0]), "b": np.float32([1.001, 1.01])}
    assert predict(model, feeds)["y"].tolist() == [True, False]
    assert predict(model, feeds, precision="fp32")["y"].tolist() == [False, False]
