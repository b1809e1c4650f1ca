"""What drives tensorflow-neuron's compilers, in a child process: a SavedModel in, a SavedModel with Neuron parts out.

TensorFlow 1 has ``tensorflow.neuron.saved_model.compile`` with arguments of its own; TensorFlow 2 has ``trace``, whose
compiler is told through NEURON_CC_FLAGS alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from accelrt.errors import CompileError
from accelrt.graph.types import Port, Signature, TensorType, numpy_dtype
from accelrt_neuron.archive import pack, unpack
from accelrt_neuron.torch_child import Logged

PROGRAM = "model.zip"
FLAGS = "NEURON_CC_FLAGS"
BINDING = "accelrt.json"
"""JSON in a SavedModel that accelrt packed: ``signature``, ``inputs`` and ``outputs``, its names in order."""
_SERVING = "serving_default"


def build(source: str, signature: Mapping[str, Any], plan: Mapping[str, Any], out: str) -> dict[str, Any]:
    """Compile the SavedModel ``source`` and pack the result into ``out``.

    Args:
        source: A SavedModel folder, or a zip file of one. If `BINDING` is in it, it says which signature is meant and
            what its arguments and results are called, in the order of ``signature``; else they go by the names there.
        signature: Inputs and outputs as JSON.
        plan: ``compiler_args`` (TensorFlow 1), ``environment_flags`` (TensorFlow 2), ``dynamic_batch``,
            ``compiler_timeout`` in seconds, ``minimum_segment_size``, ``signature_key``.
        out: An empty folder.

    Returns:
        ``tensorflow``, the major version; ``on_neuron_ratio``, the share of operators on the device; ``inputs`` and
        ``outputs``, what the signature's ports are called in the SavedModel.
    """
    import tensorflow as tf

    major = int(str(tf.__version__).partition(".")[0])
    with tempfile.TemporaryDirectory(prefix="accelrt-tfneuron-") as scratch:
        new, work, folder = Path(scratch) / "compiled", Path(scratch) / "work", Path(source)
        work.mkdir()
        if folder.is_file():
            folder = Path(scratch) / "source"
            unpack(Path(source), folder)
        ports = Signature.from_json(signature)
        inputs, outputs, key = _binding(folder, ports)
        plan = {**plan, "signature_key": plan["signature_key"] or key}
        renamed = Signature(
            tuple(Port(inputs[port.name], port.type) for port in ports.inputs),
            tuple(Port(outputs[port.name], port.type) for port in ports.outputs),
        )
        drive = compile_1 if major == 1 else trace_2
        with Logged(str(work), "tensorflow.neuron"):
            ratio = drive(tf, str(folder), str(new), renamed, plan, str(work))
        pack(new, Path(out) / PROGRAM)
    return {"tensorflow": major, "on_neuron_ratio": ratio, "inputs": inputs, "outputs": outputs}


def _binding(folder: Path, ports: Signature) -> tuple[dict[str, str], dict[str, str], str | None]:
    """Return what a model's inputs and outputs are called in its SavedModel, and in which signature."""
    file = folder / BINDING
    if not file.is_file():
        return {name: name for name in ports.input_names}, {name: name for name in ports.output_names}, None
    said = json.loads(file.read_text())
    return (
        dict(zip(ports.input_names, said["inputs"], strict=True)),
        dict(zip(ports.output_names, said["outputs"], strict=True)),
        said["signature"],
    )


def compile_1(tf: Any, source: str, new: str, ports: Signature, plan: Mapping[str, Any], workdir: str) -> float:
    """Call ``tensorflow.neuron.saved_model.compile``, which wants ``new`` not to exist; returns OnNeuronRatio."""
    arguments: dict[str, Any] = {
        "model_shape_feed_dict": {port.name: list(_shape(port)) for port in ports.inputs},
        "compiler_args": list(plan["compiler_args"]),
        "compiler_timeout": plan["compiler_timeout"],
        "compiler_workdir": workdir,
        "dynamic_batch_size": plan["dynamic_batch"],
    }
    if plan["signature_key"] is not None:
        arguments["signature_def_key"] = plan["signature_key"]
    if plan["minimum_segment_size"] is not None:
        arguments["minimum_segment_size"] = plan["minimum_segment_size"]
    result = _neuron(tf).saved_model.compile(source, new, **arguments)
    return float(result["OnNeuronRatio"])


def trace_2(tf: Any, source: str, new: str, ports: Signature, plan: Mapping[str, Any], workdir: str) -> float:
    """Call ``tensorflow.neuron.trace`` on a signature of a SavedModel; returns the ratio that its result carries."""
    loaded = tf.saved_model.load(source)
    key = plan["signature_key"] or _SERVING
    if key not in loaded.signatures:
        raise CompileError(f"The SavedModel has no signature {key!r}; it has {', '.join(loaded.signatures) or 'none'}.")
    # A dictionary of examples makes the vendor call the function with keywords, as a signature wants to be called.
    examples = {port.name: tf.constant(_example(port)) for port in ports.inputs}
    with compiler_flags(f"{plan['environment_flags']} --workdir={workdir}"):
        traced = _neuron(tf).trace(loaded.signatures[key], examples)
    traced.save(new)
    return float(traced.on_neuron_ratio)


@contextlib.contextmanager
def compiler_flags(flags: str) -> Iterator[None]:
    """Set NEURON_CC_FLAGS, and set it back; this process does one thing at a time, so no lock is needed."""
    before = os.environ.get(FLAGS)
    os.environ[FLAGS] = flags
    try:
        yield
    finally:
        if before is None:
            del os.environ[FLAGS]
        else:
            os.environ[FLAGS] = before


def _neuron(tf: Any) -> Any:
    import importlib

    return importlib.import_module("tensorflow.neuron")


def _shape(port: Port) -> tuple[int, ...]:
    if not isinstance(port.type, TensorType) or port.type.shape is None:
        raise CompileError(f"input tensor {port.name!r} must have known rank")
    sizes = tuple(dim for dim in port.type.shape if isinstance(dim, int))
    if len(sizes) != len(port.type.shape):
        raise CompileError(
            f"batch_size is not sufficient to determine the shape of input tensor {port.name!r}: it is {port.type}"
        )
    return sizes


def _example(port: Port) -> np.ndarray[Any, Any]:
    shape = _shape(port)
    assert isinstance(port.type, TensorType)  # _shape has refused others
    return np.zeros(shape, numpy_dtype(port.type.dtype))
