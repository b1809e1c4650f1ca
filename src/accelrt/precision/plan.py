"""Which candidate computes in which precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from accelrt.backend import Precision
from accelrt.errors import OptionError
from accelrt.registry import Candidate


def precision_named(text: object) -> Precision:
    """Return the precision.

    Raises:
        OptionError: None has this name.
    """
    for known in get_args(Precision):
        if text == known:
            return known  # type: ignore[no-any-return]
    raise OptionError(f"precision must be one of {', '.join(get_args(Precision))}, not {text!r}.")


def plan(
    candidates: Sequence[Candidate], precision: Precision | None
) -> tuple[tuple[Candidate, ...], tuple[Precision, ...]]:
    """Say what each candidate computes in; the requested engine may come twice.

    Without a precision each engine has its default. With one, the requested engine, which is the first, has it, and
    what it refuses goes to the CPU's engines in float32, among them the requested one if it is the CPU's. An int8
    model says itself where its integers are, so the CPU's engines are asked for int8 first.
    """
    first, *rest = candidates
    if precision is None:
        return tuple(candidates), tuple(candidate.engine.caps.default_precision for candidate in candidates)
    pairs: list[tuple[Candidate, Precision]] = [(first, precision)]
    if precision == "int8":
        pairs += [(candidate, "int8") for candidate in rest]
    if precision != "fp32":
        pairs += (
            [(first, "fp32")] if first.backend.name == "cpu" and first.engine.name in first.backend.fallback else []
        )
    pairs += [(candidate, "fp32") for candidate in rest]
    return tuple(candidate for candidate, _ in pairs), tuple(chosen for _, chosen in pairs)
