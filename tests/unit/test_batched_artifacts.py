"""compile(batch=..., cores=...) to the end: artifacts of variants and stages, saved, loaded, run, broken and mended."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from typer.testing import CliRunner

import accelrt
from accelrt.artifact.build import BuildRequest
from accelrt.artifact.manifest import MANIFEST, Manifest
from accelrt.artifact.parts import stages, variant
from accelrt.cli import app
from accelrt.errors import (
    AccelrtError,
    ArtifactVersionError,
    BatchError,
    CorruptArtifact,
    ExecutionError,
    InputError,
    OptionError,
    OutOfDeviceMemory,
    SessionClosed,
)
from accelrt.graph.types import TensorType
from accelrt.options import resolve
from accelrt.partition.report import Placement
from accelrt.partition.stages import StagePlan
from accelrt.registry import REGISTRY
from accelrt.runtime.batching import RequestBatcher
from accelrt.runtime.pool import KEPT
from accelrt.runtime.stage_times import measured_plan, segment_seconds
from accelrt.target import parse
from accelrt.testing import models
from accelrt.testing.fake import FakeBackend
from accelrt.tune.cuts import cut_tuner
from accelrt.verification import Verification, Verifier


def images(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 3, 16, 16), dtype=np.float32)


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    names = itertools.count()
    registered: list[str] = []

    def register(**behaviour: Any) -> str:
        name = f"fake{next(names)}"
        accelrt.register(FakeBackend.configured(name, **behaviour))
        registered.append(name)
        return name

    yield register
    for name in registered:
        REGISTRY.unregister(name)


def scores(x: np.ndarray) -> np.ndarray:
    with accelrt.load(models.small_cnn()) as session:
        return session.predict(x)["scores"]


WAYS: dict[str, dict[str, Any]] = {
    "one bucket": {"batch": 4},
    "buckets": {"batch": (1, 8)},
    "stages": {"cores": 3},
    "buckets of stages": {"batch": (2, 5), "cores": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("engine", ["onnxruntime", "reference"])
def test_every_batch_size_gets_the_answer_of_the_plain_model(way: str, engine: str, tmp_path: Path) -> None:
    artifact = accelrt.compile(models.small_cnn(), f"cpu/{engine}", **WAYS[way])
    path = artifact.save(tmp_path / "x.accel")
    x = images(19)
    wanted = scores(x)
    with accelrt.load(path) as session:
        for rows in (1, 2, 7, 8, 19):
            found = session.predict(x[:rows])["scores"]
            assert found.shape == (rows, 10)
            np.testing.assert_allclose(found, wanted[:rows], atol=1e-5)
        streamed = list(session.map(x[start : start + 3] for start in range(0, 18, 3)))
        np.testing.assert_allclose(np.concatenate([one["scores"] for one in streamed]), wanted[:18], atol=1e-5)
        stats = session.stats()
        assert (stats.calls, stats.errors, stats.fallbacks) == (11, 0, 0)
        assert stats.latency.n == 11
        assert set(stats.engines) == {f"cpu/{engine}"}
        assert f"cpu/{engine}" in repr(session)
    with pytest.raises(SessionClosed):
        session.predict(x)
    with pytest.raises(SessionClosed):
        session.submit(x)
    assert "closed" in repr(session)


def test_the_manifest_and_the_placement_say_what_was_made(tmp_path: Path) -> None:
    artifact = accelrt.compile(models.small_cnn(), batch=[8, 1, 8], cores=2)
    manifest = artifact.manifest
    assert manifest.batch_sizes == (1, 8) and manifest.stages == 2
    assert [(s.batch, s.stage) for s in manifest.segments] == [(1, 0), (1, 1), (8, 0), (8, 1)]
    assert [(s.batch, s.stage) for s in artifact.placement.segments] == [(1, 0), (1, 1), (8, 0), (8, 1)]
    assert manifest.options["cores"] == 2
    assert manifest.options["batch"] == {
        "sizes": [1, 8],
        "proved": True,
        "dimension": "batch",
        "reason": "each of 11 nodes keeps rows apart",
    }
    assert str(artifact.signature) == "(image: float32[batch, 3, 16, 16]) -> (scores: float32[batch, 10])"
    text = artifact.explain()
    assert "for batch sizes 1, 8" in text and "stage" in text
    assert Placement.from_json(artifact.placement.to_json()) == artifact.placement
    assert Manifest.parse(manifest.dump()) == manifest
    assert artifact.placement.segments[2].bytes_in == 8 * 3 * 16 * 16 * 4


def test_only_what_needs_it_has_the_new_schema() -> None:
    def schema(**how: Any) -> int:
        return int(json.loads(accelrt.compile(models.small_cnn(), **how).manifest.dump())["schema"])

    assert (schema(), schema(cores=2), schema(batch=1)) == (1, 1, 2)


def test_weights_are_stored_once(tmp_path: Path) -> None:
    model = models.mlp(hidden=(256, 256))
    one, three = (
        accelrt.compile(model, batch=batch).save(tmp_path / f"{len(batch)}.accel") for batch in ((1,), (1, 4, 8))
    )
    sizes = []
    for path in (one, three):
        with zipfile.ZipFile(path) as archive:
            sizes.append(archive.getinfo("weights.bin").file_size)
    assert sizes[1] < 1.05 * sizes[0]
    assert three.stat().st_size < 1.1 * one.stat().st_size
    bare = accelrt.compile(model, batch=(1, 4, 8)).save(tmp_path / "bare.accel", sources=False)
    with accelrt.load(bare) as session:
        assert session.predict(np.ones((13, 16), np.float32))["y"].shape == (13, 4)


def test_equal_questions_are_answered_from_the_cache() -> None:
    model = models.small_cnn()
    folders = [
        accelrt.compile(model, **how).folder.name
        for how in ({}, {"batch": 8}, {"batch": (1, 8)}, {"cores": 2}, {"cores": 3})
    ]
    assert len(set(folders)) == 5
    assert accelrt.compile(model, batch=[8, 1]).folder.name == folders[2]
    assert accelrt.compile(model, cores=1).folder.name == folders[0]  # one core needs no pipeline


def test_models_whose_rows_are_coupled_are_refused() -> None:
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy"]
    node = helper.make_node("Softmax", ["x"], ["y"], "soft", axis=0)
    graph = helper.make_graph([node], "g", ports[:1], ports[1:])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    with pytest.raises(BatchError, match=r"batch sizes 1, 8: at node 'soft' \(Softmax-13\): it computes over axis 0"):
        accelrt.compile(model, batch=(1, 8))
    with pytest.raises(BatchError, match="fixed to 1"):
        accelrt.compile(models.small_cnn(batch=1), batch=8)


@pytest.mark.parametrize("batch", [0, -1, (), (1, 0), 1.5, ("8",), True, 1 << 40])
def test_batch_sizes_are_positive_numbers(batch: Any) -> None:
    with pytest.raises(OptionError, match="batch takes"):
        accelrt.compile(models.mlp(), batch=batch)


@pytest.mark.parametrize("cores", [0, -1, 1.5, True, "2"])
def test_cores_are_a_positive_number(cores: Any) -> None:
    with pytest.raises(OptionError, match="cores takes"):
        accelrt.compile(models.mlp(), cores=cores)


@pytest.mark.parametrize("how", [{"batch": 2}, {"cores": 2}])
def test_what_is_not_offered_together_says_so(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("the model was read before the arguments were checked")

    monkeypatch.setattr("accelrt.sources.open_source", read)
    name = next(iter(how))
    with pytest.raises(OptionError, match=f"tune=True is not offered together with {name}"):
        accelrt.compile(models.mlp(), tune=True, **how)
    with pytest.raises(OptionError, match=f"'{name}' is not offered together with the target 'auto'"):
        accelrt.compile(models.mlp(), "auto", **how)


def test_a_cut_is_not_refined_for_parts() -> None:
    plain = accelrt.compile(models.mlp(), cores=1, tune=True)  # one core needs no pipeline
    assert plain.placement.tuning is not None
    graph, candidates = plain.source_graph(), REGISTRY.candidates(parse("cpu"))
    resolved, refine = resolve(None, candidates), cut_tuner(graph.signature, candidates, parse("cpu"), None)
    with pytest.raises(OptionError, match="together with batch"):
        BuildRequest("cpu", candidates, resolved, "onnx", batch=(1, 2), refine=refine)


def test_a_reference_that_is_known_is_all_that_is_compared() -> None:
    artifact = accelrt.compile(models.small_cnn(), batch=(1, 4))
    graph = artifact.source_graph()
    fresh = Verifier(graph, Verification())
    calls, wanted = fresh.reference()
    assert fresh.verify(artifact).calls == len(calls) + 2
    assert Verifier(graph, Verification(), known=wanted).verify(artifact).calls == len(calls)


def test_more_cores_than_nodes_is_an_error() -> None:
    with pytest.raises(OptionError, match="9 stages, and has 5 nodes"):
        accelrt.compile(models.mlp(), cores=9)


def test_inputs_are_checked_before_they_are_divided() -> None:
    with accelrt.load(accelrt.compile(models.bert_base(layers=1, hidden=8, heads=2, vocabulary=9), batch=2)) as session:
        feeds = {name: np.zeros((3, 4), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        assert session.predict(feeds)["pooler_output"].shape == (3, 8)
        with pytest.raises(InputError, match="as many rows"):
            session.predict({**feeds, "input_ids": np.zeros((2, 4), np.int64)})
        with pytest.raises(ExecutionError, match="cannot be traced"):
            next(session.trace(feeds))
        with pytest.raises(InputError):
            session.predict(np.zeros((3, 4), np.float32), *list(feeds.values())[1:])


def test_a_pipeline_answers_wrong_inputs_in_the_future() -> None:
    with accelrt.load(accelrt.compile(models.small_cnn(), cores=2)) as session:
        wrong, right = session.submit(np.zeros(3, np.float32)), session.submit(images(2))
        with pytest.raises(InputError):
            wrong.result(5)
        assert right.result(5)["scores"].shape == (2, 10)
        assert session.stats().errors == 1


def test_a_model_that_computes_nothing_takes_any_batch() -> None:
    ports = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])]
    model = helper.make_model(helper.make_graph([], "g", ports, ports), opset_imports=[helper.make_opsetid("", 17)])
    artifact = accelrt.compile(model, batch=(1, 8))
    assert artifact.manifest.batch_sizes == ()
    with accelrt.load(artifact) as session:
        assert session.predict(np.ones((5, 2), np.float32))["x"].shape == (5, 2)


def test_requests_are_batched_into_buckets_of_a_session(fake: Callable[..., str]) -> None:
    """The parts together: requests of many threads, gathered, padded to buckets, through stages, back to each."""
    x = images(64)
    wanted = scores(x)
    session = accelrt.load(accelrt.compile(models.small_cnn(), fake(latency_s=0.001), batch=(1, 8), cores=2))
    batcher = RequestBatcher(session, max_batch_size=8, max_queue_delay_us=3000, timeout=30)
    spans = [(start, start + 1 + start % 4) for start in range(60)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda span: batcher.run({"image": x[slice(*span)]})["scores"], spans))
    wrong, right = batcher.submit({"image": x[:1].astype(np.float64)}), batcher.submit({"image": x[:1]})
    with pytest.raises(InputError):
        wrong.result(5)
    assert right.result(5)["scores"].shape == (1, 10)
    stats = batcher.stats()
    batcher.close()
    for span, answer in zip(spans, answers, strict=True):
        np.testing.assert_allclose(answer, wanted[slice(*span)], atol=1e-5)
    assert stats.requests == 62 and stats.runs < 55
    with pytest.raises(SessionClosed):
        session.predict(x)


def test_padding_is_counted() -> None:
    with accelrt.load(accelrt.compile(models.small_cnn(), batch=(4, 6))) as session:
        session.predict(images(13))  # 6 + 4 + 4
        session.predict(images(4))
        assert session.stats().padding_rows == 1


def test_stages_of_a_cpu_engine_use_one_core_each() -> None:
    def threads(**how: Any) -> Any:
        return accelrt.compile(models.small_cnn(), **how).manifest.segments[0].options["threads"]

    assert (threads(), threads(cores=2), threads(cores=2, options={"threads": 2})) == (0, 1, 2)


def test_measured_stages_are_cut_where_the_time_goes(fake: Callable[..., str]) -> None:
    """On an accelerator whose every segment takes the same time but one, estimates are wrong and measuring helps."""
    target = fake(latency_s=0.0)
    model = models.small_cnn(batch=1)
    artifact = accelrt.compile(model, target, cores=2)
    assert artifact.manifest.options["stage_costs"] == "estimated"
    seconds = segment_seconds(artifact, [images(1)], repeat=3)
    assert len(seconds) == 2 and all(0 < one < 5 for one in seconds)
    plan = measured_plan(artifact, [images(1)], repeat=3)
    assert plan.count == 2 and plan.costs is not None
    assert set(plan.costs) == {node.name for node in artifact.source_graph().nodes}
    # As if the first node took nearly half of the time: it is alone with what belongs to its kernel.
    first = artifact.source_graph().nodes[0].name
    skewed = StagePlan(2, {**dict.fromkeys(plan.costs, 1.0), first: 8.0})
    again = accelrt.compile(model, target, cores=skewed)
    assert again.manifest.options["stage_costs"] == "given"
    assert [len(segment.nodes) for segment in again.placement.segments] == [3, 8]


def test_a_part_that_cannot_be_loaded_leaves_no_threads(fake: Callable[..., str]) -> None:
    target = fake(memory_bytes=None)
    artifact = accelrt.compile(models.small_cnn(), target, batch=(1, 2), cores=2)
    engine = REGISTRY.backend(target).engines[0]
    loads = itertools.count()
    whole = engine.load

    def load(program: Any, devices: Any) -> Any:
        if next(loads) == 3:
            raise OutOfDeviceMemory("full")
        return whole(program, devices)

    engine.load = load  # type: ignore[method-assign]
    before = threading.active_count()
    with pytest.raises(OutOfDeviceMemory):
        accelrt.load(artifact, fallback="error")
    assert threading.active_count() == before
    assert next(loads) == 4


def test_what_cannot_be_measured_says_so() -> None:
    plain, piped = accelrt.compile(models.small_cnn()), accelrt.compile(models.small_cnn(), cores=2, batch=(1, 2))
    with pytest.raises(OptionError, match="no pipeline"):
        measured_plan(plain, [images(1)])
    with pytest.raises(OptionError, match="no calls"):
        measured_plan(piped, [])
    assert measured_plan(piped, [images(2)], repeat=1).count == 2


@pytest.mark.parametrize("wrong", [{"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_costs_are_numbers(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match="cost of node 'a'"):
        StagePlan(2, wrong)


def test_the_command_line_compiles_them_too(tmp_path: Path) -> None:
    model, out = tmp_path / "m.onnx", tmp_path / "m.accel"
    onnx.save(models.small_cnn(), model)
    done = CliRunner().invoke(app, ["compile", str(model), "-o", str(out), "--batch", "1,4", "--cores", "2"])
    assert done.exit_code == 0, done.output
    with accelrt.load(out) as session:
        assert session.predict(images(5))["scores"].shape == (5, 10)
    assert CliRunner().invoke(app, ["compile", str(model), "-o", str(out), "--batch", "few"]).exit_code == 2


def test_stages_overlap(fake: Callable[..., str]) -> None:
    """Three stages of 20 ms each: a stream of 20 takes little more than 20 times one of them."""
    import time

    target = fake(latency_s=0.02)
    with accelrt.load(accelrt.compile(models.small_cnn(), target, cores=3)) as session:
        session.predict(images(1))
        start = time.perf_counter()
        assert len(list(session.map([(images(1),)] * 20))) == 20
        took = time.perf_counter() - start
    assert took < 0.9  # one after another: 1.2 s


def test_pieces_of_several_engines_are_cut_into_stages(fake: Callable[..., str]) -> None:
    target = fake(operators={"Conv", "Gemm"})
    artifact = accelrt.compile(models.small_cnn(), target, cores=2, batch=(1, 4), fallback="allow")
    assert {s.engine for s in artifact.placement.segments} == {f"{target}/fake", "cpu/onnxruntime"}
    for batch in (1, 4):
        order = [s.stage for s in artifact.placement.segments if s.batch == batch]
        assert order == sorted(order) and set(order) == {0, 1}
    x = images(6)
    with accelrt.load(artifact) as session:
        np.testing.assert_allclose(session.predict(x)["scores"], scores(x), atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_cpu_takes_over_in_any_part(way: str, fake: Callable[..., str]) -> None:
    target = fake(lost_after=1)
    artifact = accelrt.compile(models.small_cnn(), target, **WAYS[way])
    x = images(9)
    with accelrt.load(artifact, fallback="allow") as session:
        found = [session.predict(x)["scores"] for _ in range(2)]
        assert session.stats().fallbacks > 0
    for one in found:
        np.testing.assert_allclose(one, scores(x), atol=1e-5)
    with accelrt.load(artifact, fallback="error") as session, pytest.raises(ExecutionError, match="device is gone"):
        for _ in range(3):
            session.predict(x)


def test_one_failed_item_of_a_stream_fails_alone(fake: Callable[..., str]) -> None:
    target = fake(fails_to_run=lambda kinds, call: "Gemm" in kinds and call == 2)
    with accelrt.load(accelrt.compile(models.small_cnn(), target, cores=2), fallback="error") as session:
        futures = [session.submit(images(1, seed)) for seed in range(6)]
        failed = [isinstance(future.exception(10), ExecutionError) for future in futures]
        assert failed == [False, False, True, False, False, False]
        assert session.stats().errors == 1


def test_an_endless_stream_takes_bounded_memory() -> None:
    read = itertools.count()

    def source() -> Iterator[np.ndarray]:
        while True:
            next(read)
            yield images(2)

    with accelrt.load(accelrt.compile(models.small_cnn(), cores=2, batch=(1, 2))) as session:
        ahead = 0
        for done, outputs in enumerate(session.map(source())):
            assert outputs["scores"].shape == (2, 10)
            ahead = max(ahead, int(read.__reduce__()[1][0]) - done)
            if done == 300:
                break
        assert ahead <= KEPT * session.capacity + 1


def test_many_threads_share_a_session() -> None:
    x = images(40)
    wanted = scores(x)
    wrong: list[str] = []
    with accelrt.load(accelrt.compile(models.small_cnn(), batch=(1, 3), cores=2)) as session:

        def client(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(30):
                start = int(rng.integers(0, 30))
                rows = int(rng.integers(1, 10))
                found = session.predict(x[start : start + rows])["scores"]
                if not np.allclose(found, wanted[start : start + rows], atol=1e-5):
                    wrong.append(f"{seed}: {start}+{rows}")

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_an_artifact_of_another_toolchain_is_compiled_again_as_it_was(
    fake: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = fake(version="1")
    path = accelrt.compile(models.small_cnn(), target, batch=(2, 4), cores=2).save(tmp_path / "x.accel")
    engine = REGISTRY.backend(target).engines[0]
    monkeypatch.setattr(type(engine), "fingerprint", lambda self: {"fake": "2"})
    x = images(5)
    with accelrt.load(path, fallback="allow") as session:
        np.testing.assert_allclose(session.predict(x)["scores"], scores(x), atol=1e-5)
        assert session.stats().engines == (f"{target}/fake",) * 4


@pytest.mark.parametrize("way", WAYS)
def test_verification_covers_every_variant(way: str, fake: Callable[..., str]) -> None:
    artifact = accelrt.compile(models.small_cnn(), verify=True, **WAYS[way])
    assert artifact.verification is not None and artifact.verification.passed

    def wrong(kinds: tuple[str, ...], outputs: dict[str, Any]) -> dict[str, Any]:
        largest = max((np.atleast_1d(WAYS[way].get("batch", 1))).tolist())
        return {n: v + 1 if v.shape[0] == largest and "Gemm" in kinds else v for n, v in outputs.items()}

    target = fake(distorts=wrong)
    request = Verification(localise=True)
    with pytest.raises(accelrt.errors.VerificationError) as caught:
        accelrt.compile(models.small_cnn(), target, verify=request, **WAYS[way])
    culprit = caught.value.report.culprit
    assert culprit is not None and culprit.engine == f"{target}/fake"


def test_parts_are_artifacts_of_their_own() -> None:
    artifact = accelrt.compile(models.small_cnn(), batch=(1, 4), cores=2)
    part = variant(artifact, 4)
    assert part.signature.inputs[0].type == TensorType("float32", (4, 3, 16, 16))
    assert part.signature.outputs[0].type == TensorType("float32", (4, 10))
    assert part.manifest.batch_sizes == () and part.manifest.stages == 2
    assert len(part.placement.segments) == len(part.manifest.segments) == 2
    assert part.source_graph().signature == part.signature
    assert part.verification is None
    first, second = stages(part)
    assert first.signature.input_names == ("image",)
    assert second.signature.output_names == ("scores",)
    assert first.signature.outputs == second.signature.inputs
    del artifact
    assert part.folder.exists()


def altered(path: Path, change: Callable[[dict[str, Any]], None], target: Path) -> Path:
    """Rewrite the manifest of an artifact; it holds no hash of itself."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            if name == MANIFEST:
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            new.writestr(name, data)
    return target


ATTACKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "no number": lambda m: m["segments"][0].update(batch="8"),
    "no rows": lambda m: m["segments"][0].update(batch=0),
    "too many rows": lambda m: m["segments"][0].update(batch=1 << 62),
    "true": lambda m: m["segments"][0].update(batch=True),
    "descending": lambda m: m["segments"].reverse(),
    "twice": lambda m: m["segments"].append(dict(m["segments"][0])),
    "one for any batch": lambda m: m["segments"][0].pop("batch"),
    "half a variant": lambda m: m["segments"].pop(1),
    "a stage left out": lambda m: [s.update(stage=2 * s["stage"]) for s in m["segments"]],
    "stages from one": lambda m: [s.update(stage=s["stage"] + 1) for s in m["segments"]],
    "a stage missing": lambda m: m["segments"][0].pop("stage"),
    "stages for one size": lambda m: [s.pop("stage") for s in m["segments"] if s["batch"] == 4],
    "a negative stage": lambda m: m["segments"][0].update(stage=-1),
    "a scalar model": lambda m: m["signature"]["inputs"][0]["type"].update(shape=[]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_manifests_that_contradict_themselves_are_refused(attack: str, tmp_path: Path) -> None:
    path = accelrt.compile(models.small_cnn(), batch=(1, 4), cores=2).save(tmp_path / "good.accel")
    with pytest.raises(CorruptArtifact):
        accelrt.load(altered(path, ATTACKS[attack], tmp_path / "bad.accel"))


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["batch", "stage"]), st.integers(0, 5)), max_size=3))
@settings(max_examples=40, deadline=None)
def test_altered_parts_are_refused_or_answer_rightly(changes: list[tuple[int, str, int]]) -> None:
    x = images(5)
    with tempfile.TemporaryDirectory() as folder:
        path = accelrt.compile(models.small_cnn(), batch=(1, 4), cores=2).save(Path(folder) / "good.accel")

        def change(document: dict[str, Any]) -> None:
            for segment, field, value in changes:
                document["segments"][segment][field] = value

        try:
            with accelrt.load(altered(path, change, Path(folder) / "bad.accel"), fallback="allow") as session:
                found = session.predict(x)["scores"]
        except AccelrtError:
            return
        np.testing.assert_allclose(found, scores(x), atol=1e-5)


def test_readers_know_what_they_cannot_read(tmp_path: Path) -> None:
    path = accelrt.compile(models.small_cnn(), batch=(1, 4)).save(tmp_path / "good.accel")
    with pytest.raises(ArtifactVersionError, match="schema 3"):
        accelrt.load(altered(path, lambda m: m.update(schema=3), tmp_path / "new.accel"))
    # In schema 1 there are no batch sizes: the field is ignored, and two programs give the same output.
    old = altered(path, lambda m: m.update(schema=1), tmp_path / "old.accel")
    assert accelrt.artifact.artifact.open_artifact(old).manifest.batch_sizes == ()  # type: ignore[attr-defined]


@pytest.mark.suite
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_resnet_in_stages_agrees_with_resnet() -> None:
    x = np.random.default_rng(0).standard_normal((3, 3, 224, 224), dtype=np.float32)
    model: onnx.ModelProto = models.resnet50()
    with accelrt.load(model) as plain:
        wanted = plain.predict(x)["scores"]
    with accelrt.load(accelrt.compile(model, batch=(1, 2), cores=3)) as session:
        found = np.concatenate([one["scores"] for one in session.map([x[:1], x[1:]])])
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=1e-3)
