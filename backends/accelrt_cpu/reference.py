"""The engine `cpu/reference`: ONNX's own evaluator, in numpy; slow, complete, and the last to be asked."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from accelrt.backend import (
    SUPPORTED,
    Caps,
    CompileJob,
    Device,
    Engine,
    Executable,
    Precision,
    Program,
    Status,
    Verdict,
)
from accelrt.errors import AccelrtError, CompileError, IncompatibleProgram
from accelrt.graph.node import Node
from accelrt.graph.types import TensorType, Value, bits_of

if TYPE_CHECKING:
    import onnx

_MODEL, _WEIGHTS = "model.onnx", "weights.bin"


class ReferenceEngine(Engine):
    """The evaluator of the `onnx` package, with `accelrt_cpu.reference_ops` where it falls short."""

    name: ClassVar[str] = "reference"
    # Each run keeps its values to itself; a test runs one program from many threads.
    caps: ClassVar[Caps] = Caps(concurrent=True, last_resort=True)
    requires: ClassVar[str] = "part of onnx"

    def status(self) -> Status:
        try:
            import onnx.reference
        except Exception as error:  # noqa: BLE001 - a broken install may raise anything; it is a status, not a crash
            return Status(False, reason=f"onnx.reference cannot be imported: {error}", remedy="pip install onnx")
        return Status(True, version=str(onnx.__version__))

    def fingerprint(self) -> Mapping[str, str]:
        import onnx

        return {"onnx": str(onnx.__version__), "numpy": np.__version__}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        if precision != "fp32":
            return Verdict.refuse(f"precision {precision} is not offered by this engine")
        from accelrt.graph.trial import malformed

        verdict = _verdict(node)
        if verdict.supported and (problem := malformed(node)) is not None:
            return Verdict.refuse(f"the node breaks the rules of its operator: {problem}")
        return verdict

    def compile(self, job: CompileJob, out: Path) -> Program:
        import onnx

        model = onnx.load(job.model, load_external_data=False)
        try:
            _link_weights(model, job.model.parent, out / _WEIGHTS)
            (out / _MODEL).write_bytes(model.SerializeToString())
            _evaluator(out / _MODEL)
        except AccelrtError:
            raise
        except Exception as error:
            raise CompileError(f"ONNX's reference evaluator: {error}", backend=self.name) from error
        return Program({_MODEL: out / _MODEL}, self.fingerprint(), job.signature, job.options)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        try:
            evaluator = _evaluator(program.files[_MODEL])
        except Exception as error:
            raise IncompatibleProgram(f"ONNX's reference evaluator: {error}", backend=self.name) from error
        return _Evaluation(evaluator, program.signature.output_names)


class _Evaluation(Executable):
    def __init__(self, evaluator: Any, outputs: tuple[str, ...]) -> None:
        self._evaluator: Any = evaluator
        self._outputs = outputs

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        feeds = {name: _sealed(value) for name, value in inputs.items()}
        # Infinities and overflows are results like others; numpy would warn of them.
        with np.errstate(all="ignore"):
            results = self._evaluator.run(list(self._outputs), feeds)
        return {name: _own(value) for name, value in zip(self._outputs, results, strict=True)}

    def close(self) -> None:
        self._evaluator = None


def _sealed(value: Value) -> Value:
    """Return a value that operators cannot write to: some work in place."""
    if isinstance(value, list):
        return [_sealed(item) for item in value]
    if not isinstance(value, np.ndarray):
        return value
    view = value.view()
    view.flags.writeable = False
    return view


def _own(value: Value) -> Value:
    """Return a copy: what the evaluator returns may be an input, a weight, or a view of one."""
    if isinstance(value, list):
        return [_own(item) for item in value]
    if value is None:
        return None
    array = np.asarray(value)
    # Text travels in object arrays; some operators return numpy's fixed-width kind.
    return np.array(array, object if array.dtype.kind == "U" else array.dtype, order="C")


# What can run


_ALIGNED = frozenset({"Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor"})


def _verdict(node: Node) -> Verdict:
    reason = (
        _missing(node.domain, node.op_type, node.opset) or _legacy_axis(node) or _package(node.domain, node.op_type)
    )
    if reason:
        return Verdict.refuse(reason)
    for body in node.bodies:
        for inner in body:
            verdict = _verdict(inner)
            if not verdict.supported:
                return Verdict.refuse(f"in the body of {node.op_type}: {verdict.reason}")
    return SUPPORTED


def _legacy_axis(node: Node) -> str | None:
    """Before opset 7 the second input could be aligned anywhere; the evaluator aligns it at the end."""
    if node.op_type not in _ALIGNED or node.domain or node.version >= 7 or "axis" not in node.attributes:
        return None
    ranks = [len(t.shape) if isinstance(t, TensorType) and t.shape is not None else None for t in node.input_types[:2]]
    (a, b), axis = ranks, node.attributes["axis"]
    if b == 0 or (a is not None and b is not None and axis in {a - b, -b}):
        return None
    return f"ONNX's reference evaluator ignores the axis of {node.kind}; convert the model to opset 7 or later"


def _package(domain: str, op_type: str) -> str | None:
    if (domain, op_type) == ("", "ImageDecoder") and importlib.util.find_spec("PIL") is None:
        return "ImageDecoder needs Pillow: pip install pillow"
    return None


@cache
def _missing(domain: str, op_type: str, opset: int) -> str | None:
    """Return why an operator of an opset cannot run, None if it can."""
    from onnx import defs
    from onnx.reference import op_run

    from accelrt_cpu.reference_ops import REPLACEMENTS

    if (domain, op_type) in REPLACEMENTS:
        return None
    name = f"{domain + '.' if domain else ''}{op_type}"
    if domain not in _REGISTRIES:
        return f"ONNX's reference evaluator does not know the domain of {name}"
    try:
        found = _look_up(domain, op_type, opset)
    except op_run.RuntimeContextError:
        return None  # a function of its input types: the evaluator writes the body once it knows them
    except Exception:  # noqa: BLE001 - the registries raise several unrelated classes
        if not domain and not defs.has(op_type):
            return f"{name} is no operator of ONNX"
        return f"ONNX's reference evaluator has no implementation of {name} for opset {opset}"
    if isinstance(found, type):
        return None
    # Anything but a class stands for the function in the operator's schema.
    function = defs.get_schema(op_type, opset, domain).function_body
    opsets = {entry.domain: entry.version for entry in function.opset_import}
    for inner in _nodes(function):
        if reason := _missing(inner.domain, inner.op_type, opsets.get(inner.domain, opset)):
            return f"{name} is a function, and {reason}"
    return None


_REGISTRIES = {
    "": "onnx.reference.ops",
    "ai.onnx.ml": "onnx.reference.ops.aionnxml",
    "ai.onnx.preview": "onnx.reference.ops.aionnx_preview",
    "ai.onnx.preview.training": "onnx.reference.ops.aionnx_preview_training",
}


def _look_up(domain: str, op_type: str, opset: int) -> Any:
    load_op = importlib.import_module(_REGISTRIES[domain]).load_op
    # A function would be built by the class given here; its body is looked at instead.
    extra = {} if domain else {"evaluator_cls": lambda body: None}
    return load_op(domain, op_type, opset, **extra)


# Programs


def _nodes(holder: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yield nodes at every depth."""
    for node in holder.node:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(graph)


def _tensors(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, bool]]:
    """Yield every tensor of a model, and whether it is an initializer."""
    holders: list[Any] = [model.graph, *model.functions]
    while holders:
        holder = holders.pop()
        for tensor in getattr(holder, "initializer", ()):
            yield tensor, True
        for node in holder.node:
            for attribute in node.attribute:
                for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
                    yield tensor, False
                holders += [attribute.g] if attribute.HasField("g") else []
                holders += attribute.graphs


def _external(model: onnx.ModelProto) -> list[tuple[onnx.TensorProto, dict[str, str], bool]]:
    return [
        (tensor, {entry.key: entry.value for entry in tensor.external_data}, initializer)
        for tensor, initializer in _tensors(model)
        if tensor.data_location == tensor.EXTERNAL
    ]


def _link_weights(model: onnx.ModelProto, folder: Path, target: Path) -> None:
    """Bring a model's external data along, as ``target``: a link, for it is as large as the model."""
    external = _external(model)
    sources = {entries["location"] for _, entries, _ in external}
    if not sources:
        return
    if len(sources) > 1 or any(Path(source).name != source for source in sources):
        raise CompileError(
            f"The weights of the segment lie in {sorted(sources)}, not in one file beside it.",
            backend="reference",
        )
    _link(folder / sources.pop(), target)
    for tensor, entries, _ in external:
        del tensor.external_data[:]
        for key, value in (entries | {"location": target.name}).items():
            tensor.external_data.add(key=key, value=value)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _evaluator(path: Path) -> Any:
    """Build an evaluator whose weights stay in their file: pages are read when they are first used."""
    import onnx
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    from accelrt_cpu.reference_ops import REPLACEMENTS

    replacements = list(REPLACEMENTS.values())
    weights = path.with_name(_WEIGHTS)

    class Evaluator(ReferenceEvaluator):  # type: ignore[misc]
        """Bodies and functions get an evaluator of this class too, and so the same operators and weights."""

        def __init__(self, proto: Any, new_ops: Any = None, **options: Any) -> None:
            super().__init__(proto, new_ops=replacements, **options)

        def retrieve_external_data(self, initializer: Any) -> Any:
            return _map(initializer, weights)

    model = onnx.load(path, load_external_data=False)
    for tensor, entries, initializer in _external(model):
        if entries["location"] != _WEIGHTS:
            raise ValueError(f"a weight lies in {entries['location']!r}, not in {_WEIGHTS}")
        if not initializer:  # the evaluator looks up initializers only
            tensor.CopyFrom(numpy_helper.from_array(_map(tensor, weights), tensor.name))
    return Evaluator(model)


def _map(tensor: onnx.TensorProto, weights: Path) -> np.ndarray[Any, Any]:
    import onnx
    from onnx import helper, numpy_helper

    offset = next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)
    dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype)
    bits = bits_of(dtype.name)
    if bits == dtype.itemsize * 8:
        return np.memmap(weights, dtype, "r", offset, shape).view(np.ndarray)
    # Less than a byte each: packed in the file, unpacked in memory.
    raw = np.memmap(weights, np.uint8, "r", offset, (count * bits + 7) // 8).tobytes()
    packed = onnx.TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=raw)
    return numpy_helper.to_array(packed)
