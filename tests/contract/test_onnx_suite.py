"""ONNX's own backend suite through accelrt: on the CPU, on stand-ins that refuse and fail, and on a GPU.

Slow (about a minute a target), so marked `suite`. Each test prints how many nodes ran where.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import pytest

import accelrt
from accelrt.registry import REGISTRY
from accelrt.testing.fake import FakeBackend
from accelrt.testing.onnx_backend import backend_for
from tests.contract.onnx_cases import cases, run_all
from tests.contract.onnx_suite_exceptions import EXCEPTIONS

pytestmark = pytest.mark.suite

OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas_with_history()})
EVERY_SECOND = frozenset(OPERATORS[::2])


def _some(operators: tuple[str, ...]) -> bool:
    """Pick about a third of all segments, the same ones in every run."""
    return sum(map(ord, "".join(operators))) % 3 == 0


def _some_calls(operators: tuple[str, ...], call: int) -> bool:
    return _some(operators)


TARGETS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "half": {"operators": EVERY_SECOND},
    "compile-fails": {"operators": EVERY_SECOND, "fails_to_compile": _some},
    "run-fails": {"operators": EVERY_SECOND, "fails_to_run": _some_calls},
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_passes_and_says_where_it_ran(target: str, record_property: Callable[[str, object], None]) -> None:
    if target != "cpu":
        accelrt.register(FakeBackend.configured(target, **TARGETS[target]))
    try:
        # But for the target that is told to fail at run, what the placement says must be where it ran.
        ran = _run_all(target, "allow" if target == "run-fails" else "error", record_property)
    finally:
        REGISTRY.unregister(target)
    if target != "cpu":
        assert ran[f"{target}/fake"] > 1000


@pytest.mark.gpu
def test_every_case_passes_on_a_gpu(record_property: Callable[[str, object], None]) -> None:
    if "cuda" not in REGISTRY.names() or not REGISTRY.backend("cuda").devices():
        pytest.skip("there is no backend cuda here, or no GPU")
    ran = _run_all("cuda", "error", record_property)
    assert sum(count for engine, count in ran.items() if engine.startswith("cuda/")) > 1000


def _run_all(target: str, fallback: str, record_property: Callable[[str, object], None]) -> Counter[str]:
    """Run all cases through a target; return how many nodes ran on each engine."""
    backend = backend_for(target, fallback=fallback)
    outcome = run_all(backend)
    passed, failed, skipped = outcome.passed, outcome.failed, outcome.skipped
    ran: Counter[str] = Counter()
    for (engine, _), count in backend.nodes.items():
        ran[engine] += count
    record_property("summary", f"{target}: {passed} cases passed, {len(failed)} exceptions; nodes run: {dict(ran)}")
    assert not skipped
    unexpected = {name: reason for name, reason in failed.items() if name not in EXCEPTIONS}
    assert not unexpected, "\n".join(f"{name}: {reason[:300]}" for name, reason in unexpected.items())
    assert passed >= 2022
    # Passing must not mean that everything was sent to the reference evaluator.
    assert ran["cpu/reference"] < 0.1 * sum(ran.values())
    return ran


def test_exceptions_are_cases_of_the_suite() -> None:
    names = {case.name for case in cases(backend_for("cpu"))}
    assert set(EXCEPTIONS) <= names
