"""PyTorch's interfaces to Elastic Inference: ``optimized_execution`` of 1.3.1 and ``attach_eia`` of 1.5.1."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree

import accelrt
from accelrt.compat.eia.target import check_ordinal, load, target_of
from accelrt.errors import AccelrtError
from accelrt.graph.types import TensorType, numpy_dtype

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.runtime.session import Session

MOST_SHAPES = 16
"""Programs that a module keeps, one for each set of shapes; the one unused for longest leaves first."""

_DEVICE = re.compile(r"eia:(0|[1-9][0-9]*)")


class _Flat(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A module of nests of tensors as one of tensors, which returns a tuple of them."""

    def __init__(self, script: Any, nest: Any) -> None:
        super().__init__()
        self.script = script
        self._nest = nest

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        args, kwargs = pytree.tree_unflatten(list(tensors), self._nest)
        return tuple(pytree.tree_leaves(self.script(*args, **kwargs)))


class _Program:
    """A module compiled for one set of shapes, and how it nests what it returns."""

    def __init__(self, script: Any, tensors: list[Any], nest: Any, ordinal: int) -> None:
        with torch.no_grad():
            args, kwargs = pytree.tree_unflatten(list(tensors), nest)
            leaves, self.results = pytree.tree_flatten(script(*args, **kwargs))
        if any(not isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise TypeError("Only modules that return tensors, or nests of them, run on an accelerator")
        self.artifact: Artifact = _compiled(script, tensors, nest)
        if len(self.artifact.signature.outputs) != len(leaves):
            raise RuntimeError(f"The module returned {len(leaves)} tensors, and its program returns others")
        self.session: Session = load(self.artifact, ordinal)

    def __call__(self, tensors: list[Any]) -> Any:
        signature = self.artifact.signature
        found = self.session.predict(
            {port.name: _to_array(tensor) for port, tensor in zip(signature.inputs, tensors, strict=True)}
        )
        values = [_to_tensor(found[port.name], port.type) for port in signature.outputs]
        return pytree.tree_unflatten(values, self.results)


class Bound:
    """TorchScript bound to an accelerator: compiled at the first call with each set of shapes.

    Args:
        script: The module, which computes on the CPU when it is called.
        ordinal: Of the accelerator.
    """

    def __init__(self, script: Any, ordinal: int) -> None:
        self._script, self._ordinal = script, ordinal
        self._programs: OrderedDict[Any, _Program] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors, nest = pytree.tree_flatten((args, kwargs))
        for one in tensors:
            if not isinstance(one, torch.Tensor):
                raise TypeError(f"A module on an accelerator takes tensors, or nests of them, not {type(one).__name__}")
        key = (nest, tuple((one.dtype, tuple(one.shape)) for one in tensors), target_of(True))
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = self._made(tensors, nest)
            self._programs.move_to_end(key)
            while len(self._programs) > MOST_SHAPES:
                self._programs.popitem(last=False)  # its session closes when nobody holds it any more
        return program(tensors)

    def _made(self, tensors: list[Any], nest: Any) -> _Program:
        try:
            program = _Program(self._script, tensors, nest, self._ordinal)
        except AccelrtError as error:
            raise RuntimeError(str(error)) from error
        weakref.finalize(program, program.session.close).atexit = False
        return program


def attach_eia(obj: Any, device: int) -> Any:
    """Return a module like ``obj`` that computes on an accelerator, as ``torcheia.jit.attach_eia`` does.

    Args:
        obj: A ``ScriptModule``; it stays as it is, and shares its weights with what is returned.
        device: The ordinal of an accelerator: on the backend ``eia`` the index of a device.

    Returns:
        A ``ScriptModule``.

    Raises:
        TypeError: ``obj`` is no ScriptModule, or ``device`` no number.
        ValueError: ``device`` is less than 0.
    """
    if not isinstance(obj, torch.jit.ScriptModule):
        raise TypeError(f"attach_eia takes a ScriptModule, not {type(obj).__name__}")
    ordinal = check_ordinal(device, "device")
    original, found = (torch.jit._recursive.wrap_cpp_module(obj._c) for _ in range(2))
    # On the instance, before the class's own forward is looked up: calls from Python come here, the module itself
    # stays the TorchScript that it is.
    found.__dict__["forward"] = Bound(original, ordinal)
    return found


@contextlib.contextmanager
def optimized_execution(should_optimize: bool, eia_options: Mapping[str, str] | None = None) -> Iterator[None]:
    """Run TorchScript on an accelerator that is called inside, in this thread, as PyTorch-EI 1.3.1 does.

    Without the second argument it is PyTorch's own function.

    Args:
        should_optimize: As PyTorch's own.
        eia_options: ``{"target_device": "eia:0"}``, with the ordinal of an accelerator.

    Raises:
        ValueError: Another device, or another option.
    """
    ordinal = None if eia_options is None else _ordinal_of(eia_options)
    with torch.jit.optimized_execution(should_optimize):
        if ordinal is None:
            yield
            return
        with _intercepted(ordinal):
            yield


def _ordinal_of(options: Mapping[str, str]) -> int:
    if not isinstance(options, Mapping) or set(options) != {"target_device"}:
        raise ValueError(f'optimized_execution takes {{"target_device": "eia:0"}}, not {options!r}')
    match = _DEVICE.fullmatch(str(options["target_device"]))
    if match is None:
        raise ValueError(f"target_device is eia: and the ordinal of an accelerator, not {options['target_device']!r}")
    return int(match.group(1))


# While a context is open, the descriptor that finds a script module's `forward` is one of ours. It asks whether the
# thread that calls is inside a context; other threads, and modules inside the module, see what PyTorch put there.

_ACTIVE = threading.local()
_LOCK = threading.Lock()
_BOUND: weakref.WeakKeyDictionary[Any, dict[int, Bound]] = weakref.WeakKeyDictionary()
_PATCHED: dict[type, Any] = {}
_open = 0


class _Forward:
    """Stands before PyTorch's own descriptor of ``forward``.

    It has ``__set__``, so that Python asks it even where an instance has a ``forward`` of its own: PyTorch keeps the
    method there once it was called.
    """

    def __init__(self, original: Any) -> None:
        self.original = original

    def __get__(self, module: Any, cls: type | None = None) -> Any:
        if module is None:
            return self.original.__get__(module, cls)
        own = module.__dict__.get("forward")
        ordinal: int | None = getattr(_ACTIVE, "ordinal", None)
        if ordinal is None or isinstance(own, Bound):
            return self.original.__get__(module, cls) if own is None else own
        return _outside(_bound_to(module, ordinal))

    def __set__(self, module: Any, value: Any) -> None:
        module.__dict__["forward"] = value


def _bound_to(module: Any, ordinal: int) -> Bound:
    with _LOCK:
        known = _BOUND.setdefault(module, {})
        if ordinal not in known:
            known[ordinal] = Bound(torch.jit._recursive.wrap_cpp_module(module._c), ordinal)
        return known[ordinal]


def _outside(bound: Bound) -> Callable[..., Any]:
    """Return a function that calls a module with the context put aside: what compiles it calls it on the CPU."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before, _ACTIVE.ordinal = getattr(_ACTIVE, "ordinal", None), None
        try:
            return bound(*args, **kwargs)
        finally:
            _ACTIVE.ordinal = before

    return call


@contextlib.contextmanager
def _intercepted(ordinal: int) -> Iterator[None]:
    global _open
    with _LOCK:
        if _open == 0:
            for cls in (torch.jit.ScriptModule, torch.jit.TopLevelTracedModule):
                _PATCHED[cls] = cls.__dict__["forward"]
                type.__setattr__(cls, "forward", _Forward(_PATCHED[cls]))
        _open += 1
    before, _ACTIVE.ordinal = getattr(_ACTIVE, "ordinal", None), ordinal
    try:
        yield
    finally:
        _ACTIVE.ordinal = before
        with _LOCK:
            _open -= 1
            if _open == 0:
                for cls, original in _PATCHED.items():
                    type.__setattr__(cls, "forward", original)
                _PATCHED.clear()


def _compiled(script: Any, tensors: list[Any], nest: Any) -> Artifact:
    """Compile a module: as TorchScript of flat tensors, in which the module's own control flow stays."""
    flat = _Flat(script, nest)
    flat.training = script.training
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(flat, tuple(tensors), check_trace=False)
    names = [f"input_{index}" for index in range(len(tensors))]
    return accelrt.compile(traced, target_of(True), example_inputs=tuple(tensors), input_names=names)


def _to_array(tensor: Any) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def _to_tensor(array: Any, type_: Any) -> Any:
    if not array.flags.writeable:
        array = array.copy()  # torch knows no tensors that are not to be written to
    if isinstance(type_, TensorType) and type_.dtype == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
