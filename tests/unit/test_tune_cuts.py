"""``tune=True`` end to end: stand-ins for accelerators with slow links and fast ones, really measured."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import accelrt
from accelrt.artifact.artifact import Artifact, open_artifact
from accelrt.backend import Caps
from accelrt.cli import app
from accelrt.errors import CompileError, CoresUnavailable, ExecutionError, InputError, UnsupportedNodes
from accelrt.partition.report import MEASURED, Placement
from accelrt.registry import REGISTRY
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import bert_base, mlp, small_cnn
from accelrt.tune.contest import TOLERATED
from accelrt.tune.cuts import MAX_ALONE, MAX_COMPILES
from accelrt_cpu.onnxruntime import OnnxRuntimeEngine

SLOW_LINK = 1e6
"""A megabyte a second: 4 kB take four milliseconds."""


@pytest.fixture(autouse=True)
def _no_fake_stays() -> Iterator[None]:
    yield
    REGISTRY.unregister("fake")


def fake(**behaviour: Any) -> None:
    accelrt.register(FakeBackend.configured("fake", **behaviour))


def compiled(model: Any, target: str = "fake", **arguments: Any) -> Artifact:
    return accelrt.compile(model, target, **{"tune": True, "fallback": "allow", **arguments})


def engines(artifact: Artifact) -> list[str]:
    return [segment.engine for segment in artifact.placement.segments]


def check_result(artifact: Artifact, model: Any, inputs: Mapping[str, Any]) -> None:
    """A cut changes where a model runs, not what it computes."""
    with accelrt.load(artifact) as tuned, accelrt.load(model, backend="cpu/onnxruntime") as plain:
        found, wanted = tuned.predict(inputs), plain.predict(inputs)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)


def model_of(nodes: list[Any], inputs: Mapping[str, Any], outputs: Mapping[str, Any], weights: Any = ()) -> Any:
    ports = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in p.items()] for p in (inputs, outputs)]
    graph = helper.make_graph(nodes, "model", *ports, initializer=list(weights))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def one_that_pays_and_one_that_does_not() -> Any:
    """MatMuls that take the CPU long and move little, then a Neg that takes no time and moves 12 MB each way."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_normal((768, 768)) / 28).astype(np.float32), f"w{layer}")
        for layer in range(12)
    ]
    nodes = [
        helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"], f"matmul{layer}")
        for layer in range(12)
    ]
    weights.append(numpy_helper.from_array(np.array([32, 1], np.int64), "times"))
    nodes += [
        helper.make_node("Tile", ["x12", "times"], ["wide"], "tile"),
        helper.make_node("Neg", ["wide"], ["minus"], "neg"),
        helper.make_node("ReduceMax", ["minus"], ["y"], "max", keepdims=0),
    ]
    return model_of(nodes, {"x0": [128, 768]}, {"y": []}, weights)


# ---------------------------------------------------------------- what is kept


def test_islands_on_a_slow_link_return_to_the_cpu() -> None:
    model = small_cnn(batch=1)
    fake(operators={"Conv"}, bytes_per_s=SLOW_LINK)
    artifact = compiled(model)
    assert engines(artifact) == ["cpu/onnxruntime"]
    assert set(engines(compiled(model, tune=False))) == {"fake/fake", "cpu/onnxruntime"}
    placement = artifact.placement
    moved = [refusal for refusal in placement.refusals if refusal.reason.startswith(MEASURED)]
    assert {refusal.kind for refusal in moved} == {"Conv-11"}
    assert len(moved) == 2
    assert all("there with its transfer against" in r.reason and "on cpu/onnxruntime" in r.reason for r in moved)
    tuning = placement.tuning
    assert tuning is not None
    assert tuning.cpu_seconds is not None
    assert tuning.seconds <= 1.05 * tuning.cpu_seconds < tuning.first_seconds
    assert (tuning.first_segments, tuning.cpu_segments) == (len(compiled(model, tune=False).placement.segments), 1)
    check_result(artifact, model, {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)})


def test_an_accelerator_that_costs_nothing_is_kept() -> None:
    """One segment either way and the same kernels: a tie, which goes to what was asked for."""
    fake()
    model = mlp(batch=64, features=512, hidden=(1024, 1024))
    for _ in range(5):  # of two equals, a busy machine may favour one by more than a tie allows
        artifact = compiled(model, cache=False)
        tuning = artifact.placement.tuning
        assert tuning is not None
        assert tuning.cpu_seconds is not None
        assert tuning.seconds <= (1 + TOLERATED) * tuning.cpu_seconds
        if engines(artifact) == ["fake/fake"]:
            assert artifact.placement.share_of_time_elsewhere == 0.0
            return
        assert tuning.cpu_seconds < tuning.first_seconds
    pytest.fail("a tie never went to the engine that was asked for")


def test_a_fast_accelerator_is_kept() -> None:
    fake(recalls=True)
    artifact = compiled(mlp(batch=64, features=512, hidden=(1024, 1024)))
    assert engines(artifact) == ["fake/fake"]
    tuning = artifact.placement.tuning
    assert tuning is not None
    assert tuning.cpu_seconds is not None
    assert tuning.seconds < tuning.cpu_seconds


def test_of_two_islands_only_the_one_that_loses_moves() -> None:
    model = one_that_pays_and_one_that_does_not()
    fake(operators={"MatMul", "Neg"}, recalls=True, bytes_per_s=1e9)
    artifact = compiled(model)
    where = {node.name: segment.engine for segment in artifact.placement.segments for node in segment.nodes}
    assert where["neg"] == "cpu/onnxruntime"
    assert {where[f"matmul{layer}"] for layer in range(12)} == {"fake/fake"}
    assert engines(artifact) == ["fake/fake", "cpu/onnxruntime"]
    assert [r.node for r in artifact.placement.refusals if r.reason.startswith(MEASURED)] == ["neg"]
    tuning = artifact.placement.tuning
    assert tuning is not None
    assert tuning.cpu_seconds is not None
    assert tuning.seconds < tuning.first_seconds
    assert tuning.seconds < tuning.cpu_seconds
    check_result(artifact, model, {"x0": np.random.default_rng(0).standard_normal((128, 768), np.float32)})


def test_the_requested_engine_is_the_cpus_own_and_is_measured_only() -> None:
    artifact = compiled(mlp(batch=1), "cpu/onnxruntime")
    assert engines(artifact) == ["cpu/onnxruntime"]
    tuning = artifact.placement.tuning
    assert tuning is not None
    assert (tuning.cuts, tuning.cpu_seconds) == (1, None)
    assert artifact.placement.share_of_time_elsewhere == 0.0


def test_what_only_the_accelerator_and_the_last_resort_run_is_weighed_against_the_last_resort() -> None:
    """No island moves to a last resort by itself; the CPU alone is measured all the same, and wins where it is faster."""

    class Slow(OnnxRuntimeEngine):
        caps = Caps(last_resort=True)

    cpu = REGISTRY.backend("cpu")
    whole = cpu.engines
    fake(latency_s=0.02)
    try:
        cpu.engines = tuple(Slow() if engine.name == "onnxruntime" else engine for engine in whole)
        kept = compiled(mlp(batch=1))
    finally:
        cpu.engines = whole
    assert engines(kept) == ["fake/fake"], "with nothing but last resorts nothing is searched"
    assert engines(compiled(mlp(batch=2))) == ["cpu/onnxruntime"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_plan_that_holds_the_cpus_engine_twice(precision: Any) -> None:
    """fake, then the CPU's engines in int8, then in fp32: islands go to the first of them that takes them."""
    model = small_cnn(batch=1)
    images = [np.random.default_rng(seed).standard_normal((1, 3, 16, 16), np.float32) for seed in range(3)]
    fake(operators={"Conv"}, precisions=("fp32", "bf16", "int8"), bytes_per_s=SLOW_LINK)
    more = {"calibration": images} if precision == "int8" else {}
    artifact = compiled(model, precision=precision, **more)
    assert set(engines(artifact)) == {"cpu/onnxruntime"}
    expected = "int8" if precision == "int8" else "fp32"
    assert {segment.precision for segment in artifact.placement.segments} == {expected}
    share = artifact.placement.share_of_time_elsewhere
    assert share == 1.0
    with accelrt.load(artifact) as session:
        assert session.predict(images[0])["scores"].shape == (1, 10)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_the_cpus_own_engine_is_no_heir_of_itself_in_another_precision(precision: Any) -> None:
    images = [np.random.default_rng(seed).standard_normal((1, 3, 16, 16), np.float32) for seed in range(3)]
    more = {"calibration": images} if precision == "int8" else {}
    artifact = compiled(small_cnn(batch=1), "cpu/onnxruntime", precision=precision, **more)
    tuning = artifact.placement.tuning
    assert tuning is not None
    assert tuning.cuts == 1
    assert not [r for r in artifact.placement.refusals if r.reason.startswith(MEASURED)]


def test_an_island_that_the_cpu_fails_to_compile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxRuntimeEngine.compile

    def compile_(self: Any, job: Any, out: Path) -> Any:
        # The stand-in computes with this engine too, and must still have it.
        by_the_stand_in = any(frame.filename.endswith("fake.py") for frame in inspect.stack())
        kinds = [node.op_type for node in onnx.load(job.model, load_external_data=False).graph.node]
        if "Conv" in kinds and not by_the_stand_in:
            raise CompileError("told to fail on convolutions")
        return real(self, job, out)

    monkeypatch.setattr(OnnxRuntimeEngine, "compile", compile_)
    fake(operators={"Conv"}, latency_s=0.002)
    artifact = compiled(small_cnn(batch=1), cache=False)
    assert "fake/fake" in engines(artifact)
    tuning = artifact.placement.tuning
    assert tuning is not None
    assert tuning.cpu_seconds is None, "the CPU alone could not be had"


# ---------------------------------------------------------------- how much it may cost


def test_a_bert_of_many_islands_takes_a_bounded_number_of_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert_base(batch=1, sequence=8, layers=12, hidden=32, heads=2, vocabulary=50)
    fake(operators={"MatMul", "Softmax"}, latency_s=0.0005)
    first = len(compiled(model, tune=False, cache=False).placement.segments)
    assert first > 50
    count = 0
    real = OnnxRuntimeEngine.compile

    def compile_(self: Any, job: Any, out: Path) -> Any:
        nonlocal count
        count += 1
        return real(self, job, out)

    monkeypatch.setattr(OnnxRuntimeEngine, "compile", compile_)
    ids = np.ones((1, 8), np.int64)
    inputs = {"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids}
    artifact = compiled(model, cache=False, example_inputs=inputs)
    assert count <= first + MAX_COMPILES + 1
    assert count <= first + MAX_ALONE + 12, "layers that look alike are compiled once"
    assert engines(artifact) == ["cpu/onnxruntime"]
    text = artifact.explain()
    assert len([line for line in text.splitlines() if MEASURED.split(",")[0] in line]) <= 8
    assert len(text.splitlines()) < 120
    check_result(artifact, model, inputs)


# ---------------------------------------------------------------- what it measures with


def test_the_second_call_is_answered_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_cnn(batch=1)
    fake(operators={"Conv"}, bytes_per_s=SLOW_LINK)
    first = compiled(model)
    monkeypatch.setattr("accelrt.tune.cuts.settle", lambda *_, **__: pytest.fail("measured again"))
    second = compiled(model)
    assert second.placement == first.placement
    assert compiled(model, tune=False).placement.tuning is None, "another key"


def test_other_inputs_and_another_link_are_other_questions() -> None:
    model = mlp(batch=1)
    fake(bytes_per_s=1e5)
    drawn = compiled(model)
    x = np.zeros((1, 16), np.float32)
    given = compiled(model, example_inputs=[x])
    other = compiled(model, example_inputs=[x + 1])
    verified = compiled(model, verify={"x": x})
    names = [a.placement.tuning.inputs for a in (drawn, given, other, verified) if a.placement.tuning]
    assert names == ["random", "given", "given", "given"]
    assert len({artifact.folder for artifact in (drawn, given, other, verified)}) == 4
    assert engines(drawn) == ["cpu/onnxruntime"]
    fake(recalls=True)
    tuning = compiled(model).placement.tuning
    assert tuning is not None
    assert tuning.first_seconds < 1e-3, "the cache answered for a slower link"


def test_symbolic_dimensions_are_drawn_as_they_are_accepted() -> None:
    """A model that takes no batch of 1: both random sizes are tried, and then the user is asked."""
    halves = numpy_helper.from_array(np.array([2, 2], np.int64), "halves")
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b"], "split", axis=0),
        helper.make_node("Add", ["a", "b"], ["y"], "add"),
    ]
    even = model_of(nodes, {"x": ["n", 4]}, {"y": ["m", 4]})
    fake(operators={"Add"}, latency_s=0.002)
    artifact = compiled(even)
    assert engines(artifact) == ["cpu/onnxruntime"]
    four = model_of(
        [helper.make_node("Reshape", ["x", "halves"], ["y"], "four")], {"x": ["n"]}, {"y": [2, 2]}, [halves]
    )
    fake()
    with pytest.raises(InputError, match="fails on random inputs") as caught:
        compiled(four)
    assert "example_inputs" in str(caught.value)
    assert engines(compiled(four, example_inputs=[np.arange(4, dtype=np.float32)]))


def test_inputs_that_the_model_fails_on_are_an_error_of_their_own() -> None:
    fake(fails_to_run=lambda kinds, call: True)
    with pytest.raises(ExecutionError, match="fake/fake failed"):
        compiled(mlp(batch=1), example_inputs=[np.zeros((1, 16), np.float32)])


def test_without_a_device_nothing_can_be_measured() -> None:
    fake(devices=0)
    with pytest.raises(CoresUnavailable, match="tune=True measures") as caught:
        compiled(mlp(batch=1))
    assert "without tune" in str(caught.value)
    assert compiled(mlp(batch=1), tune=False)


def test_a_device_with_room_for_one_program_only() -> None:
    """Islands and what they merge into do not fit side by side; the search goes on with what does."""
    fake(operators={"Conv"}, memory_bytes=1 << 20, latency_s=0.002)
    assert engines(compiled(small_cnn(batch=1))) == ["cpu/onnxruntime"]


def test_who_forbids_fallback_is_told_what_was_measured() -> None:
    fake(bytes_per_s=SLOW_LINK)
    with pytest.raises(UnsupportedNodes, match="supported, but measured"):
        compiled(mlp(batch=64), fallback="error")


# ---------------------------------------------------------------- what is shown


def test_explain_shows_times_and_the_share_off_the_accelerator() -> None:
    fake(operators={"MatMul", "Neg"}, recalls=True, bytes_per_s=1e9)
    artifact = compiled(one_that_pays_and_one_that_does_not())
    text = artifact.explain()
    assert "time" in text.splitlines()[2]
    share = artifact.placement.share_of_time_elsewhere
    assert share is not None
    assert 0 < share < 1
    assert f"Time off fake/fake: {100 * share:.0f} % (fake/fake " in text
    assert "Measured with random inputs: " in text
    assert "First cut: " in text
    assert "The CPU alone: " in text
    plain = compiled(one_that_pays_and_one_that_does_not(), tune=False).explain()
    assert "Time off" not in plain
    assert "time" not in plain.splitlines()[2]


def test_a_placement_survives_json_with_and_without_times(tmp_path: Path) -> None:
    fake(operators={"Conv"}, bytes_per_s=SLOW_LINK)
    tuned, untuned = compiled(small_cnn(batch=1)), compiled(small_cnn(batch=1), tune=False)
    for artifact in (tuned, untuned):
        document = json.loads(json.dumps(artifact.placement.to_json()))
        assert Placement.from_json(document) == artifact.placement
        with accelrt.load(artifact.save(tmp_path / "x.accel")) as session:
            assert session.signature == artifact.signature
    document = untuned.placement.to_json()
    assert "tuning" not in document
    assert all("seconds" not in segment for segment in document["segments"])


@pytest.mark.parametrize("bad", [-1, "1", True, None, float("inf"), float("nan"), 10**400, []])
def test_times_that_are_none_are_refused(bad: Any) -> None:
    fake(bytes_per_s=SLOW_LINK)
    document = compiled(mlp(batch=1)).placement.to_json()
    segment = {**document, "segments": [{**document["segments"][0], "seconds": bad}]}
    with pytest.raises((TypeError, ValueError)):
        Placement.from_json(segment)
    for field in dataclasses.fields(compiled(mlp(batch=1)).placement.tuning or pytest.fail("not tuned")):
        if (field.name, bad) in (("cpu_seconds", None), ("inputs", "1")):
            continue
        if field.type == "int" and bad in (-1, 10**400):
            continue  # sizes are whole numbers, as everywhere in a placement
        with pytest.raises((TypeError, ValueError)):
            Placement.from_json({**document, "tuning": {**document["tuning"], field.name: bad}})


def test_an_artifact_that_is_compiled_again_says_that_it_is_not_tuned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake(recalls=True)
    path = compiled(mlp(batch=64, features=512, hidden=(1024, 1024))).save(tmp_path / "x.accel")
    fake(version="2")
    assert "fake/fake" in engines(open_artifact(path))
    with accelrt.load(path, fallback="warn"):
        assert "not tuned again" in caplog.text


def test_the_command_line_tunes(tmp_path: Path) -> None:
    fake(bytes_per_s=SLOW_LINK)
    model = tmp_path / "mlp.onnx"
    onnx.save(mlp(batch=1), model)
    arguments = [
        "compile",
        str(model),
        "-o",
        str(tmp_path / "mlp.accel"),
        "-b",
        "fake",
        "--fallback",
        "allow",
        "--tune",
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "Measured with random inputs" in shown.stdout
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert document["nodes_by_engine"] == {"cpu/onnxruntime": 5}
    assert document["tuning"]["cpu_segments"] == 1
    assert (
        CliRunner().invoke(app, ["explain", str(tmp_path / "mlp.accel")]).stdout.count("Time off fake/fake: 100 %") == 1
    )
