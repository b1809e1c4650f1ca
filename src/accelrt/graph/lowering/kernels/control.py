"""If, Loop and Scan: bodies are modules of their own, called by Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor

Body = Callable[..., tuple[Any, ...]]


def if_(condition: Tensor, then_branch: Body, else_branch: Body, captures: Sequence[Any]) -> tuple[Any, ...]:
    return (then_branch if bool(condition) else else_branch)(*captures)


def loop(
    trips: Any, condition: Any, states: Sequence[Any], body: Body, captures: Sequence[Any], *, scans: int,
    empty: Sequence[Any], device: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Loop until the count or the condition ends it; ``empty`` are the scan outputs of no trip at all."""
    limit = None if trips is None else int(trips)
    going = True if condition is None else bool(condition)
    state, collected, trip = list(states), [[] for _ in range(scans)], 0  # type: list[Any], list[list[Any]], int
    while going and (limit is None or trip < limit):
        results = body(
            torch.tensor(trip, dtype=torch.int64, device=device), torch.tensor(True, device=device), *state, *captures
        )
        going = bool(results[0])
        state = list(results[1 : 1 + len(state)])
        for kept, value in zip(collected, results[1 + len(state) :], strict=True):
            kept.append(value)
        trip += 1
    return (*state, *(torch.stack(kept) if kept else none for kept, none in zip(collected, empty, strict=True)))


def scan(
    states: Sequence[Any], inputs: Sequence[Tensor], body: Body, captures: Sequence[Any], *,
    input_axes: Sequence[int], input_directions: Sequence[int], output_axes: Sequence[int],
    output_directions: Sequence[int], empty: Sequence[Any],
) -> tuple[Any, ...]:  # fmt: skip
    """Scan slices of the inputs in step."""
    count = inputs[0].shape[input_axes[0]]
    slices = [x.unbind(axis) for x, axis in zip(inputs, input_axes, strict=True)]
    slices = [s[::-1] if backward else s for s, backward in zip(slices, input_directions, strict=True)]
    state = list(states)
    collected: list[list[Any]] = [[] for _ in output_axes]
    for trip in range(count):
        results = body(*state, *(s[trip] for s in slices), *captures)
        state = list(results[: len(state)])
        for kept, value in zip(collected, results[len(state) :], strict=True):
            kept.append(value)
    stacked = [
        torch.stack(kept[::-1] if backward else kept, axis) if kept else none
        for kept, axis, backward, none in zip(collected, output_axes, output_directions, empty, strict=True)
    ]
    return (*state, *stacked)
