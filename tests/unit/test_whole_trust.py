"""Programs that run code come from a file only if the user says so; a file cannot say it of itself."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

import accelrt  # noqa: E402
from accelrt.artifact.artifact import open_artifact  # noqa: E402
from accelrt.artifact.manifest import MANIFEST  # noqa: E402
from accelrt.cli import app  # noqa: E402
from accelrt.data import digits_model  # noqa: E402
from accelrt.errors import ArtifactError, CorruptArtifact, IncompatibleProgram, UntrustedProgram  # noqa: E402
from accelrt.registry import REGISTRY, find_engine  # noqa: E402

pytestmark = [pytest.mark.torch]
X = np.ones((1, 4), np.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ACCELRT_BACKEND", raising=False)
    monkeypatch.delenv("ACCELRT_TRUST", raising=False)


@pytest.fixture
def artifact() -> accelrt.Artifact:
    torch.manual_seed(0)
    return accelrt.compile(
        torch.nn.Linear(4, 2), "cpu/torch", example_inputs=(torch.ones(1, 4),), options={"torch.inductor": False}
    )


@pytest.fixture
def file(artifact: accelrt.Artifact, tmp_path: Path) -> Path:
    return artifact.save(tmp_path / "model.accel")


def forged(path: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copy an artifact with another manifest, which is consistent with itself."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        manifest = json.loads(old.read(MANIFEST))
        change(manifest)
        new.writestr(MANIFEST, json.dumps(manifest))
        for name in old.namelist()[1:]:
            new.writestr(name, old.read(name))
    return target


def test_a_file_is_refused_before_anything_in_it_is_read_by_torch(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("torch read an untrusted file")

    monkeypatch.setattr("torch.export.load", fail)
    with pytest.raises(UntrustedProgram, match="cpu/torch") as caught:
        accelrt.load(file)
    assert "trust=True" in str(caught.value)
    assert isinstance(caught.value, ArtifactError)


def test_the_argument_and_the_variable_let_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with accelrt.load(file, trust=True) as session:
        expected = session.predict(X)
    for value, works in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("ACCELRT_TRUST", value)
        if works:
            with accelrt.load(file) as session:
                np.testing.assert_array_equal(session.predict(X)["output"], expected["output"])
        else:
            with pytest.raises(UntrustedProgram):
                accelrt.load(file)


def test_what_was_compiled_here_needs_no_word(artifact: accelrt.Artifact) -> None:
    assert artifact.trusted
    with accelrt.load(artifact) as session:
        assert session.predict(X)["output"].shape == (1, 2)


def test_an_untrusted_file_can_be_explained(file: Path) -> None:
    opened = open_artifact(file)
    assert not opened.trusted
    assert "runs whole on cpu/torch" in opened.explain()


def test_other_artifacts_need_no_trust(tmp_path: Path) -> None:
    path = accelrt.compile(digits_model()).save(tmp_path / "digits.accel")
    accelrt.load(path).close()


def test_a_program_of_torch_under_another_mark_is_refused_too(file: Path, tmp_path: Path) -> None:
    """One that hides that it holds a source, and one that hides which engine would read it again."""

    def hide_source(manifest: dict[str, Any]) -> None:
        del manifest["options"]["whole"]

    def hide_engine(manifest: dict[str, Any]) -> None:
        # Its fingerprint does not fit, so that it would be compiled again from the source that it holds.
        manifest["segments"][0].update(engine="onnxruntime", fingerprint={"onnxruntime": "0"})

    for number, change in enumerate((hide_source, hide_engine)):
        with pytest.raises(UntrustedProgram):
            accelrt.load(forged(file, tmp_path / f"{number}.accel", change))


def test_a_source_that_is_not_there_is_corrupt(file: Path, tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["options"]["whole"] = "saved_model"
        manifest["segments"][0]["fingerprint"] = {"torch": "0"}

    with pytest.raises(CorruptArtifact, match="does not hold it"):
        accelrt.load(forged(file, tmp_path / "forged.accel", change), trust=True)


def test_another_torch_compiles_the_source_in_the_artifact_again(
    artifact: accelrt.Artifact, file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = find_engine(REGISTRY.backend("cpu"), "torch")
    with accelrt.load(artifact) as session:
        expected = session.predict(X)["output"]
    there = {**engine.fingerprint(), "torch": "99.0"}
    monkeypatch.setattr(type(engine), "fingerprint", lambda _: there)
    with pytest.raises(IncompatibleProgram, match=r"here: 99\.0"):
        accelrt.load(file, trust=True, fallback="error")
    with caplog.at_level("WARNING", "accelrt"), accelrt.load(file, trust=True) as session:
        np.testing.assert_array_equal(session.predict(X)["output"], expected)
        assert session.stats().engines == ("cpu/torch",)
    assert any("compiled again for cpu/torch" in record.getMessage() for record in caplog.records)


def test_it_holds_no_graph_and_says_so(artifact: accelrt.Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"runs whole, as torch\.export"):
        artifact.source_graph()
    bare = artifact.save(tmp_path / "bare.accel", sources=False)
    accelrt.load(bare, trust=True).close()


def test_verbs_take_trust(file: Path) -> None:
    runner = CliRunner()
    refused = runner.invoke(app, ["run", str(file), "--random"])
    assert refused.exit_code == 3
    assert "--trust" in refused.output
    ran = runner.invoke(app, ["run", str(file), "--random", "--trust"])
    assert ran.exit_code == 0, ran.output
    assert "all on cpu/torch, the model whole" in ran.output
    explained = runner.invoke(app, ["explain", str(file)])
    assert explained.exit_code == 0, explained.output
    assert "asked for by name" in explained.output
    measured = runner.invoke(app, ["bench", str(file), "--trust", "-n", "3", "--warmup", "1"])
    assert measured.exit_code == 0, measured.output


def test_doctor_lists_the_engines_of_whole_models() -> None:
    found = json.loads(CliRunner().invoke(app, ["doctor", "cpu/torch", "--json"]).output)
    engines = {engine["name"]: engine for backend in found["backends"] for engine in backend["engines"]}
    assert engines["torch"]["usable"]
    assert engines["torch"]["formats"] == ["torch.export", "torchscript"]
    assert engines["tensorflow"]["formats"] == ["saved_model"]
