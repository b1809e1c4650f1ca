"""Compiled programs as TorchScript: a module that holds an artifact and calls it by an operator of accelrt's.

So the vendor's way stays: ``torch.jit.save`` and ``torch.jit.load`` work as they are, as long as this module is
imported before a file is loaded; a program is placed while it is loaded.
"""

# No `from __future__ import annotations`: torch.jit.script reads the annotations themselves.

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, List, Tuple  # noqa: UP035 - TorchScript's own words

import torch

from accelrt.compat.neuron import residents
from accelrt.compat.neuron.calling import call
from accelrt.compat.neuron.residents import Placement
from accelrt.graph.types import Signature, TensorType, numpy_dtype

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact

_CONTEXT = threading.local()


class Program(torch.nn.Module):  # type: ignore[misc]  # torch is untyped here
    """One program. ``handle`` is a number of this process; ``packed`` the artifact's file."""

    def __init__(self, packed: torch.Tensor, handle: torch.Tensor) -> None:
        super().__init__()
        self.packed = packed
        self.handle = handle
        self.dynamic = False
        self.lazy = False

    def forward(self, inputs: List[torch.Tensor]) -> List[torch.Tensor]:  # noqa: UP006
        return torch.ops.accelrt.neuron_run(self.handle, inputs, self.dynamic)  # type: ignore[no-any-return]

    @torch.jit.export  # type: ignore[untyped-decorator]
    def __getstate__(self) -> Tuple[torch.Tensor, bool, bool, bool]:  # noqa: UP006
        return (self.packed, self.dynamic, self.lazy, self.training)

    @torch.jit.export  # type: ignore[untyped-decorator]
    def __setstate__(self, state: Tuple[torch.Tensor, bool, bool, bool]) -> None:  # noqa: UP006
        self.packed = state[0]
        self.dynamic = state[1]
        self.lazy = state[2]
        self.training = state[3]
        self.handle = torch.ops.accelrt.neuron_load(state[0], state[2])


def program_of(artifact: "Artifact") -> Any:
    """Return an artifact as a scripted module that takes a list of tensors and returns one."""
    with TemporaryDirectory(prefix="accelrt-neuron-") as folder:
        packed = artifact.save(Path(folder) / "model.accel").read_bytes()
    handle = _handle(residents.settle(artifact))
    return torch.jit.script(Program(torch.frombuffer(bytearray(packed), dtype=torch.uint8), handle))


def programs_in(script: Any) -> list[Any]:
    """Return the programs in a traced module; empty for a module that was not traced here."""
    if not isinstance(script, torch.jit.ScriptModule):
        return []
    return [one for one in script.modules() if getattr(one, "original_name", None) == Program.__name__]


def numbers_in(script: Any) -> list[int]:
    """Return the numbers under which `residents` knows the programs in a traced module."""
    return [int(one.handle) for one in programs_in(script)]


@contextmanager
def placed(placement: Placement) -> Iterator[None]:
    """Place what is loaded inside, in this thread."""
    before = getattr(_CONTEXT, "placement", None)
    _CONTEXT.placement = placement
    try:
        yield
    finally:
        _CONTEXT.placement = before


@contextmanager
def pretending(outputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let programs that are called inside, in this thread, give these outputs: a trace needs no device."""
    _CONTEXT.outputs = list(outputs)
    try:
        yield
    finally:
        _CONTEXT.outputs = None


def signature_of(number: int) -> Signature:
    """Return the inputs and outputs of a program."""
    return residents.resident(number).artifact.signature


def _handle(number: int) -> torch.Tensor:
    handle = torch.tensor(number)
    residents.leave_with(handle, number)
    return handle


def _load(packed: torch.Tensor, lazy: bool) -> torch.Tensor:
    number = residents.settle_packed(packed.cpu().numpy().tobytes())
    handle = _handle(number)
    place = getattr(_CONTEXT, "placement", None)
    if place is not None or not lazy:
        residents.put(number, place or Placement())
    return handle


def _run(handle: torch.Tensor, inputs: list[torch.Tensor], dynamic: bool) -> list[torch.Tensor]:
    if (pretended := getattr(_CONTEXT, "outputs", None)) is not None:
        return [output.clone() for output in pretended]
    number = int(handle)
    found = call(number, [_to_array(tensor) for tensor in inputs], dynamic=dynamic)
    return [_to_tensor(array, port.type) for array, port in zip(found, signature_of(number).outputs, strict=True)]


def _to_array(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(numpy_dtype("bfloat16"))
    return tensor.numpy()


def _to_tensor(array: Any, type_: Any) -> torch.Tensor:
    if not array.flags.writeable:
        array = array.copy()  # torch knows no tensors that are not to be written to
    if isinstance(type_, TensorType) and type_.dtype == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


_LIBRARY = torch.library.Library("accelrt", "DEF")
_LIBRARY.define("neuron_load(Tensor packed, bool lazy) -> Tensor")
_LIBRARY.define("neuron_run(Tensor handle, Tensor[] inputs, bool dynamic) -> Tensor[]")
_LIBRARY.impl("neuron_load", _load, "CompositeExplicitAutograd")
_LIBRARY.impl("neuron_run", _run, "CompositeExplicitAutograd")
