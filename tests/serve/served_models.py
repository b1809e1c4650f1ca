"""A small service over real sessions, for tests of the front ends: models that are there from the start."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import accelrt
from accelrt.errors import InputError, ModelNotFound, ModelUnavailable, NotAllowed, RequestError, RequestTimeout
from accelrt.graph.types import Signature, TensorType
from accelrt.protocol.datatypes import DATATYPES
from accelrt.serve.interface import (
    Duration,
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelStatistics,
    TensorMetadata,
)

ELEMENTS = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


def identity(datatype: str, shape: Sequence[Any] = ("batch", "width")) -> onnx.ModelProto:
    """A model that gives back what it gets."""
    element = ELEMENTS[datatype]
    return _model(
        [helper.make_node("Identity", ["x"], ["y"], "same")],
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
    )


def two_inputs() -> onnx.ModelProto:
    """sum = a + b, product = a * b."""
    infos = {n: helper.make_tensor_value_info(n, TensorProto.FLOAT, ("n", 3)) for n in ("a", "b", "sum", "product")}
    return _model(
        [helper.make_node("Add", ["a", "b"], ["sum"]), helper.make_node("Mul", ["a", "b"], ["product"])],
        [infos["a"], infos["b"]],
        [infos["sum"], infos["product"]],
    )


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@dataclass(eq=False)
class OneModel:
    """A session behind the interface; ``wait_s`` makes it one that answers later."""

    name: str
    session: Any
    version: str = "1"
    wait_s: float = 0.0
    fails: Exception | None = None
    seen: list[InferRequest] = field(default_factory=list)
    cancelled: int = 0

    @property
    def signature(self) -> Signature:
        return self.session.signature

    @property
    def metadata(self) -> ModelMetadata:
        return ModelMetadata(
            self.name,
            (self.version,),
            "accelrt_cpu/onnxruntime",
            tuple(_tensor(port) for port in self.signature.inputs),
            tuple(_tensor(port) for port in self.signature.outputs),
        )

    @property
    def config(self) -> Mapping[str, Any]:
        return {"name": self.name, "max_batch_size": 0}

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        return None if self.wait_s else self._answer(request)

    async def infer(self, request: InferRequest) -> InferResponse:
        if request.timeout_us and request.timeout_us < self.wait_s * 1e6:
            await asyncio.sleep(request.timeout_us / 1e6)
            raise RequestTimeout("Its turn did not come in time.")
        try:
            await asyncio.sleep(self.wait_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self._answer(request)

    def _answer(self, request: InferRequest) -> InferResponse:
        self.seen.append(request)
        if self.fails is not None:
            raise self.fails
        outputs = self.session.predict(request.inputs)
        if request.outputs is not None:
            if unknown := [name for name in request.outputs if name not in outputs]:
                raise RequestError(f"The model has no output {unknown[0]!r}.")
            outputs = {name: outputs[name] for name in request.outputs}
        return InferResponse(self.name, self.version, dict(outputs), request.id)


def _tensor(port: Any) -> TensorMetadata:
    assert isinstance(port.type, TensorType) and port.type.shape is not None
    shape = tuple(size if isinstance(size, int) else -1 for size in port.type.shape)
    return TensorMetadata(port.name, DATATYPES[port.type.dtype], shape)


class SmallService:
    """Holds `OneModel` objects; loads and unloads by hiding them."""

    def __init__(self, models: Mapping[str, onnx.ModelProto]) -> None:
        self._stack = ExitStack()
        self.models = {
            name: OneModel(name, self._stack.enter_context(accelrt.load(accelrt.compile(model))))
            for name, model in models.items()
        }
        self.hidden: set[str] = set()
        self.explicit = True
        self.loads: list[tuple[str, Mapping[str, Any]]] = []

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return not self.hidden

    def find(self, name: str, version: str = "") -> OneModel | None:
        model = self.models.get(name)
        if model is None or name in self.hidden or version not in ("", model.version):
            return None
        return model

    async def model(self, name: str, version: str = "") -> OneModel:
        if (model := self.find(name, version)) is not None:
            return model
        if name in self.hidden:
            error = ModelUnavailable(f"Model {name!r} is not loaded.")
            error.retry_after_s = 0.2
            raise error
        raise ModelNotFound(f"There is no model {name!r}, version {version!r}.")

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        return [
            IndexEntry(name, "" if name in self.hidden else "1", "UNAVAILABLE" if name in self.hidden else "READY")
            for name in self.models
            if not (ready and name in self.hidden)
        ]

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        self._controlled(name)
        if "config" in parameters:
            json.loads(parameters["config"])
        self.loads.append((name, parameters))
        self.hidden.discard(name)

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        self._controlled(name)
        self.hidden.add(name)

    def _controlled(self, name: str) -> None:
        if not self.explicit:
            raise NotAllowed("Models are loaded by the server itself.")
        if name not in self.models:
            raise ModelNotFound(f"There is no model {name!r}.")

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        if name and name not in self.models:
            raise ModelNotFound(f"There is no model {name!r}.")
        none = Duration()
        return [
            ModelStatistics(
                model.name, "1", int(time.time() * 1e3), len(model.seen), len(model.seen),
                Duration(len(model.seen), 5), none, none, none, none, none, {1: (none, Duration(2, 3), none)},
            )
            for model in self.models.values()
            if name in ("", model.name)
        ]  # fmt: skip

    def close(self) -> None:
        self._stack.close()


def bad_input() -> InputError:
    return InputError("Input 'x' takes float32[batch, width]; found shape [1].")


def sample(datatype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Random values of a datatype."""
    from accelrt.graph.types import numpy_dtype
    from accelrt.protocol.datatypes import DTYPES

    rng = np.random.default_rng(seed)
    if datatype == "BYTES":
        items = [f"text {i} é".encode() for i in range(int(np.prod(shape)))]
        array = np.empty(len(items), object)
        array[:] = items
        return array.reshape(shape)
    dtype = numpy_dtype(DTYPES[datatype])
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return rng.standard_normal(shape).astype(dtype)
