"""Artifacts: saved, loaded elsewhere, shared by processes, and compiled again where they do not fit."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import accelrt
from accelrt.artifact.cache import Cache, cache_folder, cache_limit
from accelrt.artifact.manifest import Manifest
from accelrt.errors import (
    ArtifactError,
    BackendUnavailable,
    CoresUnavailable,
    IncompatibleProgram,
    OptionError,
    OutOfDeviceMemory,
)
from accelrt.registry import REGISTRY
from accelrt.testing.fake import FakeBackend
from accelrt.testing.models import mlp, small_cnn

X = np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)


@pytest.fixture
def fake() -> Iterator[Callable[..., str]]:
    def make(**behaviour: Any) -> str:
        accelrt.register(FakeBackend.configured("artifact-fake", **behaviour))
        return "artifact-fake"

    yield make
    REGISTRY.unregister("artifact-fake")


@pytest.fixture(scope="module")
def scores() -> np.ndarray:
    with accelrt.load(accelrt.compile(small_cnn(), cache=False)) as session:
        return session.predict(X)["scores"]


def answers(path: Any, scores: np.ndarray, **arguments: Any) -> tuple[str, ...]:
    with accelrt.load(path, **arguments) as session:
        np.testing.assert_allclose(session.predict(X)["scores"], scores, rtol=1e-4, atol=1e-5)
        return session.stats().engines


# Saving and loading


def test_round_trip_from_another_place_under_another_name(tmp_path: Path, scores: np.ndarray) -> None:
    saved = accelrt.compile(small_cnn()).save(tmp_path / "model.accel")
    moved = tmp_path / "elsewhere" / "some model"
    moved.parent.mkdir()
    shutil.move(saved, moved)
    assert answers(moved, scores) == ("cpu/onnxruntime",)
    assert answers(str(moved), scores) == ("cpu/onnxruntime",)


def test_another_process_with_an_empty_cache(tmp_path: Path, scores: np.ndarray) -> None:
    saved = accelrt.compile(small_cnn()).save(tmp_path / "model.accel")
    np.savez(tmp_path / "io.npz", x=X, scores=scores)
    code = (
        "import sys, numpy as np, accelrt; io = np.load(sys.argv[2]);"
        "out = accelrt.load(sys.argv[1]).predict(io['x'])['scores'];"
        "np.testing.assert_allclose(out, io['scores'], rtol=1e-4, atol=1e-5); print('right')"
    )
    environment = {**os.environ, "ACCELRT_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):  # cold, then warm
        out = subprocess.run(
            [sys.executable, "-c", code, str(saved), str(tmp_path / "io.npz")],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert out.stdout == "right\n"
        assert out.stderr == ""
    assert len(list((tmp_path / "cache" / "artifacts").iterdir())) == 1


def test_equal_models_give_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the names that onnxruntime's optimiser makes up for nodes, which change from run to run."""
    artifacts = []
    for name in ("a", "b"):
        monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / name))
        artifacts.append(accelrt.compile(small_cnn()))
    first, second = ({n: r.sha256 for n, r in a.manifest.files.items()} for a in artifacts)
    assert {name for name in first if first[name] != second[name]} <= {"0.model.onnx"}
    programs = []
    for artifact in artifacts:
        program = onnx.load(artifact.folder / "0.model.onnx", load_external_data=False)
        for node in program.graph.node:
            node.name = ""
        programs.append(program.SerializeToString(deterministic=True))
    assert programs[0] == programs[1]
    # Packing adds nothing of its own: no time, no order.
    packed = [artifacts[0].save(tmp_path / f"{n}.accel").read_bytes() for n in range(2)]
    assert packed[0] == packed[1]


def test_weights_are_stored_once(tmp_path: Path, fake: Callable[..., str]) -> None:
    """MatMul weights are the same bytes in source and program; here two segments read one of them as well."""
    weight = np.random.default_rng(0).standard_normal((256, 256), dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"], name="second"),
    ]
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 256]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [onnx.numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    artifact = accelrt.compile(model, fake(operators={"MatMul"}), fallback="allow")
    assert len(artifact.placement.segments) == 3
    size = artifact.manifest.files["weights.bin"].size
    assert weight.nbytes <= size < 1.2 * weight.nbytes
    bare = artifact.save(tmp_path / "bare.accel", sources=False)
    with zipfile.ZipFile(bare) as archive:
        assert "source.onnx" not in archive.namelist()
        assert archive.getinfo("weights.bin").file_size <= size
    x = np.ones((1, 256), np.float32)
    with accelrt.load(bare) as session:
        np.testing.assert_allclose(session.predict(x)["y"], -(x @ weight) @ weight, rtol=1e-3, atol=1e-3)


def test_the_file_holds_what_the_format_says(tmp_path: Path) -> None:
    path = accelrt.compile(small_cnn()).save(tmp_path / "model.accel")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist()[0] == "manifest.json"
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        manifest = Manifest.parse(archive.read("manifest.json"))
        assert set(archive.namelist()) == {"manifest.json", *manifest.files}
        placement = json.loads(archive.read("placement.json"))
    assert sum(len(segment["nodes"]) for segment in placement["segments"]) == 11


def test_saving_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    artifact = accelrt.compile(mlp())
    target = tmp_path / "model.accel"
    target.write_text("old")
    artifact.save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model.accel"]
    with pytest.raises(ArtifactError, match="cannot be written"):
        artifact.save(tmp_path / "no" / "such" / "folder.accel")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    artifact = accelrt.compile(mlp())
    target = artifact.save(tmp_path / "model.accel")
    before = target.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # writes beyond it fail as on a full disk
    try:
        with pytest.raises(ArtifactError, match="cannot be written"):
            artifact.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.accel"]


def test_a_killed_process_leaves_no_half_file(tmp_path: Path) -> None:
    code = (
        "import sys, accelrt; from accelrt.testing.models import resnet50;"
        "artifact = accelrt.compile(resnet50(image=64)); print('ready', flush=True)\n"
        "while True: artifact.save(sys.argv[1])"
    )
    target = tmp_path / "model.accel"
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.35)
        process.kill()
    if target.exists():
        accelrt.load(target).close()


# The cache


def test_the_second_compile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    first = accelrt.compile(small_cnn())
    engine = REGISTRY.candidates(accelrt.target.parse("cpu"))[0].engine
    monkeypatch.setattr(type(engine), "compile", lambda *_: pytest.fail("it compiled again"))
    assert accelrt.compile(small_cnn()).folder == first.folder
    assert accelrt.compile(small_cnn().SerializeToString()).folder == first.folder
    with pytest.raises(pytest.fail.Exception):
        accelrt.compile(small_cnn(seed=1))


def test_options_and_targets_make_other_entries() -> None:
    folders = {
        accelrt.compile(mlp(), "cpu").folder,
        accelrt.compile(mlp(), "cpu", options={"threads": 1}).folder,
        accelrt.compile(mlp(), "cpu/reference").folder,
        accelrt.compile(mlp(), "cpu", input_names=["renamed"]).folder,
    }
    assert len(folders) == 4


def test_without_the_cache_nothing_is_kept(_own_cache: Path) -> None:
    artifact = accelrt.compile(mlp(), cache=False)
    folder = artifact.folder
    assert folder.exists()
    assert list(_own_cache.iterdir()) == []
    del artifact
    assert not folder.exists()


def test_two_processes_compile_one_model_at_once(tmp_path: Path, _own_cache: Path) -> None:
    code = (
        "import sys, time, accelrt, numpy as np; from accelrt.testing.models import small_cnn;"
        "import onnxruntime; model = small_cnn(); print('ready', flush=True); sys.stdin.readline();"
        "s = accelrt.load(accelrt.compile(model));"
        "print(s.predict(np.ones((1, 3, 16, 16), np.float32))['scores'].sum())"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    results = set()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0
        results.add(float(out))
    assert len(results) == 1
    assert len(list((_own_cache / "artifacts").iterdir())) == 1
    assert list((_own_cache / "work").iterdir()) == []


def test_the_least_recently_used_is_evicted_but_not_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    held = accelrt.compile(mlp(seed=0))
    size = sum(file.stat().st_size for file in held.folder.iterdir())
    monkeypatch.setenv("ACCELRT_CACHE_SIZE", str(int(2.5 * size)))
    folders = []
    for seed in (1, 2, 3, 4):
        folders.append(accelrt.compile(mlp(seed=seed)).folder)
        time.sleep(0.01)
    assert held.folder.exists()
    assert [folder.exists() for folder in folders] == [False, False, False, True]
    keys = [path.read_text() for path in (Cache().folder / "compiled").iterdir()]
    assert sorted(keys) == sorted(folder.name for folder in (held.folder, folders[-1]))
    with accelrt.load(held) as session:
        assert session.signature.outputs


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ACCELRT_CACHE_DIR")
    assert cache_folder() == tmp_path / "xdg" / "accelrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "accelrt"
    monkeypatch.setenv("ACCELRT_CACHE_SIZE", "12")
    assert cache_limit() == 12
    monkeypatch.setenv("ACCELRT_CACHE_SIZE", "a lot")
    with pytest.raises(OptionError, match="a lot"):
        cache_limit()


# Where it does not fit


def test_another_toolchain_compiles_again_and_says_so(
    tmp_path: Path, fake: Callable[..., str], scores: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    path = accelrt.compile(small_cnn(), fake(version="1")).save(tmp_path / "model.accel")
    fake(version="2")
    with pytest.raises(IncompatibleProgram, match=r"fake 1 \(here: 2\)"):
        accelrt.load(path, fallback="error")
    with caplog.at_level(logging.WARNING, "accelrt"):
        assert answers(path, scores) == ("artifact-fake/fake",)
    assert "compiled again for artifact-fake/fake" in caplog.text


def test_a_missing_engine_means_the_cpu_by_policy(
    tmp_path: Path, fake: Callable[..., str], scores: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    path = accelrt.compile(small_cnn(), fake()).save(tmp_path / "model.accel")
    bare = accelrt.compile(small_cnn(), fake()).save(tmp_path / "bare.accel", sources=False)
    REGISTRY.unregister("artifact-fake")
    with pytest.raises(BackendUnavailable, match="artifact-fake/fake"):
        accelrt.load(path, fallback="error")
    with pytest.raises(BackendUnavailable, match="sources=False"):
        accelrt.load(bare)
    with caplog.at_level(logging.WARNING, "accelrt"):
        assert answers(path, scores) == ("cpu/onnxruntime",)
    assert "compiled for cpu/onnxruntime instead" in caplog.text
    caplog.clear()
    answers(path, scores, fallback="allow")
    assert not caplog.records or caplog.records[-1].levelno < logging.WARNING


def test_an_unusable_engine_means_the_cpu_too(tmp_path: Path, fake: Callable[..., str], scores: np.ndarray) -> None:
    path = accelrt.compile(small_cnn(), fake()).save(tmp_path / "model.accel")
    fake(unusable="the driver is gone")
    assert answers(path, scores, fallback="allow") == ("cpu/onnxruntime",)
    with pytest.raises(BackendUnavailable, match="the driver is gone"):
        accelrt.load(path, fallback="error")


def test_no_device_or_one_that_is_too_small(tmp_path: Path, fake: Callable[..., str], scores: np.ndarray) -> None:
    path = accelrt.compile(small_cnn(), fake(operators={"Conv", "Relu"}), fallback="allow").save(tmp_path / "m.accel")
    for behaviour, error in (({"devices": 0}, CoresUnavailable), ({"memory_bytes": 10}, OutOfDeviceMemory)):
        fake(operators={"Conv", "Relu"}, **behaviour)
        with accelrt.load(path, fallback="allow") as session:
            np.testing.assert_allclose(session.predict(X)["scores"], scores, rtol=1e-4, atol=1e-5)
            assert session.stats().fallbacks >= 2
        with pytest.raises(error):
            accelrt.load(path, fallback="error")


def test_devices_asked_for_must_exist(tmp_path: Path, fake: Callable[..., str], scores: np.ndarray) -> None:
    path = accelrt.compile(small_cnn(), fake(devices=4)).save(tmp_path / "m.accel")
    answers(path, scores, devices="1-3")
    for wrong in ("7", 7, [0, 9]):
        with pytest.raises(CoresUnavailable, match=r"has no device \d; it has \[0, 1, 2, 3\]"):
            accelrt.load(path, devices=wrong)
    with pytest.raises(CoresUnavailable):
        accelrt.load(small_cnn(), backend="cpu:5")


def test_what_belongs_to_compiling_is_refused_for_an_artifact(tmp_path: Path) -> None:
    path = accelrt.compile(mlp()).save(tmp_path / "m.accel")
    for surplus in ({"backend": "cpu"}, {"options": {"threads": 1}}, {"example_inputs": [1]}):
        with pytest.raises(OptionError, match="compiled already"):
            accelrt.load(path, **surplus)  # type: ignore[arg-type]


# Large


@pytest.mark.suite
def test_a_model_of_more_than_two_gigabytes(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """No limit of protobuf, and no second copy of the weights: peak memory is held against the size."""
    code = Path(__file__).with_name("large_model.py").read_text()
    environment = {**os.environ, "ACCELRT_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout.splitlines()[-1])
    record_property("summary", f"a model beyond 2 GiB, in bytes: {facts}")
    assert facts["weights"] > 2**31
    assert facts["right"]
    assert facts["accelrt_peak"] < 1.3 * facts["onnxruntime_peak"]


def test_a_model_in_the_cache_of_a_hub(tmp_path: Path, scores: np.ndarray) -> None:
    """Hubs keep files under their hashes and link to them; model and data then lie in one folder after all."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    onnx.save(
        small_cnn(), blobs / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0
    )
    (blobs / "model.onnx").rename(blobs / "aaaa")
    (blobs / "model.onnx_data").rename(blobs / "bbbb")
    (snapshot / "model.onnx").symlink_to(blobs / "aaaa")
    (snapshot / "model.onnx_data").symlink_to(blobs / "bbbb")
    assert answers(snapshot / "model.onnx", scores) == ("cpu/onnxruntime",)
    (snapshot / "model.onnx_data").unlink()
    (tmp_path / "secret").write_bytes((blobs / "bbbb").read_bytes())
    (snapshot / "model.onnx_data").symlink_to(tmp_path / "secret")
    with pytest.raises(accelrt.errors.GraphError, match="outside the model's folder"):
        accelrt.compile(snapshot / "model.onnx")
