"""`cuda/tensorrt` keeps the contract, on stand-ins with the signatures of TensorRT 10 and of 11."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from accelrt.backend import Engine
from accelrt.testing.contract import BackendContract

sys.path.append(str(Path(__file__).parents[1] / "stand_ins" / "nvidia" / "tensorrt_shared"))
alone: Any = importlib.import_module("tensorrt_alone")


@pytest.fixture(scope="class")
def release_10() -> Iterator[None]:
    with alone.in_place(*alone.folders("10")):
        yield


@pytest.fixture(scope="class")
def release_11() -> Iterator[None]:
    with alone.in_place(*alone.folders("11")):
        yield


class TensorRtContract(BackendContract):
    backend_class = alone.TensorRtAlone
    sdk_modules = ("tensorrt", "cuda", "onnx", "onnxruntime")
    release: ClassVar[str]

    def test_the_stand_in_is_the_release_that_it_says(self, usable: Engine) -> None:
        assert str(usable.status().version).startswith(f"{self.release}.")


class TestWithoutTensorRt(BackendContract):
    """Where it is not installed: names, options and a status."""

    backend_class = alone.TensorRtAlone
    sdk_modules = ("tensorrt", "cuda", "onnx", "onnxruntime")


@pytest.mark.usefixtures("release_10")
class TestTensorRt10(TensorRtContract):
    release: ClassVar[str] = "10"


@pytest.mark.usefixtures("release_11")
class TestTensorRt11(TensorRtContract):
    release: ClassVar[str] = "11"
