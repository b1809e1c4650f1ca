"""ONNX's own backend suite on the emulated chips, with fallback, held to what bfloat16 can say.

Expected values are the suite's, in float32; a core rounds what every operator reads and writes to eight bits. A float
may be off by 2^-8 for each border it has passed, of itself and of the largest value beside it, since sums carry the
error of their largest term. Everything else must be equal. A case that is not has to be in the list of exceptions, and
is then held, step by step, against ONNX's own evaluator fed with rounded values: that is its proof.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test import BackendTest
from onnx.reference import ReferenceEvaluator

import accelrt
from accelrt.graph.load import load_graph
from accelrt.graph.rounding import round_array
from accelrt.graph.trial import single_node_model
from accelrt.registry import REGISTRY
from accelrt.testing.onnx_backend import AccelrtBackend, SessionRep, backend_for
from accelrt_neuron import NeuronBackend
from tests.contract.neuron_suite_exceptions import EXCEPTIONS
from tests.contract.onnx_cases import cases, run_all
from tests.contract.onnx_suite_exceptions import EXCEPTIONS as FAULTS_OF_THE_SUITE

pytestmark = pytest.mark.suite

TARGET = "neuron/emulator"
INSTANCES = {"inf1": "inf1.xlarge", "inf2": "inf2.xlarge"}
STEP = 2.0**-8
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
"""Float types of less or more than float32 are not rounded, but may come from values that were."""


class Recorder(SessionRep):
    """Remembers what went through the last session, for the judge."""

    def run(self, inputs: Sequence[Any], **kwargs: Any) -> tuple[Any, ...]:
        outputs = super().run(inputs, **kwargs)
        ports = self.session.signature.inputs
        JUDGE.inputs = dict(zip((port.name for port in ports), inputs, strict=False))
        return outputs


class Judge:
    """Says whether outputs are what a core that rounds may answer."""

    model: Any = None
    inputs: dict[str, Any]
    emulated: frozenset[str] = frozenset()

    def problem(self, expected: Sequence[Any], found: Sequence[Any]) -> str | None:
        for number, (wanted, got) in enumerate(zip(expected, found, strict=True)):
            if (
                problem := self._compare(np.asarray(wanted), np.asarray(got), STEP * (2 * len(self.emulated)))
            ) is not None:
                return f"output {number}: {problem}"
        return None

    def _compare(self, wanted: Any, got: Any, step: float) -> str | None:
        if wanted.shape != got.shape or wanted.dtype != got.dtype:
            return f"{got.dtype}{list(got.shape)} where {wanted.dtype}{list(wanted.shape)} was expected"
        if wanted.dtype.name not in _FLOATS:
            return None if np.array_equal(wanted, got) else f"{got.dtype} values differ"
        wanted, got = wanted.astype(np.float64), got.astype(np.float64)
        if not np.array_equal(np.isnan(wanted), np.isnan(got)):
            return "NaN elsewhere"
        finite = np.isfinite(wanted)
        if not np.array_equal(wanted[~finite & ~np.isnan(wanted)], got[~finite & ~np.isnan(wanted)]):
            return "infinities elsewhere"
        largest = float(np.abs(wanted[finite]).max(initial=0.0))
        limit = step * (np.abs(wanted[finite]) + largest) + 1e-7
        error = np.abs(wanted[finite] - got[finite])
        worst = float((error - limit).max(initial=0.0))
        return None if worst <= 0 else f"off by {error.max():.3g}; the largest value is {largest:.3g}"

    def stepwise(self, found: Sequence[Any]) -> str | None:
        """Compute the model node by node with ONNX's evaluator, rounding where it ran on a core, and compare."""
        graph = load_graph(self.model)
        values: dict[str, Any] = {**graph.constants, **self.inputs}
        values.update({name: np.asarray(tensor.numpy()) for name, tensor in graph.weights.items()})
        for node in graph.nodes:
            on_core = node.name in self.emulated
            feeds = {name: _rounded(values[name]) if on_core else values[name] for name in node.reads}
            model = single_node_model(node)
            wanted = {value.name for value in model.graph.input}
            del model.graph.initializer[:]
            model.graph.input.extend(
                onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(feeds[name].dtype), None)
                for name in feeds
                if name not in wanted
            )
            results = ReferenceEvaluator(model).run(list(node.writes), feeds)
            for name, result in zip(node.writes, results, strict=True):
                values[name] = _rounded(np.asarray(result)) if on_core else result
        for number, (value, got) in enumerate(zip(graph.proto.graph.output, found, strict=True)):
            if (problem := self._compare(np.asarray(values[value.name]), np.asarray(got), STEP)) is not None:
                return f"output {number}: {problem}"
        return None


def _rounded(value: Any) -> Any:
    return round_array(value, "bfloat16") if getattr(value, "dtype", None) == np.float32 else value


JUDGE = Judge()


class Runner(BackendTest):  # type: ignore[misc]
    """ONNX's runner with the judge in the place of its comparison, for what ran on a core."""

    @classmethod
    def assert_similar_outputs(
        cls, ref_outputs: Any, outputs: Any, rtol: float, atol: float, model_dir: str | None = None
    ) -> None:
        if not JUDGE.emulated:
            super().assert_similar_outputs(ref_outputs, outputs, rtol, atol, model_dir)
            return
        if (problem := JUDGE.problem(ref_outputs, outputs)) is not None:
            proof = JUDGE.stepwise(outputs)
            raise AssertionError(problem + (" | proven" if proof is None else f" | stepwise: {proof}"))


def _backend(instance: str) -> type[AccelrtBackend]:
    base = backend_for(TARGET, {"instance": instance})

    class Recording(base):  # type: ignore[misc, valid-type]
        @classmethod
        def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> SessionRep:
            artifact = accelrt.compile(model, TARGET, fallback="allow", options=cls.options, cache=False)
            for segment in artifact.placement.segments:
                cls.nodes.update((segment.engine, node.kind) for node in segment.nodes)
            JUDGE.model = model
            JUDGE.emulated = frozenset(
                node.name for s in artifact.placement.segments if s.engine == TARGET for node in s.nodes
            )
            return Recorder(accelrt.load(artifact, fallback="error"))

    return Recording


@pytest.mark.parametrize("chip", INSTANCES)
def test_every_case_is_right_within_bfloat16(chip: str, record_property: Callable[[str, object], None]) -> None:
    installed = "neuron" in REGISTRY.names()
    if not installed:
        accelrt.register(NeuronBackend)
    backend = _backend(INSTANCES[chip])
    try:
        outcome = run_all(backend, Runner)
    finally:
        if not installed:
            REGISTRY.unregister("neuron")
    passed, failed, skipped = outcome.passed, outcome.failed, outcome.skipped
    on_core = Counter({kind: count for (engine, kind), count in backend.nodes.items() if engine == TARGET})
    total = sum(backend.nodes.values())
    proven = {name for name, reason in failed.items() if reason.endswith("| proven")}
    record_property(
        "summary",
        f"{chip}: {passed} cases within bfloat16, {len(proven)} proven step by step, {len(failed) - len(proven)} "
        f"faults of the suite; {sum(on_core.values())} of {total} nodes ran on emulated cores: "
        + ", ".join(f"{kind} {count}" for kind, count in sorted(on_core.items())),
    )
    assert not skipped
    unexpected = {
        name: reason
        for name, reason in failed.items()
        if name not in FAULTS_OF_THE_SUITE and not (name in EXCEPTIONS and name in proven)
    }
    assert not unexpected, "\n".join(f"{name}: {reason[:300]}" for name, reason in unexpected.items())
    assert passed >= 1900
    assert sum(on_core.values()) > 1000


def test_exceptions_are_cases_of_the_suite() -> None:
    names = {case.name for case in cases(backend_for("cpu"))}
    assert set(EXCEPTIONS) <= names
