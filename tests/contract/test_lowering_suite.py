"""ONNX's own backend suite through the lowering to torch, on the CPU: each case equal, or refused before it runs.

A minute or two, so marked `suite`. It prints how many cases passed, and by operator how many were refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

from onnx.backend.base import Backend, BackendRep  # noqa: E402

from accelrt.errors import CompileError  # noqa: E402
from accelrt.graph.load import load_graph  # noqa: E402
from accelrt.graph.lowering import lower, lowerable  # noqa: E402
from accelrt.graph.lowering.dtypes import to_numpy, to_torch  # noqa: E402
from accelrt.graph.types import TensorType  # noqa: E402
from tests.contract.lowering_suite_exceptions import LOWERING_EXCEPTIONS  # noqa: E402
from tests.contract.onnx_cases import cases  # noqa: E402

pytestmark = [pytest.mark.suite, pytest.mark.torch]

AT_LEAST = 1900
"""Cases that are lowered and equal; the goal set for the lowering was 1,600 of 2,024."""


class Refused(Exception):
    """A case of which some node is not lowerable; raised before anything runs."""


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class LoweredRep(BackendRep):
    """A lowered model; one that says it is static is traced too, and the trace held against it."""

    traced: ClassVar[int] = 0

    def __init__(self, model: onnx.ModelProto) -> None:
        self.lowered = lower(model)

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        names = self.lowered.signature.input_names
        outputs = self.lowered.run(dict(zip(names, inputs, strict=False)))
        ports = (*self.lowered.signature.inputs, *self.lowered.signature.outputs)
        if self.lowered.static and names and all(isinstance(port.type, TensorType) for port in ports):
            self._trace([to_torch(np.asarray(value)) for value in inputs[: len(names)]])
        return tuple(outputs[name] for name in self.lowered.signature.output_names)

    def _trace(self, arguments: list[Any]) -> None:
        """Trace with one set of values and compare with another: nothing of the first may be baked in."""
        module = self.lowered.module
        others = [a * 0.75 if a.dtype in _FLOATS else a for a in arguments]
        with torch.no_grad():
            traced = torch.jit.trace(module, tuple(arguments), check_trace=False)
            for given in (arguments, others):
                for a, b in zip(traced(*given), module(*given), strict=True):
                    assert _bits(a) == _bits(b), "the trace computes something else"
        LoweredRep.traced += 1


def _bits(tensor: Any) -> tuple[object, ...]:
    return tensor.dtype, tuple(tensor.shape), to_numpy(tensor).tobytes()


class LoweringBackend(Backend):
    """Refuses what `lowerable` refuses; what it admits must lower and run."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> LoweredRep:
        graph = load_graph(model)
        for node in graph.nodes:
            if (reason := lowerable(node)) is not None:
                assert len(reason.split()) >= 4, f"{node.kind}: {reason!r} is no reason"
                with pytest.raises(CompileError):
                    lower(graph)
                raise Refused(f"{node.op_type}: {reason}")
        if any("string" in str(port.type) for port in (*graph.signature.inputs, *graph.signature.outputs)):
            raise Refused("text: the model passes text through")
        return LoweredRep(model)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device == "CPU"


@pytest.mark.filterwarnings("ignore")
def test_every_case_is_equal_or_refused(record_property: Callable[[str, object], None]) -> None:
    passed = 0
    refused: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    exceptions: set[str] = set()
    for name, run, proto in cases(LoweringBackend):
        try:
            run(None)
        except Refused as reason:
            refused[str(reason).partition(":")[0]] += 1
        except Exception as error:
            if name in LOWERING_EXCEPTIONS:
                exceptions.add(name)
            else:
                wrong[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            passed += 1
            if proto and proto[0] is not None:
                operators.update({node.op_type for node in proto[0].graph.node})
    total = passed + len(wrong) + len(exceptions) + sum(refused.values())
    record_property(
        "summary",
        f"lowering: {passed} of {total} cases equal, {sum(refused.values())} refused, {len(exceptions)} exceptions, "
        f"{len(wrong)} wrong, {LoweredRep.traced} traced with equal results; {len(operators)} operators; refused by operator: "
        + ", ".join(f"{operator} {count}" for operator, count in refused.most_common()),
    )
    assert not wrong, "\n".join(f"{name}: {reason}" for name, reason in wrong.items())
    assert passed >= AT_LEAST
    assert LoweredRep.traced >= 1400
    assert exceptions == set(LOWERING_EXCEPTIONS), "an exception passes now, or is no case of the suite"
