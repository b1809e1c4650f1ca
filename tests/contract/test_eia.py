"""eia/remote keeps the contract, against a real server in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("grpc")

from accelrt.testing.contract import BackendContract
from accelrt_eia import EiaBackend

_SERVER = Path(__file__).parents[1] / "stand_ins" / "serving" / "small_service.py"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process = subprocess.Popen([sys.executable, str(_SERVER), "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"grpc://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


class TestRemote(BackendContract):
    backend_class = EiaBackend
    engine_name: ClassVar[str | None] = "remote"
    sdk_modules = ("grpc", "google.protobuf", "onnxruntime", "onnx")

    @pytest.fixture(autouse=True)
    def named(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", url)
