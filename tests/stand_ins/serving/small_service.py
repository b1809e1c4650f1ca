"""A small `accelrt.serve.interface.Service`: real models on the CPU and a few functions, without queues or policies.

As a script it serves them over gRPC until it is told to stop: ``python small_service.py PORT [--delay S]``; it prints
the port when it listens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import accelrt
from accelrt.errors import AccelrtError, ModelNotFound, Overloaded, RequestError
from accelrt.graph.types import Port, Signature, TensorType
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

Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


class SmallModel:
    """A model that runs in the event loop (``now``) or in a thread."""

    def __init__(self, name: str, signature: Signature, run: Run, *, now: bool = False, delay: float = 0.0) -> None:
        self.name, self.version, self.signature, self._run, self._now = name, "1", signature, run, now
        self._delay = delay
        self._took_s = 1.0
        self.calls = 0
        self.seen: list[InferRequest] = []
        self.cancelled = 0
        self.metadata = ModelMetadata(
            name,
            ("1",),
            "accelrt_cpu/onnxruntime",
            *(
                tuple(
                    TensorMetadata(
                        port.name,
                        DATATYPES.get(port.type.dtype, "INVALID"),
                        tuple(dim if isinstance(dim, int) else -1 for dim in port.type.shape),
                    )
                    for port in ports
                )
                for ports in (signature.inputs, signature.outputs)
            ),
        )
        self.config = {
            "name": name,
            "platform": "accelrt_cpu/onnxruntime",
            "backend": "accelrt",
            "max_batch_size": 0,
            "input": [
                {
                    "name": one.name,
                    "data_type": f"TYPE_{one.datatype.replace('BYTES', 'STRING')}",
                    "dims": list(one.shape),
                }
                for one in self.metadata.inputs
            ],
            "parameters": {"origin": {"string_value": "small"}},
            "not_of_triton": 1,
        }

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        self.seen = [*self.seen[-99:], request]
        return self._answer(request) if self._now or (self._took_s < 0.002 and not self._delay) else None

    async def infer(self, request: InferRequest) -> InferResponse:
        try:
            if self._delay:
                await asyncio.sleep(self._delay)
            return await asyncio.to_thread(self._answer, request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _answer(self, request: InferRequest) -> InferResponse:
        self.calls += 1
        missing = set(self.signature.input_names) - set(request.inputs)
        if missing:
            raise RequestError(f"Inputs are missing: {sorted(missing)}.")
        start = time.perf_counter()
        outputs = dict(self._run(request.inputs))
        self._took_s = time.perf_counter() - start
        if request.outputs is not None:
            try:
                outputs = {name: outputs[name] for name in request.outputs}
            except KeyError as error:
                raise RequestError(f"There is no output {error}.") from None
        return InferResponse(self.name, self.version, outputs, request.id)


class SmallService:
    """Models by name; more are loaded from ONNX files that come with the request."""

    def __init__(self, *models: SmallModel, delay: float = 0.0) -> None:
        self.models = {model.name: model for model in models}
        self.uploads: list[str] = []
        self._delay = delay
        self._folder = Path(tempfile.mkdtemp(prefix="small-service-"))

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return True

    def find(self, name: str, version: str = "") -> SmallModel | None:
        return self.models.get(name) if version in ("", "1") else None

    async def model(self, name: str, version: str = "") -> SmallModel:
        found = self.find(name, version)
        if found is None:
            raise ModelNotFound(f"There is no model {name!r}, version {version or 'any'}.")
        return found

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        return [IndexEntry(name, "1", "READY") for name in self.models]

    async def load(self, name: str, parameters: Mapping[str, str | bytes | int | bool]) -> None:
        if not parameters and name in self.models:
            return
        files = {key[len("file:1/") :]: data for key, data in parameters.items() if key.startswith("file:1/")}
        if "config" in parameters:
            json.loads(str(parameters["config"]))
        if "model.onnx" not in files:
            raise ModelNotFound(f"Model {name!r} is not in the repository.")
        self.uploads.append(name)
        folder = self._folder / f"{name}-{len(self.uploads)}"
        folder.mkdir()
        for file, data in files.items():
            assert isinstance(data, bytes)
            (folder / file).write_bytes(data)
        try:
            session = await asyncio.to_thread(
                accelrt.load, folder / "model.onnx", backend="cpu", options={"threads": 1}
            )
        except AccelrtError as error:
            raise RequestError(f"Model {name!r} cannot be loaded: {error}") from error
        self.models[name] = SmallModel(name, session.signature, lambda i: session.predict(_texts(i)), delay=self._delay)

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        if self.models.pop(name, None) is None:
            raise ModelNotFound(f"There is no model {name!r}.")

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        if name and name not in self.models:
            raise ModelNotFound(f"There is no model {name!r}.")
        none = Duration()
        return [
            ModelStatistics(
                model.name, "1", 1234, model.calls, model.calls, Duration(model.calls, 5000), none, none, none,
                Duration(model.calls, 4000), none, {4: (none, Duration(2, 7), none)},
            )
            for model in self.models.values()
            if not name or model.name == name
        ]  # fmt: skip


def _texts(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: np.vectorize(bytes.decode, otypes=[object])(array) if array.dtype == object else array
        for name, array in inputs.items()
    }


def function(name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], run: Run, **how: Any) -> SmallModel:
    """Make a model of a function; types are (dtype, shape)."""
    signature = Signature(*(tuple(Port(n, TensorType(*t)) for n, t in side.items()) for side in (inputs, outputs)))
    return SmallModel(name, signature, run, **how)


def echo(dtype: str, *, now: bool = True) -> SmallModel:
    """Make a model that returns a copy of its input."""
    return function(
        f"echo-{dtype}",
        {"x": (dtype, (None, None))},
        {"y": (dtype, (None, None))},
        lambda inputs: {"y": np.array(inputs["x"])},
        now=now,
    )


def _fail(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    raise ZeroDivisionError("a secret of the server")


def _full(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    error = Overloaded("The queue of 'full' is full: 8 requests wait.")
    error.retry_after_s = 0.25
    raise error


def standard(delay: float = 0.0) -> SmallService:
    """Return a service with echoes of all datatypes, a slow, a failing and an overloaded model."""
    flat = {"x": ("float32", (None,))}
    return SmallService(
        *(echo(dtype) for dtype in DATATYPES),
        function(
            "double-first",
            {"a": ("float32", (None,)), "b": ("int64", (None,))},
            {"twice": ("float32", (None,)), "same": ("int64", (None,))},
            lambda i: {"twice": i["a"] * 2, "same": i["b"].copy()},
        ),
        function("slow", flat, {"y": ("float32", (None,))}, lambda i: {"y": i["x"] + 1}, delay=delay or 0.5),
        function("failing", flat, {"y": ("float32", (None,))}, _fail),
        function("full", flat, {"y": ("float32", (None,))}, _full),
        delay=delay,
    )


async def _main() -> None:
    from accelrt.serve.grpc import GrpcSettings, start

    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    chosen = parser.parse_args()
    deadline = time.monotonic() + 20
    while True:
        try:
            handle = await start(standard(chosen.delay), GrpcSettings(port=chosen.port))
            break
        except AccelrtError:  # the port of a server that was killed a moment ago
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
    print(handle.port, flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:  # it must not outlive the test
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1)
    await handle.stop(1)


if __name__ == "__main__":
    asyncio.run(_main())
