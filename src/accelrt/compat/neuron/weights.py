"""Weights that stay outside a program: held by the traced module, given to the program with each call, replaceable."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree

_PREFIX = "held_"


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of a module by name; none of what is no module, or TorchScript already."""
    if not isinstance(module, torch.nn.Module) or isinstance(module, torch.jit.ScriptModule):
        return {}
    return {name: value.detach() for name, value in (*module.named_parameters(), *module.named_buffers())}


class FlatHeld(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A module of nests of tensors as a function of tensors, the last of which are its weights."""

    def __init__(self, module: Any, nest: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self._nest, self._names = nest, list(names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = len(tensors) - len(self._names)
        args = pytree.tree_unflatten(list(tensors[:count]), self._nest)
        weights = dict(zip(self._names, tensors[count:], strict=True))
        results = torch.func.functional_call(self.module, weights, args)
        return tuple(one for one in pytree.tree_leaves(results) if isinstance(one, torch.Tensor))


class PackedHeld(torch.nn.Module):  # type: ignore[misc]
    """A program with the inputs and outputs of the function that it was made of, and with that function's weights."""

    def __init__(self, neuron: Any, results: Any, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.neuron = neuron
        self._results = results
        # A buffer's name has no dots in it, and must come back from a file.
        self._held = [_PREFIX + name.encode().hex() for name in weights]
        for name, value in zip(self._held, weights.values(), strict=True):
            self.register_buffer(name, value.clone())

    def forward(self, *args: Any) -> Any:
        held = [getattr(self, name) for name in self._held]
        return pytree.tree_unflatten(self.neuron([*pytree.tree_leaves(args), *held]), self._results)


def replace_weights(neuron_model: Any, weights: Any) -> None:
    """Give a module that was traced with ``inline_weights_to_neff=False`` other weights. In place.

    Args:
        neuron_model: What tracing returned, or ``torch.jit.load``.
        weights: A module like the one that was traced, or its ``state_dict``; what it lacks stays as it is.

    Raises:
        TypeError: ``weights`` is neither.
        ValueError: A weight of another shape; none has been replaced then.
    """
    if not isinstance(weights, torch.nn.Module | Mapping):
        raise TypeError(f"weights are a module or a state_dict, not a {type(weights).__name__}")
    given = weights_of(weights) if isinstance(weights, torch.nn.Module) else weights
    buffers = {name.rpartition(".")[2]: value for name, value in neuron_model.named_buffers()}
    held = {
        bytes.fromhex(name.removeprefix(_PREFIX)).decode(): value
        for name, value in buffers.items()
        if name.startswith(_PREFIX)
    }
    if not held:
        warnings.warn(
            "The model has no weights apart from its program; trace it with inline_weights_to_neff=False.",
            UserWarning,
            stacklevel=2,
        )
    for name in held.keys() & given.keys():
        if held[name].shape != given[name].shape:
            raise ValueError(f"{name} is {tuple(given[name].shape)}, and was {tuple(held[name].shape)} in the trace")
    with torch.no_grad():
        for name in held.keys() & given.keys():
            held[name].copy_(given[name])
