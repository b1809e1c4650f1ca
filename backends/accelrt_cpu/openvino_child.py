"""What OpenVINO does in the child process: everything that compiles, since that has crashed on CPUs it does not know.

Called by name through `accelrt.isolation`, with plain data.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelrt.errors import CompileError
from accelrt.graph.types import Port, Signature, TensorType
from accelrt_cpu.openvino_runtime import (
    DEVICE,
    NAME,
    OpenVinoOptions,
    core,
    exceeds_int32,
    places,
    properties_of,
    short,
)

_OPSET, _IR_VERSION = 28, 14
"""The newest versions of ONNX on which the engine was checked: OpenVINO itself never refuses a version."""


TYPE_NAMES = {
    "bool": "boolean", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64", "uint8": "u8", "uint16": "u16",
    "float16": "f16", "bfloat16": "bf16", "float32": "f32",
}  # fmt: skip


def probe() -> dict[str, str]:
    """Return OpenVINO's version, the full name of its device, and what it takes each hint of fewer bits for."""
    import openvino

    facts = {"version": openvino.get_version(), "device": str(core().get_property(DEVICE, "FULL_DEVICE_NAME"))}
    return {**facts, **{f"computes_{precision}": _computed(precision) for precision in ("bf16", "fp16")}}


def _computed(precision: str) -> str:
    """Return the type in which a product is really computed when ``precision`` is asked for: it does not complain."""
    import numpy as np
    import openvino
    from openvino import opset13 as op

    x = op.parameter([4, 64], openvino.Type.f32)
    model = openvino.Model([op.matmul(x, op.constant(np.ones((64, 64), np.float32)), False, False)], [x])
    compiled = core().compile_model(model, DEVICE, properties_of(OpenVinoOptions(threads=1), precision))
    layers = (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    kinds = {str(_text(info, "runtimePrecision")) for info in layers if _text(info, "layerType") == "FullyConnected"}
    return kinds.pop() if len(kinds) == 1 else "unknown"


def _text(info: Any, key: str) -> str:
    if key not in info:
        return ""
    value = info[key]
    return str(getattr(value, "value", value))


def try_out(models: Sequence[str], precision: str) -> list[str | None]:
    """Return for each model, as base64, why OpenVINO cannot compile it, None where it can."""
    with tempfile.TemporaryDirectory() as folder:
        return [_trial(base64.b64decode(text), Path(folder), precision) for text in models]


def _trial(data: bytes, folder: Path, precision: str) -> str | None:
    import onnx

    from accelrt.graph.convert import from_type_proto

    proto = onnx.ModelProto.FromString(data)
    ports = (
        tuple(Port(v.name, type_) for v in values if (type_ := from_type_proto(v.type)) is not None)
        for values in (proto.graph.input, proto.graph.output)
    )
    signature = Signature(*ports)
    if (problem := _lower(proto)) is not None:
        return problem
    try:
        model = _read(proto, folder, signature)
    except Exception as error:  # noqa: BLE001 - the text of whatever it raises is the reason
        return f"refused on conversion: {short(error)}"
    properties = properties_of(OpenVinoOptions(threads=1), precision)
    try:
        # `query_model` would name what lacks a kernel, but 2026.4 also names an Unsqueeze that does compile.
        return _mismatch(core().compile_model(model, DEVICE, properties), signature)
    except Exception as error:  # noqa: BLE001
        return f"refused on trial: {short(error)}"


def build(model: str, blob: str, signature: Mapping[str, Any], properties: Mapping[str, str]) -> None:
    """Compile the ONNX file ``model`` and write the program to ``blob``.

    Raises:
        CompileError: OpenVINO cannot take the model as it is.
    """
    import onnx

    folder, ports = Path(model).parent, Signature.from_json(signature)
    proto = onnx.load(model, load_external_data=False)
    if problem := _lower(proto) or _wide_weight(proto, folder):
        raise CompileError(f"OpenVINO cannot take the segment: {problem}.", backend=NAME)
    try:
        compiled = core().compile_model(_read(proto, folder, ports), DEVICE, dict(properties))
    except Exception as error:
        raise CompileError(f"OpenVINO: {short(error)}", backend=NAME) from error
    if problem := _mismatch(compiled, ports):
        raise CompileError(f"OpenVINO changed the segment: {problem}.", backend=NAME)
    Path(blob).write_bytes(compiled.export_model().getbuffer())


def _lower(proto: Any) -> str | None:
    from accelrt.graph.trial import lower_versions

    return lower_versions(proto, {"": _OPSET}, _IR_VERSION)


def _read(proto: Any, folder: Path, signature: Signature) -> Any:
    """Read a model by way of a file in ``folder``, where its weights are, and name its ports as ONNX does.

    Trials take the same way: from memory, OpenVINO converts with another frontend. Where an output is but an input,
    it keeps one of the two names, so inputs go by the friendly name, which compilation leaves alone.
    """
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".onnx") as file:
        file.write(proto.SerializeToString())
        file.flush()
        model = core().read_model(file.name)
    parameters = model.get_parameters()
    if len(parameters) == len(signature.inputs):  # else some are of no use, and the rest have kept their names
        for parameter, name in zip(parameters, signature.input_names, strict=True):
            parameter.set_friendly_name(name)
    for port, name in zip(model.outputs, signature.output_names, strict=True):
        port.add_names({name})
    return model


def _wide_weight(proto: Any, folder: Path) -> str | None:
    """Return which weight holds 64-bit integers that exceed the 32 bits that OpenVINO computes in."""
    import onnx
    from onnx import numpy_helper

    from accelrt.graph.weights import is_external

    for tensor in proto.graph.initializer:
        is_wide = tensor.data_type == onnx.TensorProto.INT64 and is_external(tensor)
        if is_wide and exceeds_int32(numpy_helper.to_array(tensor, str(folder))):
            return f"the weight {tensor.name!r} holds integers that exceed 32 bits"
    return None


def _mismatch(compiled: Any, signature: Signature) -> str | None:
    """Return how inputs or outputs differ from what was asked for, None if they do not."""
    inputs, outputs = places(compiled, signature)
    if len(inputs) != len(compiled.inputs):
        return "its inputs have lost their names"
    if len(outputs) != len(signature.outputs):
        return "its outputs have lost their names"
    for found, port in (
        *((compiled.inputs[index], port) for index, port in inputs),
        *((compiled.outputs[index], port) for index, port in outputs),
    ):
        if not isinstance(port.type, TensorType):
            return f"{port.name!r} is a {port.type}"
        if (name := found.get_element_type().get_type_name()) != TYPE_NAMES[port.type.dtype]:
            return f"{port.name!r} is {name}, not {port.type.dtype}"
        rank = found.get_partial_shape().rank
        if rank.is_static and port.type.shape is not None and rank.get_length() != len(port.type.shape):
            return f"{port.name!r} has {rank.get_length()} dimensions, not {len(port.type.shape)}"
    return None
