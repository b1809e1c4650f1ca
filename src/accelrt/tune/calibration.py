"""From what a user gives to calibrate with to a graph in Q/DQ form, checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from accelrt.errors import CalibrationError, InputError, OptionError
from accelrt.precision.calibrate import Calibration, check_calls, is_quantised, quantise
from accelrt.runtime.inputs import bind_calls

if TYPE_CHECKING:
    from accelrt.artifact.making import Progress
    from accelrt.graph.model import Graph
    from accelrt.graph.types import Value


def quantised(graph: Graph, given: Calibration | Iterable[Any] | None, progress: Progress | None) -> Graph:
    """Return a graph in Q/DQ form: itself if it is quantised already.

    Raises:
        OptionError: It is quantised and inputs are given, or it is not and none are.
        CalibrationError: The inputs are none, do not fit, or hold NaN.
        SourceError: It cannot be quantised.
    """
    if is_quantised(graph):
        if given is not None:
            raise OptionError("The model is quantised already, and takes no calibration.")
        return graph
    if given is None:
        raise OptionError(
            "precision='int8' needs typical inputs to calibrate with.",
            hint="Pass calibration=[...]; a hundred are usually enough.",
        )
    return quantise(graph, *calibration_calls(graph, given), progress)


def calibration_calls(
    graph: Graph, given: Calibration | Iterable[Any]
) -> tuple[list[Mapping[str, Value]], Calibration]:
    """Bind and check the inputs to calibrate with.

    Raises:
        CalibrationError: They are none, do not fit, or hold NaN.
    """
    how = given if isinstance(given, Calibration) else Calibration(given)
    inputs = [how.inputs] if isinstance(how.inputs, Mapping) else how.inputs
    if isinstance(inputs, str | bytes) or not hasattr(inputs, "__iter__"):
        raise CalibrationError(f"The calibration set must be an iterable of inputs, not {inputs!r}.")
    try:
        calls = bind_calls(graph.signature, inputs)
    except InputError as error:
        raise CalibrationError(f"The calibration set does not fit. {error.message}", hint=error.hint) from error
    check_calls(calls)
    return calls, how
