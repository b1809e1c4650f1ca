"""The metrics of verification: against their definitions, and where they must not be fooled."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from accelrt.errors import InputError, OptionError
from accelrt.graph.types import Port, Signature, TensorType
from accelrt.precision.compare import OutputError, Tolerance, compare, cosine, relative_l2, tolerance_of
from accelrt.precision.report import Culprit, VerificationReport

LOOSE = Tolerance(0.5)
SIGNATURE = Signature((), (Port("y", TensorType("float32", (None, 10))), Port("z", TensorType("int64", (3,)))))

finite = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(-1e6, 1e6, width=32))
anything = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=6),
    elements=st.floats(width=32, allow_nan=True, allow_infinity=True),
)


def one(have: Any, want: Any, tolerance: Tolerance = LOOSE, labels: Any = None) -> OutputError:
    (result,) = compare([{"y": have}], [{"y": want}], {"y": tolerance}, None if labels is None else {"y": labels})
    return result


@given(anything)
def test_equal_outputs_have_no_error(array: np.ndarray) -> None:
    result = one(array.copy(), array, Tolerance(0.0, max_abs=0.0))
    assert result.problem is None
    assert (result.relative_l2, result.max_abs, result.mismatched) == (0.0, 0.0, 0)


@given(finite, st.floats(1e-4, 10.0))
def test_a_scaled_output_is_off_by_its_scale(array: np.ndarray, by: float) -> None:
    want = array.astype(np.float64)
    have = want * (1 + by)
    if not np.any(np.abs(want) > 1e-30):
        return
    result = one(have, want, Tolerance(1e9))
    assert result.relative_l2 == pytest.approx(by, rel=1e-6)
    assert result.max_abs == pytest.approx(by * float(np.abs(want).max()), rel=1e-6)
    assert result.cosine == pytest.approx(1.0)
    assert one(have, want, Tolerance(by * 1.001)).problem is None
    assert "relative L2 error" in str(one(have, want, Tolerance(by * 0.999)).problem)


@given(finite, st.data())
def test_against_the_definition(want: np.ndarray, data: st.DataObject) -> None:
    noise = data.draw(hnp.arrays(np.float32, want.shape, elements=st.floats(-100, 100, width=32)))
    left, right = want.astype(np.float64).ravel() + noise.ravel(), want.astype(np.float64).ravel()
    norm = math.sqrt(math.fsum(x * x for x in right))
    if norm < 1e-12 or np.linalg.norm(left) < 1e-12:
        return
    error = math.sqrt(math.fsum((a - b) ** 2 for a, b in zip(left, right, strict=True))) / norm
    assert relative_l2(left, right) == pytest.approx(error, rel=1e-9, abs=1e-15)
    angle = math.fsum(a * b for a, b in zip(left, right, strict=True)) / norm / float(np.linalg.norm(left))
    assert cosine(left, right) == pytest.approx(angle, abs=1e-6)


@given(anything, st.data())
def test_one_strange_element_is_never_missed(array: np.ndarray, data: st.DataObject) -> None:
    array = np.where(np.isfinite(array), array, np.float32(1))
    place = data.draw(st.integers(0, array.size - 1))
    strange = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    other = array.copy()
    other.reshape(-1)[place] = strange
    for have, want in ((other, array), (array, other)):
        result = one(have, want, Tolerance(math.inf))
        assert result.mismatched == 1
        assert "1 element NaN or infinite" in str(result.problem)
    assert one(other, other.copy(), Tolerance(0.0)).problem is None


def test_infinities_of_different_sign_do_not_match() -> None:
    assert one(np.array([np.inf]), np.array([-np.inf])).mismatched == 1
    assert one(np.array([np.inf]), np.array([np.nan])).mismatched == 1


def test_zeros_and_extremes() -> None:
    zeros = np.zeros(3)
    assert (relative_l2(zeros, zeros), cosine(zeros, zeros)) == (0.0, 1.0)
    assert (relative_l2(zeros + 1e-30, zeros), cosine(zeros + 1, zeros)) == (math.inf, 0.0)
    huge = np.full(4, 1e300)
    assert relative_l2(huge * 1.5, huge) == pytest.approx(0.5)
    tiny = np.full(4, 1e-300)
    assert relative_l2(tiny * 1.5, tiny) == pytest.approx(0.5)
    assert cosine(-huge, tiny) == pytest.approx(-1.0)
    assert one(np.zeros((0, 4)), np.zeros((0, 4))).problem is None


def test_the_worst_call_counts() -> None:
    good, bad = np.ones((1, 4), np.float32), np.full((1, 4), 1.2, np.float32)
    found = [{"y": good}] * 99 + [{"y": bad}]
    (result,) = compare(found, [{"y": good}] * 100, {"y": Tolerance(0.1)})
    assert result.relative_l2 == pytest.approx(0.2)
    assert result.problem


def test_classes() -> None:
    want = np.eye(10, dtype=np.float32)
    have = want.copy()
    have[0] = np.roll(have[0], 1)  # first class wrong, the right one ties with all others for second
    have[1, 1] = -1.0  # the right one is last
    have[2, 5] = np.nan
    result = one(have, want, Tolerance(math.inf))
    assert result.rows == 10
    assert result.top1 == pytest.approx(0.7)
    assert result.top5 == pytest.approx(0.8)
    labels = np.arange(10)
    labels[9] = 0
    assert one(have, want, labels=labels).accuracy == pytest.approx((0.6, 0.9))
    assert one(want, want, Tolerance(0.0, top1=1.0)).problem is None
    assert "top-1 agreement" in str(one(np.roll(want, 1, 1), want, Tolerance(9.0, top1=0.5)).problem)
    with pytest.raises(InputError, match="3 labels are given for 'y', which has 10 rows"):
        one(have, want, labels=np.arange(3))
    with pytest.raises(InputError, match="no table of class scores"):
        one(want[0], want[0], labels=np.arange(10))


def test_what_is_no_float_is_counted() -> None:
    want = np.arange(10)
    result = one(np.where(want == 3, 7, want), want, Tolerance(0.05))
    assert (result.differing, result.relative_l2) == (0.1, None)
    assert "share of differing elements" in str(result.problem)
    assert one(np.array(["a", "b"], object), np.array(["a", "b"], object)).differing == 0.0
    assert one([want, want], [want, want]).problem is None
    assert "sequences" in str(one([want], [want, want]).problem)
    assert one(None, None).problem is None
    assert "empty optional" in str(one(None, want).problem)


def test_small_floats_are_floats() -> None:
    want = np.linspace(-1, 1, 8).astype(ml_dtypes.bfloat16)
    have = (want.astype(np.float32) * 1.25).astype(ml_dtypes.bfloat16)
    assert one(have, want).relative_l2 == pytest.approx(0.25, abs=0.01)
    assert one(want, want).differing is None


def test_other_shapes_are_told() -> None:
    assert one(np.zeros((2, 3)), np.zeros((3, 2))).problem == "shape [2, 3], the reference's is [3, 2]"


def test_tolerances() -> None:
    assert tolerance_of(None, SIGNATURE, 0.1) == {"y": Tolerance(0.1), "z": Tolerance(0.1)}
    assert tolerance_of({"z": 0.2}, SIGNATURE, 0.1) == {"y": Tolerance(0.1), "z": Tolerance(0.2)}
    assert tolerance_of(Tolerance(0.3, 1.0), SIGNATURE, 0.1)["y"].max_abs == 1.0
    with pytest.raises(OptionError, match="'q', which is no output; there are y, z"):
        tolerance_of({"q": 0.2}, SIGNATURE, 0.1)
    for wrong in (-1.0, "much", True, math.nan):
        with pytest.raises(OptionError, match="tolerance relative_l2"):
            tolerance_of(wrong, SIGNATURE, 0.1)  # type: ignore[arg-type]


def test_reports_survive_json() -> None:
    have = np.eye(10, dtype=np.float32)
    have[0, 0] = np.inf
    outputs = (
        one(have, np.eye(10, dtype=np.float32), labels=np.arange(10)),
        one(np.ones(2), np.zeros(2)),
        one(np.ones(2), np.zeros(3)),
    )
    report = VerificationReport("r", "given", 3, outputs, Culprit(0, "e", "fp32", "n[1]", "Conv-11", "v", "a lot"))
    assert math.isinf(outputs[1].relative_l2 or 0)
    assert VerificationReport.from_json(report.to_json()) == report
    assert "OUT OF TOLERANCE" in report.text()
    assert "n[1]" in report.text()
    for key, value in (("calls", "1"), ("outputs", [{}]), ("reference", 3), ("culprit", 7)):
        with pytest.raises((KeyError, TypeError, ValueError)):
            VerificationReport.from_json({**report.to_json(), key: value})
