"""RNN, GRU and LSTM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelrt.graph.lowering.dtypes import Tensor

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
}

State = tuple[Tensor, ...]


def rnn(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    initial_h: Tensor | None = None, *, hidden_size: int, activations: Sequence[str] = (), clip: float | None = None,
    direction: str = "forward", layout: int = 0, output_sequence: int = 1, activation_alpha: Any = None,
    activation_beta: Any = None,
) -> Sequence[Tensor]:  # fmt: skip
    names = list(activations) or ["Tanh"] * w.shape[0]

    def step(d: int) -> Callable[[Tensor, State], State]:
        f = _clipped(names[d], clip)
        recurrent = r[d].t()
        return lambda projected, state: (f(projected + state[0] @ recurrent),)

    def bias(d: int) -> Tensor | None:
        return None if b is None else b[d, :hidden_size] + b[d, hidden_size:]

    return _run(x, w, lengths, (initial_h,), hidden_size, direction, layout, step, bias)


def gru(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    initial_h: Tensor | None = None, *, hidden_size: int, activations: Sequence[str] = (), clip: float | None = None,
    direction: str = "forward", layout: int = 0, linear_before_reset: int = 0, output_sequence: int = 1,
    activation_alpha: Any = None, activation_beta: Any = None,
) -> Sequence[Tensor]:  # fmt: skip
    n = hidden_size
    names = list(activations) or ["Sigmoid", "Tanh"] * w.shape[0]

    def step(d: int) -> Callable[[Tensor, State], State]:
        f, g = _clipped(names[2 * d], clip), _clipped(names[2 * d + 1], clip)
        gates, hidden = r[d, : 2 * n].t(), r[d, 2 * n :].t()
        hidden_bias = None if b is None else b[d, 5 * n :]

        def cell(projected: Tensor, state: State) -> State:
            h = state[0]
            z, reset = f(projected[:, : 2 * n] + h @ gates).chunk(2, 1)
            if linear_before_reset:
                inner = h @ hidden
                inner = inner if hidden_bias is None else inner + hidden_bias
                candidate = g(projected[:, 2 * n :] + reset * inner)
            else:
                inner = (reset * h) @ hidden
                inner = inner if hidden_bias is None else inner + hidden_bias
                candidate = g(projected[:, 2 * n :] + inner)
            return ((1 - z) * candidate + z * h,)

        return cell

    def bias(d: int) -> Tensor | None:
        # The recurrent bias of the hidden gate stays apart: the reset gate may act on it.
        if b is None:
            return None
        return torch.cat([b[d, : 2 * n] + b[d, 3 * n : 5 * n], b[d, 2 * n : 3 * n]])

    return _run(x, w, lengths, (initial_h,), hidden_size, direction, layout, step, bias)


def lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None = None, lengths: Tensor | None = None,
    initial_h: Tensor | None = None, initial_c: Tensor | None = None, p: Tensor | None = None, *, hidden_size: int,
    activations: Sequence[str] = (), clip: float | None = None, direction: str = "forward", layout: int = 0,
    input_forget: int = 0, output_sequence: int = 1, activation_alpha: Any = None, activation_beta: Any = None,
) -> Sequence[Tensor]:  # fmt: skip
    n = hidden_size
    names = list(activations) or ["Sigmoid", "Tanh", "Tanh"] * w.shape[0]

    def step(d: int) -> Callable[[Tensor, State], State]:
        f, g = _clipped(names[3 * d], clip), _clipped(names[3 * d + 1], clip)
        final = _ACTIVATIONS[names[3 * d + 2].lower()]
        recurrent = r[d].t()
        peep = None if p is None else p[d].split(n)

        def cell(projected: Tensor, state: State) -> State:
            h, c = state
            i, o, forget, candidate = (projected + h @ recurrent).split(n, 1)
            if peep is not None:
                i, forget = i + peep[0] * c, forget + peep[2] * c
            i = f(i)
            forget = 1 - i if input_forget else f(forget)
            c = forget * c + i * g(candidate)
            o = f(o if peep is None else o + peep[1] * c)
            return o * final(c), c

        return cell

    def bias(d: int) -> Tensor | None:
        return None if b is None else b[d, : 4 * n] + b[d, 4 * n :]

    return _run(x, w, lengths, (initial_h, initial_c), hidden_size, direction, layout, step, bias)


def _clipped(name: str, clip: float | None) -> Callable[[Tensor], Tensor]:
    function = _ACTIVATIONS[name.lower()]
    if clip is None:
        return function
    limit = clip
    return lambda x: function(x.clamp(-limit, limit))


def _run(
    x: Tensor, w: Tensor, lengths: Tensor | None, initial: Sequence[Tensor | None], hidden_size: int, direction: str,
    layout: int, step: Callable[[int], Callable[[Tensor, State], State]], bias: Callable[[int], Tensor | None],
) -> Sequence[Tensor]:  # fmt: skip
    """Run each direction over time; return all outputs and the last of each state, in ONNX's layout.

    The input's share of all gates is one product for all steps at once.
    """
    if layout:
        x = x.transpose(0, 1)
        initial = [None if item is None else item.transpose(0, 1) for item in initial]
    time, batch = x.shape[0], x.shape[1]
    sequences, lasts = [], []
    for d in range(w.shape[0]):
        backward = direction == "reverse" or d == 1
        projected = torch.matmul(x, w[d].t())
        offset = bias(d)
        projected = projected if offset is None else projected + offset
        blank = torch.zeros([batch, hidden_size], dtype=x.dtype, device=x.device)
        state: State = tuple(blank if item is None else item[d] for item in initial)
        cell = step(d)
        outputs: list[Tensor] = [blank] * time
        for t in range(time - 1, -1, -1) if backward else range(time):
            new = cell(projected[t], state)
            if lengths is None:
                outputs[t], state = new[0], new
                continue
            # Beyond its length a sequence keeps its state, and its output is zero.
            alive = (lengths > t)[:, None]
            outputs[t] = torch.where(alive, new[0], blank)
            state = tuple(torch.where(alive, n, s) for n, s in zip(new, state, strict=True))
        sequences.append(torch.stack(outputs) if outputs else x.new_zeros([0, batch, hidden_size]))
        lasts.append(state)
    y = torch.stack(sequences, 1)
    finals = [torch.stack([state[i] for state in lasts]) for i in range(len(initial))]
    if layout:
        return (y.permute(2, 0, 1, 3), *(item.transpose(0, 1) for item in finals))
    return (y, *finals)
