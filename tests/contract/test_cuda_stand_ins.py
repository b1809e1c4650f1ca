"""The backend cuda keeps the contract over stand-ins, which say that they are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from accelrt.backend import Backend
from accelrt.testing.contract import BackendContract

_STAND_INS = Path(__file__).parents[1] / "stand_ins" / "nvidia"
sys.path.insert(0, str(_STAND_INS))
_site = importlib.import_module("stand_in_site")
sys.path.remove(str(_STAND_INS))


class _Overstand(BackendContract):
    backend_class: ClassVar[type[Backend]]
    sdk_modules = ("pynvml", "onnxruntime", "onnxruntime_cuda_stand_in", "torch", "tensorrt", "onnx")

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def machine(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        site = _site.build(tmp_path_factory.mktemp("gpu") / "site")
        with _site.installed(site):
            cls.backend_class = importlib.import_module("cuda_stand_in").StandInCudaBackend
            yield


class TestOnnxRuntimeCudaStandIn(_Overstand):
    engine_name: ClassVar[str | None] = "onnxruntime"

    def test_a_report_says_that_it_is_a_stand_in(self, target: str) -> None:
        placement = self.compiled("mlp", lambda: self.build("mlp"), target).placement
        assert {segment.nature for segment in placement.segments if segment.engine == target} == {"stand-in"}


class TestCapturedStandIn(_Overstand):
    """With CUDA graphs: static shapes, one call at a time."""

    engine_name: ClassVar[str | None] = "onnxruntime"
    batch: ClassVar[int | None] = 2
    engine_options: ClassVar[dict[str, Any]] = {"enable_cuda_graph": True}
