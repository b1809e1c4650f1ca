"""`cuda/torch` keeps the contract, on the CPU in the place of a GPU: recorded, and operator by operator."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from accelrt.testing.contract import BackendContract

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins" / "cuda"))
_stand_in = importlib.import_module("torch_backends")

_SDKS = ("torch", "triton", "onnx", "onnxruntime")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class _Trusted(BackendContract):
    sdk_modules = _SDKS

    @pytest.fixture(autouse=True)
    def trust(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files of this engine may hold compiled code."""
        monkeypatch.setenv("ACCELRT_TRUST", "1")


class TestRecorded(_Trusted):
    backend_class = _stand_in.RecordedBackend


class TestRecordedWithStaticShapes(_Trusted):
    """Everything is recorded while a program is loaded."""

    backend_class = _stand_in.RecordedBackend
    batch: ClassVar[int | None] = 3

    @pytest.fixture(autouse=True)
    def whole_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The suite draws batches of several sizes; only one fits."""
        from accelrt.testing import contract

        draw = contract.draw
        monkeypatch.setattr(contract, "draw", lambda signature, batch, seed=0: draw(signature, 3, seed))


class TestOperatorByOperator(_Trusted):
    backend_class = _stand_in.EagerBackend
