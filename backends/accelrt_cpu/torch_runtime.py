"""PyTorch in this process: programs resident on the CPU, and how arrays get into and out of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.backend import Executable
from accelrt.graph import exported
from accelrt.graph.types import Port, Signature, TensorType, Value, numpy_dtype

# How types that torch's own conversion lacks travel: with the same bits, in an integer of the same width.
_SAME_BITS = {
    "bfloat16": "int16",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
}


def open_program(path: Path, signature: Signature, threads: int, bf16: bool) -> Executable:
    """Make an exported program resident, to be run operator by operator."""
    import torch

    program = torch.export.load(path)
    module = program.module()
    held = (*program.state_dict.values(), *program.constants.values())
    leaves = exported.arguments(program)
    in_spec = program.call_spec.in_spec

    def call(tensors: list[Any]) -> Iterable[Any]:
        given = iter(tensors)
        flat = [next(given) if is_input else value for is_input, value in leaves]
        args, kwargs = torch.utils._pytree.tree_unflatten(flat, in_spec)
        returned = torch.utils._pytree.tree_leaves(module(*args, **kwargs))
        return [leaf for leaf, kept in zip(returned, results, strict=True) if kept]

    results = exported.results(program)
    return Resident(call, signature, held, threads=threads, bf16=bf16, copies_inputs=exported.writes(program))


def open_script(path: Path, signature: Signature, threads: int, bf16: bool) -> Executable:
    """Make TorchScript resident."""
    import torch

    script = torch.jit.load(str(path), map_location="cpu").eval()
    held = [*script.parameters(), *script.buffers(), *_constants(script.inlined_graph)]

    def call(tensors: list[Any]) -> Iterable[Any]:
        return [leaf for leaf in torch.utils._pytree.tree_leaves(script(*tensors)) if leaf is not None]

    return Resident(call, signature, held, threads=threads, bf16=bf16, copies_inputs=_writes(script.inlined_graph))


def _constants(graph: Any) -> Iterator[Any]:
    for node in graph.nodes():
        if node.kind() == "prim::Constant" and "value" in node.attributeNames() and node.kindOf("value") == "t":
            yield node.t("value")
        for block in node.blocks():
            yield from _constants(block)


def _writes(graph: Any) -> bool:
    """Tell whether TorchScript has an operator that works in place, and so might write to an input."""
    for node in graph.nodes():
        if node.kind().startswith("aten::") and node.kind().endswith("_") and not node.kind().endswith("__"):
            return True
        if any(_writes(block) for block in node.blocks()):
            return True
    return False


def open_package(path: Path, signature: Signature, threads: int, sizes: Mapping[str, Any]) -> Executable:
    """Make a package of AOTInductor resident.

    Args:
        path: The package.
        signature: Of the model.
        threads: As for `Resident`.
        sizes: What `accelrt_cpu.torch_child.package` returned. Compiled code checks nothing, and reads past the end of
            what is too small.
    """
    import torch

    loader = torch._inductor.aoti_load_package(str(path)).loader
    turn = threading.Lock()

    def call(tensors: list[Any]) -> Iterable[Any]:
        # The package has one runner; a second thread in it waits for that while it holds Python's own lock, and if the
        # first one needs Python, both wait for ever.
        with turn:
            results: Iterable[Any] = loader.boxed_run(tensors)
            return results

    resident = Resident(call, signature, (), threads=threads, bf16=False, copies_inputs=False)
    agreed = exported.Sizes(signature, sizes)

    def check(inputs: Mapping[str, Value]) -> None:
        if (problem := agreed.problem(inputs)) is not None:
            raise ValueError(problem)

    resident.check = check
    return resident


class Resident(Executable):
    """A program of torch's: tensors in, tensors out, in the order of the signature.

    Args:
        call: Takes a list of tensors, and returns the outputs.
        signature: Of the model.
        held: Tensors of the program's own, whose memory must not leave it.
        threads: Threads that share one operator; 0 leaves torch's own number, which is the process's.
        bf16: Compute under autocast to bfloat16.
        copies_inputs: The program may write to its inputs.
    """

    def __init__(
        self,
        call: Callable[[list[Any]], Iterable[Any]],
        signature: Signature,
        held: Iterable[Any],
        *,
        threads: int,
        bf16: bool,
        copies_inputs: bool,
    ) -> None:
        import torch

        self._torch = torch
        self._call: Callable[[list[Any]], Iterable[Any]] | None = call
        self._signature = signature
        self._own = {value.untyped_storage().data_ptr() for value in held if isinstance(value, torch.Tensor)}
        self._threads, self._bf16, self._copies_inputs = threads, bf16, copies_inputs
        self.check: Callable[[Mapping[str, Value]], None] | None = None

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        call, torch = self._call, self._torch
        if call is None:
            raise RuntimeError("the executable was closed")
        if self.check is not None:
            self.check(inputs)
        tensors = [self._to_torch(inputs[port.name]) for port in self._signature.inputs]
        lent = self._own.union(tensor.untyped_storage().data_ptr() for tensor in tensors)
        with torch.inference_mode(), self._threaded(), self._autocast():
            results = list(call(tensors))
        ports = self._signature.outputs
        if len(results) != len(ports):
            raise RuntimeError(f"the model returned {len(results)} tensors, and its signature has {len(ports)}")
        return {port.name: self._to_numpy(value, port, lent) for port, value in zip(ports, results, strict=True)}

    def close(self) -> None:
        self._call = None

    @contextlib.contextmanager
    def _threaded(self) -> Iterator[None]:
        """Set torch's number of threads, which belongs to the process, for this call alone."""
        torch = self._torch
        before = torch.get_num_threads()
        if self._threads in (0, before):
            yield
            return
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self._bf16:
            return contextlib.nullcontext()
        autocast: contextlib.AbstractContextManager[Any] = self._torch.autocast("cpu", dtype=self._torch.bfloat16)
        return autocast

    def _to_torch(self, array: np.ndarray[Any, Any]) -> Any:
        bits = _SAME_BITS.get(array.dtype.name)
        plain = array if bits is None else array.view(bits)
        if not plain.flags.writeable and not self._copies_inputs:
            plain = np.asarray(_Writeable(plain))
        tensor = self._torch.from_numpy(plain.copy() if self._copies_inputs else plain)
        return tensor if bits is None else tensor.view(getattr(self._torch, array.dtype.name))

    def _to_numpy(self, value: Any, port: Port, lent: set[int]) -> Value:
        torch = self._torch
        dtype = port.type.dtype if isinstance(port.type, TensorType) else "float32"
        if not isinstance(value, torch.Tensor):  # a size
            return np.asarray(value, numpy_dtype(dtype))
        tensor = value.detach().resolve_conj().resolve_neg().to(getattr(torch, dtype)).contiguous()
        if tensor.untyped_storage().data_ptr() in lent:
            tensor = tensor.clone()
        bits = _SAME_BITS.get(dtype)
        if bits is None:
            return tensor.numpy()
        return tensor.view(getattr(torch, bits)).numpy().view(numpy_dtype(dtype))


class _Writeable:
    """Shows the memory of a read-only array as writeable, which torch asks for and makes no use of."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface
        self._array = array  # kept alive with the view
