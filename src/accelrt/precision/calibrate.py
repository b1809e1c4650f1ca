"""Post-training static quantisation: a float32 graph and typical inputs in, a graph with QuantizeLinear and
DequantizeLinear out, which onnxruntime, OpenVINO and TensorRT all read."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from accelrt.errors import CalibrationError, OptionError, SourceError
from accelrt.graph.load import load_graph
from accelrt.graph.model import Graph
from accelrt.graph.node import WEIGHTS_FILE
from accelrt.graph.types import Value
from accelrt.graph.weights import WeightFile

Method: TypeAlias = Literal["minmax", "entropy", "percentile"]
Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What to quantise with, and how.

    Attributes:
        inputs: Typical calls: an iterable whose items are each a mapping by name, a tuple in order, or the value of a
            single input. A hundred are usually enough.
        method: How the range of a value is found: ``minmax`` takes the extremes, ``percentile`` leaves outliers out,
            ``entropy`` keeps most of what the distribution tells.
        percentile: For ``percentile``, the share of values inside the range, in percent.
        per_channel: Weights have a scale for each output channel, not one for all.
        exclude: Names of nodes, and operator types, that stay in float32.
        operators: Operator types to quantise; None for all that can be.
        activations: Type of what flows; weights are int8.
        symmetric: Zero points are 0 and biases stay float32, as TensorRT wants it; with ``activations="int8"`` only.
    """

    inputs: Any
    method: Method = "minmax"
    percentile: float = 99.99
    per_channel: bool = True
    exclude: Collection[str] = ()
    operators: Collection[str] | None = None
    activations: Literal["uint8", "int8"] = "uint8"
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise OptionError(f"The method must be one of {', '.join(get_args(Method))}, not {self.method!r}.")
        if not 50 < self.percentile <= 100:
            raise OptionError(f"The percentile must be above 50 and at most 100, not {self.percentile!r}.")
        if self.activations not in ("uint8", "int8"):
            raise OptionError(f"activations must be uint8 or int8, not {self.activations!r}.")
        if self.symmetric and self.activations != "int8":
            raise OptionError("symmetric=True takes activations='int8': the zero point of uint8 is not 0.")
        for name in ("exclude", "operators"):
            if isinstance(getattr(self, name), str):
                raise OptionError(f"{name} takes a collection of names, not one text.")


def is_quantised(graph: Graph) -> bool:
    """Whether a graph says itself where its integers are."""
    return any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv") for node in graph.nodes)


def check_calls(calls: Sequence[Mapping[str, Value]]) -> None:
    """Check calls that have been bound to a signature.

    Raises:
        CalibrationError: There are none, or one holds NaN or infinities.
    """
    if not calls:
        raise CalibrationError("The calibration set is empty.", hint="Give some typical inputs; a hundred are plenty.")
    for number, call in enumerate(calls):
        for name, value in call.items():
            array = np.asarray(value)
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CalibrationError(f"Item {number} of the calibration set holds NaN or infinities in {name!r}.")
            if not array.size:
                raise CalibrationError(f"Item {number} of the calibration set is empty in {name!r}.")


def quantise(
    graph: Graph, calls: Sequence[Mapping[str, Value]], how: Calibration, progress: Progress | None = None
) -> Graph:
    """Return the graph in Q/DQ form.

    Args:
        graph: A float32 graph; it stays as it is.
        calls: Bound to its signature and passed by `check_calls`.
        how: The rest of the calibration.
        progress: Called as the calibration set is worked through.

    Raises:
        OptionError: ``exclude`` or ``operators`` name what the graph has not.
        SourceError: The graph cannot be quantised.
    """
    kinds = {node.op_type for node in graph.nodes}
    names = {node.name for node in graph.nodes}
    if unknown := sorted(set(how.exclude) - kinds - names):
        raise OptionError(f"Calibration excludes {unknown[0]!r}, which is no node and no operator of the model.")
    if unknown := sorted(set(how.operators or ()) - kinds):
        raise OptionError(f"Calibration names the operator {unknown[0]!r}, which the model does not use.")
    with tempfile.TemporaryDirectory(prefix="accelrt-") as scratch, _quietly():
        folder = Path(scratch)
        try:
            _write_named(graph, folder / "model.onnx")
            _fold(folder / "model.onnx", folder / "folded.onnx")
            _quantise(folder / "folded.onnx", folder / "quantised.onnx", calls, how, progress)
        except (CalibrationError, OptionError):
            raise
        except Exception as error:
            # onnxruntime's tools raise what they like, bare exceptions and assertions among it.
            raise SourceError(
                f"The model cannot be quantised: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                hint="Calibration(exclude=...) leaves nodes alone.",
            ) from error
        result = _held(load_graph(folder / "quantised.onnx"))
    if not is_quantised(result):
        raise SourceError("Nothing in the model can be quantised.", hint="Leave precision='int8' out.")
    return result


def _write_named(graph: Graph, path: Path) -> None:
    """Write a graph whose nodes carry the names that they have here, so that they can be excluded by them."""
    import onnx

    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for node, seen in zip(proto.graph.node, graph.nodes, strict=True):
        node.name = seen.name
    weights = WeightFile(path.parent / WEIGHTS_FILE)
    Graph(proto, graph.weights).write(path, weights)
    weights.close()


def _fold(source: Path, target: Path) -> None:
    """Fold constants, and normalisations into convolutions: what stays apart is quantised apart."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.bin")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def _quantise(
    source: Path, target: Path, calls: Sequence[Mapping[str, Value]], how: Calibration, progress: Progress | None
) -> None:
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    model = onnx.load(source, load_external_data=False)
    excluded = [node.name for node in model.graph.node if {node.name, node.op_type} & set(how.exclude)]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._next = 0

        def get_next(self) -> dict[str, Value] | None:
            if progress is not None:
                progress("calibrating", self._next, len(calls))
            if self._next == len(calls):
                return None
            self._next += 1
            return dict(calls[self._next - 1])

    methods = {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }
    quantize_static(
        str(source),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=None if how.operators is None else sorted(how.operators),
        per_channel=how.per_channel,
        activation_type=QuantType.QUInt8 if how.activations == "uint8" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=excluded,
        use_external_data_format=True,
        calibrate_method=methods[how.method],
        extra_options=_extra_options(how),
    )


def _extra_options(how: Calibration) -> dict[str, object]:
    extra: dict[str, object] = {"CalibPercentile": how.percentile} if how.method == "percentile" else {}
    return (
        {**extra, "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        if how.symmetric
        else extra
    )


def _held(graph: Graph) -> Graph:
    """Return the graph with its weights in memory: the files they lie in are about to go."""
    import onnx
    from onnx import numpy_helper

    from accelrt.graph.weights import is_external

    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for tensor in proto.graph.initializer:
        if is_external(tensor):
            tensor.CopyFrom(numpy_helper.from_array(np.array(graph.weights[tensor.name].numpy()), tensor.name))
    return load_graph(proto)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the tools' advice, which they print and give through the root logger, from the caller's."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)
