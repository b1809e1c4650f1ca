"""Placement functions of the vendor: which cores a program is on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from accelrt.compat.neuron import residents
from accelrt.compat.neuron.compiling import vendors_errors
from accelrt.compat.neuron.program import numbers_in, placed
from accelrt.compat.neuron.residents import Placement


def set_neuron_cores(trace: Any, start_nc: int = -1, nc_count: int = -1) -> None:
    """Load the programs of a traced module on these cores, and unload them from where they were.

    Args:
        trace: What tracing returned, or ``torch.jit.load``. Any other module is left as it is.
        start_nc: The first core; -1 for the next free one.
        nc_count: How many; -1 for as many as a program needs. More are replicas that take calls in turn.

    Raises:
        ValueError: A number that cannot be.
        RuntimeError: The cores are not there, or not to be had.
    """
    _put(trace, Placement(start_nc, nc_count))


def set_multicore(trace: Any) -> None:
    """Load the programs of a traced module on all cores, as replicas that take calls in turn; errors as above."""
    _put(trace, Placement(0, residents.ALL))


def neuron_cores_context(start_nc: int = -1, nc_count: int = -1) -> AbstractContextManager[None]:
    """Place what ``torch.jit.load`` loads inside; arguments and ValueError as of `set_neuron_cores`."""
    return placed(Placement(start_nc, nc_count))


def multicore_context() -> AbstractContextManager[None]:
    """Place what ``torch.jit.load`` loads inside on all cores."""
    return placed(Placement(0, residents.ALL))


def _put(trace: Any, placement: Placement) -> None:
    for number in numbers_in(trace):
        with vendors_errors():
            residents.put(number, placement)
