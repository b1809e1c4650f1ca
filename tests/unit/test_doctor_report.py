"""``accelrt doctor --report``: a file with everything, but no secrets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import accelrt
from accelrt.cli import app
from accelrt.cli.report import FORMAT, scrubbed
from accelrt.registry import REGISTRY
from accelrt.testing.fake import FakeBackend


def test_it_holds_what_the_doctor_knows_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    monkeypatch.setenv("ACCELRT_CACHE_DIR", str(tmp_path / "jane" / "cache"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    path = tmp_path / "report.json"
    done = CliRunner().invoke(app, ["doctor", "--report", str(path)])
    assert done.exit_code == 0, done.output
    text = path.read_text()
    report = json.loads(text)
    assert report["format"] == FORMAT
    assert "cpu" in [backend["name"] for backend in report["backends"]]
    assert report["cache"] == report["environment"]["ACCELRT_CACHE_DIR"] == "~/cache"
    assert report["packages"]["onnxruntime"]
    assert "wJalrXUtnFEMI" not in text
    assert "jane" not in text


def test_it_is_written_beside_json(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "cpu", "--json", "--report", str(tmp_path / "r.json")])
    assert json.loads(done.stdout)["backends"][0]["name"] == "cpu"
    assert (tmp_path / "r.json").is_file()


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--report", str(tmp_path / "no" / "r.json")])
    assert done.exit_code == 3


@pytest.mark.parametrize("broken", [False, True])
def test_backends_add_to_it(tmp_path: Path, broken: bool) -> None:
    class Telling(FakeBackend.configured("telling")):  # type: ignore[misc]
        def report(self) -> Mapping[str, Any]:
            if broken:
                raise ValueError("no idea")
            return {"chips": ("a", "b")}

    accelrt.register(Telling)
    try:
        CliRunner().invoke(app, ["doctor", "--report", str(tmp_path / "r.json")])
    finally:
        REGISTRY.unregister("telling")
    details = json.loads((tmp_path / "r.json").read_text())["details"]["telling"]
    assert details == ({"problem": "its report() raised ValueError: no idea"} if broken else {"chips": ["a", "b"]})


def test_passwords_in_addresses_are_taken_out() -> None:
    assert scrubbed({"index": ["https://me:pass@host/simple"]}) == {"index": ["https://***@host/simple"]}
