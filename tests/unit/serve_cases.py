"""What the tests of serving share: models whose answers tell which one gave them, and a repository of them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from accelrt.serve.interface import InferRequest, InferResponse, ServedModel
from accelrt.serve.models import ModelService
from accelrt.testing.models import Builder

T = TypeVar("T")


def line(slope: float, width: int = 2) -> onnx.ModelProto:
    """y = slope * x: row by row, and exact where both are small whole numbers."""
    net = Builder("line", 0)
    x = net.input("x", ("batch", width))
    net.output(net.node("Mul", x, net.weight(np.full(width, slope, np.float32)), name="y"), ("batch", width))
    return net.model()


def coupled() -> onnx.ModelProto:
    """y = x - max of all x: its rows are not independent."""
    net = Builder("coupled", 0)
    x = net.input("x", ("batch", 2))
    most = net.node("ReduceMax", x, keepdims=1)
    net.output(net.node("Sub", x, most, name="y"), ("batch", 2))
    return net.model()


def put(path: Path, model: onnx.ModelProto) -> Path:
    """Write a model in one step, as one should into a folder that is watched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name("." + path.name)
    onnx.save(model, work)
    work.rename(path)
    return path


def request(*values: float, rows: int = 1, **more: Any) -> InferRequest:
    """A request whose first row begins with the first value."""
    return InferRequest({"x": np.array([values] * rows, np.float32)}, **more)


async def ask(service: ModelService, name: str, asked: InferRequest, version: str = "") -> InferResponse:
    """Answer a request as a front end does."""
    model: ServedModel = service.find(name, version) or await service.model(name, version)
    return model.infer_now(asked) or await model.infer(asked)


async def settled(condition: Any, seconds: float = 20.0) -> None:
    """Wait until something is so."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come about in time")


def run(coroutine: Coroutine[Any, Any, T], seconds: float = 120.0) -> T:
    """Run a test's coroutine, and fail it if it takes too long."""

    async def limited() -> T:
        return await asyncio.wait_for(coroutine, seconds)

    return asyncio.run(limited())
