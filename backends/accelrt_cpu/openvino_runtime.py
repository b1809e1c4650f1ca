"""What the host and the child process share of OpenVINO: its options, its core, and the program that runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.backend import Executable
from accelrt.errors import ExecutionError, IncompatibleProgram, OptionError
from accelrt.graph.types import Dim, Port, Signature, TensorType, Value, numpy_dtype

NAME = "openvino"
DEVICE = "CPU"


@dataclass(frozen=True, slots=True)
class OpenVinoOptions:
    """Options of the engine.

    Attributes:
        threads: Threads that share one inference; 0 takes all cores.
        streams: Inferences that run side by side, each with its share of the threads.
        pinning: Threads stay on their cores; None leaves it to OpenVINO.
    """

    threads: int = 0
    streams: int = 1
    pinning: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threads <= 256 or not 1 <= self.streams <= 256:
            raise OptionError(f"threads must be 0 to 256 and streams 1 to 256, not {self}.")


HINTS: Mapping[str, str] = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}
"""What OpenVINO calls the precisions; an int8 model says itself where its integers are, the rest of it is float32."""


def properties_of(options: OpenVinoOptions, precision: str) -> dict[str, str]:
    """Return every property that changes numbers or threads: no default of a CPU or a release decides."""
    properties = {
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "EXECUTION_MODE_HINT": "ACCURACY",
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
        "CPU_DENORMALS_OPTIMIZATION": "NO",
        "NUM_STREAMS": str(options.streams),
        "INFERENCE_NUM_THREADS": str(options.threads),
    }
    if options.pinning is not None:
        properties["ENABLE_CPU_PINNING"] = "YES" if options.pinning else "NO"
    return properties


@cache
def core() -> Any:
    """Return the one `openvino.Core` of this process: each loads the plug-in and its threads anew."""
    import openvino

    return openvino.Core()


def mapped(path: Path) -> Any:
    """Return a file as a tensor over its pages, in which a program then leaves its weights."""
    import openvino

    # Copy-on-write, because OpenVINO shares only what numpy may write to.
    return openvino.Tensor(np.memmap(path, np.uint8, mode="c"), shared_memory=True)


class Resident(Executable):
    """A compiled model and the requests that run it: one for each call at a time, kept for the next."""

    def __init__(self, compiled: Any, blob: Any, signature: Signature) -> None:
        import openvino

        self._compiled = compiled
        self._blob = blob  # the program reads weights from it but does not keep it
        self._tensor = openvino.Tensor
        self._bf16 = openvino.Type.bf16
        inputs, outputs = places(compiled, signature)
        if len(outputs) != len(signature.outputs):
            raise IncompatibleProgram("The program has not the outputs it is to have.", backend="openvino")
        self._inputs = [(index, port.name, _dtype(port)) for index, port in inputs]
        self._empty = {port.name for port in signature.inputs if 0 in _shape(port)}
        self._outputs = [(index, port.name, _dtype(port)) for index, port in outputs]
        self._idle: deque[Any] = deque()  # append and pop are atomic

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        for index, name, dtype in self._inputs:
            request.set_input_tensor(index, self._share(name, inputs[name], dtype))
        request.infer(None)
        results = {name: _copy(request.get_output_tensor(index), dtype) for index, name, dtype in self._outputs}
        self._idle.append(request)  # a request that failed is not kept
        return results

    def _share(self, name: str, value: Value, dtype: str) -> Any:
        """Return a tensor over an array's memory; a read-only array cannot be shared and is copied."""
        if not value.size and name not in self._empty:
            raise ExecutionError(
                f"The input {name!r} of shape {list(value.shape)} is empty, which OpenVINO gets wrong or crashes on.",
                hint="Run the model on cpu/onnxruntime.",
                backend=NAME,
            )
        if dtype == "int64" and exceeds_int32(value):
            raise ExecutionError(
                f"The input {name!r} holds integers that exceed 32 bits, in which OpenVINO computes int64.",
                hint="Run the model on cpu/onnxruntime.",
                backend=NAME,
            )
        if dtype == "bfloat16":
            return self._tensor(np.array(value).view(np.uint16), value.shape, self._bf16)
        return self._tensor(value, shared_memory=value.flags.writeable)

    def close(self) -> None:
        self._idle.clear()
        self._compiled = self._blob = None


def places(compiled: Any, signature: Signature) -> tuple[list[tuple[int, Port]], list[tuple[int, Port]]]:
    """Return where a program has the ports of a signature; inputs on which nothing depends have no place."""
    parameters = {port.get_node().get_friendly_name(): index for index, port in enumerate(compiled.inputs)}
    results = {name: index for index, port in enumerate(compiled.outputs) for name in port.get_names()}
    return (
        [(parameters[port.name], port) for port in signature.inputs if port.name in parameters],
        [(results[port.name], port) for port in signature.outputs if port.name in results],
    )


def _dtype(port: Port) -> str:
    return port.type.dtype if isinstance(port.type, TensorType) else ""


def _shape(port: Port) -> tuple[Dim, ...]:
    return (port.type.shape or ()) if isinstance(port.type, TensorType) else ()


def _copy(tensor: Any, dtype: str) -> Value:
    """Return an output as an array of its own: the request writes into the same memory next time."""
    array = tensor.data.copy()
    return array.view(numpy_dtype(dtype)) if dtype == "bfloat16" else array


def exceeds_int32(array: Any) -> bool:
    return bool(array.size) and bool(array.max() > 2**31 - 1 or array.min() < -(2**31))


def short(error: BaseException) -> str:
    """Return an error on one line, without the places in OpenVINO's sources that it has passed."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(("Exception from", "Check '")))
    text = text or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
