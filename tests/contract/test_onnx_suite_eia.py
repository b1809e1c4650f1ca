"""ONNX's own backend suite through `eia/remote`, on a slice that a real server lends, with fallback to the CPU here.

Some minutes, so marked `suite`. It prints how many nodes ran on which engine, here and at the server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import pytest

pytest.importorskip("grpc")

import accelrt
from accelrt.registry import REGISTRY
from accelrt.testing.onnx_backend import SessionRep, backend_for
from accelrt_eia import EiaBackend
from tests.contract.lenders import lender, state_of
from tests.contract.onnx_cases import run_all
from tests.contract.onnx_suite_exceptions import EXCEPTIONS

pytestmark = pytest.mark.suite


def test_every_case_passes_on_a_slice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, record_property: Callable[[str, object], None]
) -> None:
    base = backend_for("eia/remote", fallback="allow")
    open_sessions: list[accelrt.Session] = []
    fallbacks: Counter[str] = Counter()

    class OnASlice(base):  # type: ignore[misc, valid-type]
        @classmethod
        def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> SessionRep:
            rep = super().prepare(model, device, **kwargs)
            open_sessions.append(rep.session)
            return rep  # type: ignore[no-any-return]

    def close() -> None:
        while open_sessions:
            session = open_sessions.pop()
            stats = session.stats()
            fallbacks["calls"] += stats.fallbacks
            fallbacks["sessions on a slice"] += "eia/remote" in stats.engines
            session.close()

    monkeypatch.setattr(type(REGISTRY), "backend", _with_fresh(EiaBackend(), type(REGISTRY).backend))
    with lender("--accelerator", "cpu:0", "--size", "eia2.medium", ACCELRT_CACHE_DIR=str(tmp_path)) as server:
        monkeypatch.setenv("ACCELRT_EIA_ACCELERATORS", server.url)
        outcome = run_all(OnASlice, after=close)
        left = state_of(server.client())
    ran: Counter[str] = Counter()
    for (engine, _), count in OnASlice.nodes.items():
        ran[engine] += count
    record_property(
        "summary",
        f"eia/remote: {outcome.passed} cases passed, {len(outcome.failed)} exceptions; nodes run: {dict(ran)}; "
        f"{dict(fallbacks)}",
    )
    assert not outcome.skipped
    unexpected = {name: reason for name, reason in outcome.failed.items() if name not in EXCEPTIONS}
    assert not unexpected, "\n".join(f"{name}: {reason[:300]}" for name, reason in unexpected.items())
    assert outcome.passed >= 2022
    assert ran["eia/remote"] > 0.7 * sum(ran.values())
    # Falling back is what a client does when a server does not answer in time; of a server at hand it is not expected.
    assert fallbacks["calls"] <= 5
    assert fallbacks["sessions on a slice"] > 1500
    assert not left.holders  # every program was given back, and the slice with the last


def _with_fresh(fresh: EiaBackend, original: Any) -> Any:
    return lambda registry, name: fresh if name == "eia" else original(registry, name)
