"""ONNX's own backend suite through what cuda/torch makes of a graph, on the CPU: folded, rewritten, recorded.

A minute or two, so marked `suite`.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from onnx.backend.base import Backend, BackendRep  # noqa: E402

from accelrt.graph.load import load_graph  # noqa: E402
from accelrt.graph.types import TensorType  # noqa: E402
from accelrt_cuda.torch_lanes import Lane, Work  # noqa: E402
from accelrt_cuda.torch_place import HostPlace  # noqa: E402
from accelrt_cuda.torch_prepare import prepare  # noqa: E402
from accelrt_cuda.torch_runtime import _Finish, _input_types, _output_types, _storages  # noqa: E402
from accelrt_cuda.torch_transfer import Lent  # noqa: E402
from tests.contract.lowering_suite_exceptions import LOWERING_EXCEPTIONS  # noqa: E402
from tests.contract.onnx_cases import cases  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "stand_ins" / "cuda"))
_engine = importlib.import_module("torch_backends").OnCpu()

pytestmark = [pytest.mark.suite, pytest.mark.torch]

AT_LEAST = 1600


class Refused(Exception):
    """A case of which the engine does not take some node."""


class Rep(BackendRep):
    """A model as a lane runs it: twice operator by operator, then twice as a recording."""

    def __init__(self, model: onnx.ModelProto) -> None:
        prepared = prepare(load_graph(model), "fp32", "cpu", channels_last=True)
        self.signature, module = prepared.signature, prepared.module
        finish = _Finish(self.signature, torch.device("cpu"))
        work = Work(
            lambda tensors: finish(module(*tensors)),
            _input_types(self.signature),
            _output_types(self.signature),
            _storages(module.buffers()),
            recordable=not prepared.depends,
        )
        self.lane = Lane(HostPlace(), work, 1, Lent())

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        arrays = [np.asarray(value) for value in inputs]
        first, *others = (self.lane.run(arrays) for _ in range(4))
        for found in others:
            for one, other in zip(first, found, strict=True):
                assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        return tuple(first)


class RewritingBackend(Backend):
    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> Rep:
        graph = load_graph(model)
        for verdict in _engine.supports_all(graph.nodes, "fp32"):
            if not verdict.supported:
                raise Refused(verdict.reason)
        for port in (*graph.signature.inputs, *graph.signature.outputs):
            if not isinstance(port.type, TensorType):
                raise Refused(f"{port.name} is {port.type}")
        return Rep(model)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device == "CPU"


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_equal_or_refused(record_property: Callable[[str, object], None]) -> None:
    counts: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    for name, run, _ in cases(RewritingBackend):
        try:
            run(None)
        except Refused:
            counts["refused"] += 1
        except Exception as error:
            if name in LOWERING_EXCEPTIONS:
                counts["exceptions"] += 1
            else:
                wrong[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            counts["equal"] += 1
    record_property("summary", f"cuda/torch, on the CPU: {dict(counts)}, {len(wrong)} wrong")
    assert not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())
    assert counts["equal"] >= AT_LEAST
