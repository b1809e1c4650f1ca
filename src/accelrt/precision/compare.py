"""Hold outputs against a reference: pure numpy, one row of figures an output.

Floats are measured where both sides are finite; a NaN or an infinity that only one side has fails whatever the
tolerance. Everything else (integers, booleans, text) is measured by the share of elements that differ. Where there
are several calls, the error of an output is that of its worst call, so that many good calls hide no bad one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from accelrt.errors import InputError, OptionError
from accelrt.graph.types import Signature, TensorType, Value

Array: TypeAlias = np.ndarray[Any, Any]

DEFAULT_RELATIVE_L2: Mapping[str, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 2e-2, "int8": 1e-1}
"""What is tolerated where nobody says, by the coarsest precision in the placement."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far one output may be from the reference.

    Attributes:
        relative_l2: Most of ``norm(output - reference) / norm(reference)``; for what is no float, the most of the share
            of elements that differ.
        max_abs: Most of any absolute difference; None for no bound.
        top1: Least share of rows whose first class is the reference's; None for no bound.
    """

    relative_l2: float
    max_abs: float | None = None
    top1: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("relative_l2", self.relative_l2), ("max_abs", self.max_abs), ("top1", self.top1)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value >= 0):
                raise OptionError(f"The tolerance {name} must be a number of 0 or more, not {value!r}.")


Tolerances: TypeAlias = float | Tolerance | Mapping[str, float | Tolerance]
"""One for all outputs, or one by output name; a plain number is a relative L2 error."""


def tolerance_of(given: Tolerances | None, signature: Signature, default: float) -> dict[str, Tolerance]:
    """Return the tolerance of each output; outputs that a mapping leaves out have the default.

    Raises:
        OptionError: A mapping names no output, or a value is no tolerance.
    """
    names = signature.output_names
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - set(names)):
            raise OptionError(
                f"A tolerance is given for {unknown[0]!r}, which is no output; there are {', '.join(names)}."
            )
        return {name: _tolerance(given.get(name, default)) for name in names}
    return dict.fromkeys(names, _tolerance(default if given is None else given))


def _tolerance(given: object) -> Tolerance:
    return given if isinstance(given, Tolerance) else Tolerance(given)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output is from the reference; None where a figure has no meaning.

    Attributes:
        name: The output.
        tolerance: What it was held against.
        relative_l2: Of the worst call: ``norm(output - reference) / norm(reference)`` where both are finite.
        max_abs: Largest absolute difference where both are finite.
        cosine: Least cosine of the angle between a call's output and the reference.
        differing: Share of elements that differ, for what is no float.
        rows: Rows of class scores (float outputs of two dimensions and two classes or more).
        top1: Share of rows whose first class is the reference's first.
        top5: Share of rows in whose first five classes the reference's first is; needs more than five classes.
        nan: NaNs in the output, and in the reference.
        infinite: Infinities in the output, and in the reference.
        mismatched: Elements that are NaN or infinite on one side and not so on the other.
        accuracy: Share of rows whose first class is the label, of the output and of the reference.
        shape_problem: How the shapes or types differ; no figure can be told then.
    """

    name: str
    tolerance: Tolerance
    relative_l2: float | None = None
    max_abs: float | None = None
    cosine: float | None = None
    differing: float | None = None
    rows: int = 0
    top1: float | None = None
    top5: float | None = None
    nan: tuple[int, int] = (0, 0)
    infinite: tuple[int, int] = (0, 0)
    mismatched: int = 0
    accuracy: tuple[float, float] | None = None
    shape_problem: str | None = None

    @property
    def error(self) -> float:
        """What is held against `Tolerance.relative_l2`."""
        return self.relative_l2 if self.relative_l2 is not None else self.differing or 0.0

    @property
    def problem(self) -> str | None:
        """Why the output is not within its tolerance, None if it is."""
        bound = self.tolerance
        if self.shape_problem is not None:
            return self.shape_problem
        if self.mismatched:
            return (
                f"{_count(self.mismatched, 'element')} NaN or infinite where the reference is not, or not where it is"
            )
        if not self.error <= bound.relative_l2:
            what = "relative L2 error" if self.relative_l2 is not None else "share of differing elements"
            return f"{what} {self.error:.3g} over {bound.relative_l2:g}"
        if bound.max_abs is not None and self.max_abs is not None and not self.max_abs <= bound.max_abs:
            return f"absolute error {self.max_abs:.3g} over {bound.max_abs:g}"
        if bound.top1 is not None and self.top1 is not None and not self.top1 >= bound.top1:
            return f"top-1 agreement {self.top1:.4g} under {bound.top1:g}"
        return None


Calls: TypeAlias = Sequence[Mapping[str, Value]]


def compare(
    found: Calls,
    wanted: Calls,
    tolerances: Mapping[str, Tolerance],
    labels: Mapping[str, Array] | None = None,
) -> tuple[OutputError, ...]:
    """Compare the outputs of the same calls.

    Args:
        found: For each call, the outputs by name.
        wanted: Likewise, of the reference.
        tolerances: For each output that is compared.
        labels: For outputs that are class scores, the right class of each row of all calls.

    Raises:
        InputError: Labels for what is no class score, or not as many as rows.
    """
    return tuple(
        _compare_output(
            name,
            tolerance,
            [call[name] for call in found],
            [call[name] for call in wanted],
            (labels or {}).get(name),
        )
        for name, tolerance in tolerances.items()
    )


def _compare_output(
    name: str, tolerance: Tolerance, found: Sequence[Value], wanted: Sequence[Value], labels: Array | None
) -> OutputError:
    pairs: list[tuple[Array, Array]] = []
    for have, want in zip(found, wanted, strict=True):
        if (problem := _pair_up(have, want, pairs)) is not None:
            return OutputError(name, tolerance, shape_problem=problem)
    floats = [(have, want) for have, want in pairs if _is_float(want)]
    others = [(have, want) for have, want in pairs if not _is_float(want)]
    figures: dict[str, Any] = _measure(floats) if floats else {}
    if others:
        total = sum(want.size for _, want in others)
        figures["differing"] = sum(int(np.sum(have != want)) for have, want in others) / total if total else 0.0
    if pairs and all(_is_scores(want) for _, want in pairs):
        figures.update(_classes([have for have, _ in pairs], [want for _, want in pairs], name, labels))
    elif labels is not None:
        raise InputError(f"Labels are given for {name!r}, which is no table of class scores.")
    return OutputError(name, tolerance, **figures)


def _pair_up(have: Value, want: Value, pairs: list[tuple[Array, Array]]) -> str | None:
    """Add the arrays of a pair of values; return how the two do not match."""
    if have is None or want is None:
        return None if have is want else "one of the two is an empty optional"
    if isinstance(have, list) or isinstance(want, list):
        if not (isinstance(have, list) and isinstance(want, list) and len(have) == len(want)):
            return "sequences of different lengths"
        problems = (_pair_up(*pair, pairs) for pair in zip(have, want, strict=True))
        return next((problem for problem in problems if problem is not None), None)
    left, right = np.asarray(have), np.asarray(want)
    if left.shape != right.shape:
        return f"shape {list(left.shape)}, the reference's is {list(right.shape)}"
    pairs.append((left, right))
    return None


def _is_float(array: Array) -> bool:
    # ml_dtypes' bfloat16 and its like are of numpy's kind "V" and have no name of an integer.
    return array.dtype.kind in "fc" or (array.dtype.kind == "V" and "float" in array.dtype.name)


def _is_scores(array: Array) -> bool:
    return _is_float(array) and array.dtype.kind != "c" and array.ndim == 2 and array.shape[1] >= 2


def _wide(array: Array) -> Array:
    return array if array.dtype.kind == "c" else array.astype(np.float64)


def _measure(pairs: Sequence[tuple[Array, Array]]) -> dict[str, Any]:
    worst_l2, worst_abs, least_cosine = 0.0, 0.0, 1.0
    nan, infinite, mismatched = [0, 0], [0, 0], 0
    with np.errstate(all="ignore"):
        for pair in pairs:
            have, want = (_wide(array).ravel() for array in pair)
            for side, array in enumerate((have, want)):
                nan[side] += int(np.isnan(array).sum())
                infinite[side] += int(np.isinf(array).sum())
            finite = np.isfinite(have) & np.isfinite(want)
            same = finite | (np.isnan(have) & np.isnan(want)) | (have == want)
            mismatched += int((~same).sum())
            have, want = have[finite], want[finite]
            worst_l2 = max(worst_l2, relative_l2(have, want))
            worst_abs = max(worst_abs, float(np.abs(have - want).max(initial=0.0)))
            least_cosine = min(least_cosine, cosine(have, want))
    return {
        "relative_l2": worst_l2,
        "max_abs": worst_abs,
        "cosine": least_cosine,
        "nan": tuple(nan),
        "infinite": tuple(infinite),
        "mismatched": mismatched,
    }


def relative_l2(have: Array, want: Array) -> float:
    """Return ``norm(have - want) / norm(want)`` of finite vectors; 0 if both are 0, infinity if only ``want`` is."""
    with np.errstate(all="ignore"):
        scale = float(np.abs(want).max(initial=0.0))
        difference = have - want
        if scale == 0.0:
            return 0.0 if not np.any(difference) else math.inf
        # Scaled, so that squares of large and of tiny numbers stay numbers.
        return float(np.linalg.norm(difference / scale) / np.linalg.norm(want / scale))


def cosine(have: Array, want: Array) -> float:
    """Return the cosine of the angle between finite vectors; 1 if both are 0, 0 if only one is."""
    tops = [float(np.abs(array).max(initial=0.0)) for array in (have, want)]
    if not all(tops):
        return 1.0 if tops == [0.0, 0.0] else 0.0
    with np.errstate(all="ignore"):
        left, right = have / tops[0], want / tops[1]
        value = float(np.real(np.vdot(right, left)) / (np.linalg.norm(left) * np.linalg.norm(right)))
    return min(1.0, max(-1.0, value))


def _classes(found: Sequence[Array], wanted: Sequence[Array], name: str, labels: Array | None) -> dict[str, Any]:
    by_size: dict[int, list[tuple[Array, Array]]] = {}
    for have, want in zip(found, wanted, strict=True):
        by_size.setdefault(want.shape[1], []).append((_wide(have), _wide(want)))
    first = [(_first(have), _first(want)) for have, want in zip(found, wanted, strict=True)]
    have_first = np.concatenate([have for have, _ in first])
    want_first = np.concatenate([want for _, want in first])
    rows = len(want_first)
    if not rows:
        return {}
    figures: dict[str, Any] = {"rows": rows, "top1": float(np.mean((have_first == want_first) & (want_first >= 0)))}
    if min(by_size) > 5:
        hits = sum(_hits(_wide(have), _first(want)) for have, want in zip(found, wanted, strict=True))
        figures["top5"] = hits / rows
    if labels is not None:
        right = np.asarray(labels).ravel()
        if len(right) != rows:
            raise InputError(f"{len(right)} labels are given for {name!r}, which has {_count(rows, 'row')}.")
        figures["accuracy"] = (float(np.mean(have_first == right)), float(np.mean(want_first == right)))
    return figures


def _first(scores: Array) -> Array:
    """Return the first class of each row, -1 where the row holds NaN."""
    wide = _wide(scores)
    return np.where(np.isnan(wide).any(axis=1), -1, wide.argmax(axis=1))


def _hits(scores: Array, first: Array) -> int:
    """Count the rows of which the class ``first`` is among the first five."""
    clean = np.where(np.isnan(scores), -np.inf, scores)
    own = clean[np.arange(len(first)), np.maximum(first, 0)]
    ahead = (clean > own[:, None]).sum(axis=1)
    return int(((ahead < 5) & (first >= 0) & ~np.isnan(scores).any(axis=1)).sum())


def score_outputs(signature: Signature) -> tuple[str, ...]:
    """Return the outputs that are tables of class scores by their types."""
    return tuple(
        port.name
        for port in signature.outputs
        if isinstance(port.type, TensorType)
        and "float" in port.type.dtype
        and port.type.shape is not None
        and len(port.type.shape) == 2
        and (not isinstance(port.type.shape[1], int) or port.type.shape[1] >= 2)
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
