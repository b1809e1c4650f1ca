"""Trace a module as the vendor does: a function and example tensors in, TorchScript with a compiled program out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree

from accelrt.compat.neuron import compiling
from accelrt.compat.neuron.buckets import Buckets, Packed
from accelrt.compat.neuron.flags import Flags
from accelrt.compat.neuron.program import pretending, program_of
from accelrt.compat.neuron.weights import FlatHeld, PackedHeld, weights_of

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact


class _Flat(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A function of nests of tensors as one of tensors, which returns a tuple of them."""

    def __init__(self, function: Callable[..., Any], nest: Any) -> None:
        super().__init__()
        self.function = function
        self._nest = nest

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = self.function(*pytree.tree_unflatten(list(tensors), self._nest))
        return tuple(one for one in pytree.tree_leaves(results) if isinstance(one, torch.Tensor))


class _Packed(torch.nn.Module):  # type: ignore[misc]
    """A program with the inputs and outputs of the function that it was made of."""

    def __init__(self, neuron: Any, results: Any) -> None:
        super().__init__()
        self.neuron = neuron
        self._results = results

    def forward(self, *args: Any) -> Any:
        return pytree.tree_unflatten(self.neuron(pytree.tree_leaves(args)), self._results)


class Traced:
    """What tracing starts from: a function, its example inputs, and what it returned for them.

    Args:
        function: What is traced.
        example_inputs: A tensor, or a tuple or list of what the function takes.
        held: Keep a module's weights out of the program; see `accelrt.compat.neuron.weights`.

    Raises:
        TypeError: The function is none, or an example is no tensor.
    """

    def __init__(self, function: Callable[..., Any], example_inputs: Any, *, held: bool = False) -> None:
        if not callable(function):
            raise TypeError(f"a module or a function is traced, not a {type(function).__name__}")
        self.args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
        self.examples, nest = pytree.tree_flatten(self.args)
        for one in self.examples:
            if not isinstance(one, torch.Tensor):
                raise TypeError(f"example inputs are tensors, or nests of them; there is a {type(one).__name__}")
        self.weights = weights_of(function) if held else {}
        self.flat = FlatHeld(function, nest, list(self.weights)) if self.weights else _Flat(function, nest)
        self.names = _names(function, self.args, len(self.examples))
        with _evaluating(self.flat), torch.no_grad():
            leaves, self.results = pytree.tree_flatten(function(*self.args))
        self.outputs = leaves

    def compile(self, flags: Flags, *, fallback: str = "warn", options: Mapping[str, Any] | None = None) -> Artifact:
        """Compile for what ``ACCELRT_BACKEND`` says, through torch.export, else as torch.jit.trace sees it."""
        return compiling.build(
            [self.flat, compiling.Later(self._script)],
            self._tensors,
            flags,
            fallback=fallback,
            input_names=[*self.names, *(f"weight_{index}" for index in range(len(self.weights)))],
            options=options,
        )

    @property
    def _tensors(self) -> tuple[Any, ...]:
        return (*self.examples, *self.weights.values())

    def script(self, artifact: Artifact, **arguments: Any) -> Any:
        """Return an artifact as TorchScript.

        Args:
            artifact: What was compiled.
            arguments: Those of ``torch.jit.trace``: ``strict=False`` for a function that returns a dictionary.

        Raises:
            RuntimeError: TorchScript cannot return what the function does.
        """
        program = program_of(artifact)
        packed = PackedHeld(program, self.results, self.weights) if self.weights else _Packed(program, self.results)
        packed.eval()
        with pretending(self.outputs), torch.no_grad():
            return _quietly(torch.jit.trace, packed, self.args, check_trace=False, **arguments)

    def _script(self) -> Any:
        with _evaluating(self.flat), torch.no_grad():
            return _quietly(torch.jit.trace, self.flat, self._tensors, check_trace=False, strict=False)


def bucketed(parts: Sequence[tuple[Traced, Artifact]], kernel: Any) -> Any:
    """Return artifacts as one module of TorchScript, which asks a scripted kernel which of them a call is for.

    Raises:
        ValueError: Their models return different nests.
        RuntimeError: TorchScript cannot return what the models do.
    """
    first = parts[0][0]
    if any(traced.results != first.results for traced, _ in parts):
        raise ValueError("The models of the buckets return different nests of tensors")
    programs = [program_of(artifact) for _, artifact in parts]
    packed = Packed(_quietly(torch.jit.script, Buckets(programs, kernel)), first.results).eval()
    with pretending(first.outputs), torch.no_grad():
        return _quietly(torch.jit.trace, packed, first.args, check_trace=False, strict=False)


def _quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call without torch's warnings that TorchScript is to go: it is what the vendor's programs are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return function(*args, **kwargs)


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and each part of it back into its own."""
    modes = {part: part.training for part in module.modules()}
    for part in modes:
        part.training = False  # `eval()` is refused by what torch.export made
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _names(function: Any, args: tuple[Any, ...], count: int) -> list[str]:
    """Return names for the inputs: those of the function's parameters where each is one tensor."""
    plain = [f"input_{index}" for index in range(count)]
    if len(args) != count or isinstance(function, torch.jit.ScriptModule):
        return plain
    try:
        parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    except (TypeError, ValueError):
        return plain
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    return names[:count] if len(names) >= count else plain
