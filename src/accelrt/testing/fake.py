"""FakeBackend: a stand-in for an accelerator that really computes, refuses what it is told to, and fails on demand."""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from accelrt.backend import (
    HOST,
    SUPPORTED,
    Backend,
    Caps,
    CompileJob,
    Device,
    DeviceTensor,
    Engine,
    Executable,
    Precision,
    Program,
    Status,
    Verdict,
)
from accelrt.cores import Group, core_groups, visible_cores
from accelrt.errors import CompileError, DeviceLost, OutOfDeviceMemory
from accelrt.graph.node import Node
from accelrt.graph.types import Value
from accelrt.registry import CPU, REGISTRY, find_engine

Operators: TypeAlias = Collection[str] | Callable[[Node], bool] | None
"""Operator types that are supported, a predicate on nodes, or None for all."""


@dataclass(frozen=True, slots=True)
class FakeConfig:
    """How a fake accelerator behaves.

    Attributes:
        operators: What it supports.
        others: Further engines, by name, with what each one supports; otherwise they behave alike.
        latency_s: Seconds that each run takes on top of computing; or a function of the device's index, asked at each.
        bytes_per_s: Speed of the link over which inputs and outputs travel; None for no delay.
        recalls: Whether it answers the inputs of the call before from memory, as an accelerator would that computes in
            no time: what a call costs then is the link.
        fails_to_compile: Whether a segment of these operator types fails to compile.
        fails_to_run: Whether a call of a segment of these operator types fails; calls count from 0.
        lost_after: Calls after which the device is lost; None for never. A mapping says it by device index.
        devices: How many there are.
        cores: Devices that one copy of a program takes.
        exclusive: Whether a device takes the programs of one session only.
        neuron_variables: Whether the environment's variables for Neuron cut its devices into groups.
        parallelism: Calls in flight that keep one device busy.
        memory_bytes: Memory of each; a program whose files are larger does not fit. None for no limit.
        concurrent: Whether an executable may be called from several threads at once.
        unusable: Why the engine is not usable; None if it is.
        version: Part of the fingerprint.
        precisions: What it computes in; bf16 and fp16 it would compute in float32 all the same.
        device_tensors: Whether its executables take and leave tensors on their device; `FakeTensor` is one.
        copies: Told of each copy between the host and a device: its direction, ``to_device`` or ``to_host``, and its
            bytes.
        room: Runs of a program that fit a device's memory at a time; a further one fails with `OutOfDeviceMemory`.
            None for no limit.
        gone: Asked before anything is done on a device: whether the devices are lost, with all that is on them.
        distorts: Given the operator types of a segment and its outputs, returns outputs that are wrong.
    """

    operators: Operators = None
    others: Mapping[str, Operators] = field(default_factory=dict)
    latency_s: float | Callable[[int], float] = 0.0
    bytes_per_s: float | None = None
    recalls: bool = False
    fails_to_compile: Callable[[tuple[str, ...]], bool] | None = None
    fails_to_run: Callable[[tuple[str, ...], int], bool] | None = None
    lost_after: int | Mapping[int, int] | None = None
    devices: int = 1
    cores: int = 1
    exclusive: bool = False
    neuron_variables: bool = False
    parallelism: int = 1
    memory_bytes: int | None = None
    concurrent: bool = True
    unusable: str | None = None
    version: str = "1"
    precisions: Collection[str] = ("fp32", "int8")
    device_tensors: bool = False
    copies: Callable[[str, int], None] | None = None
    room: int | None = None
    gone: Callable[[], bool] | None = None
    distorts: Callable[[tuple[str, ...], dict[str, Value]], dict[str, Value]] | None = None


class FakeEngine(Engine):
    """An engine of a fake backend. It computes with the CPU's engines, and says so: it is a stand-in."""

    name: ClassVar[str] = "fake"
    requires: ClassVar[str] = "part of accelrt.testing"

    def __init__(self, config: FakeConfig, name: str = "fake") -> None:
        self.config = config
        self.name = name  # type: ignore[misc]
        self.caps = Caps(  # type: ignore[misc]
            concurrent=config.concurrent,
            parallelism=config.parallelism,
            nature="stand-in",
            device_tensors=config.device_tensors,
        )

    def status(self) -> Status:
        if self.config.unusable is not None:
            return Status(False, reason=self.config.unusable, remedy="pip install the-missing-sdk")
        return Status(True, version=f"{self.config.version} (stand-in)")

    def fingerprint(self) -> Mapping[str, str]:
        # Behaviour is part of it, so that a cache never answers for a stand-in of the same name that behaves otherwise.
        operators = self.config.operators
        known = repr(sorted(operators)) if isinstance(operators, Collection) else repr(operators)
        fails = repr(self.config.fails_to_compile)
        facts = {"fake": self.config.version, "operators": known, "fails_to_compile": fails}
        if self.config.device_tensors:
            facts["device_tensors"] = "yes"
        # Distortion strikes at run; but a cached verdict on it must not serve one that distorts otherwise.
        return facts if self.config.distorts is None else {**facts, "distorts": repr(self.config.distorts)}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        if precision not in self.config.precisions:
            return Verdict.refuse(f"precision {precision} is not offered by this stand-in")
        operators = self.config.operators
        chosen = operators is None or (operators(node) if callable(operators) else node.op_type in operators)
        if not chosen:
            return Verdict.refuse(f"{node.op_type} is not among the operators of this stand-in")
        for body in node.bodies:
            for inner in body:
                if not (verdict := self.supports(inner, precision)).supported:
                    return Verdict.refuse(f"its body holds {inner.name!r}: {verdict.reason}")
        return SUPPORTED

    def compile(self, job: CompileJob, out: Path) -> Program:
        from accelrt.graph.load import load_graph

        nodes = load_graph(job.model).nodes
        kinds = tuple(node.op_type for node in nodes)
        if self.config.fails_to_compile is not None and self.config.fails_to_compile(kinds):
            raise CompileError("The stand-in was told to fail on this segment.", backend="fake")
        cpu = REGISTRY.backend(CPU)
        for name in cpu.fallback:
            engine = find_engine(cpu, name)
            computed: Precision = "int8" if job.precision == "int8" else "fp32"
            if all(verdict.supported for verdict in engine.supports_all(nodes, computed)):
                program = engine.compile(replace(job, options=engine.options(), precision=computed), out)
                (out / "fake.json").write_text(json.dumps({"computes_on": name, "operators": kinds}))
                files = {**program.files, "fake.json": out / "fake.json"}
                return Program(files, self.fingerprint(), job.signature, job.options, job.precision)
        raise CompileError("No engine of the CPU computes this whole segment for the stand-in.", backend="fake")

    def devices_needed(self, options: object) -> int:
        return self.config.cores

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        size = sum(path.stat().st_size for path in program.files.values())
        if self.config.memory_bytes is not None and size > self.config.memory_bytes:
            raise OutOfDeviceMemory(
                f"The program has {size} bytes, {devices[0].name} {self.config.memory_bytes}.", backend="fake"
            )
        cpu = REGISTRY.backend(CPU)
        facts = json.loads(program.files["fake.json"].read_text())
        engine = find_engine(cpu, facts["computes_on"])
        files = {name: path for name, path in program.files.items() if name != "fake.json"}
        inner = engine.load(Program(files, {}, program.signature, engine.options()), cpu.devices())
        return _FakeExecutable(inner, self.config, tuple(facts["operators"]), devices[0].index)


FAKE_KIND = 12
"""``kDLExtDev`` of DLPack: devices beside those that it has a name for. numpy reads none of them."""


class FakeTensor:
    """A tensor in the memory of a fake accelerator, which is numpy's in truth, but not for readers of DLPack.

    Args:
        array: Its data; the tensor's own.
        device: The index of its device.
        pending: Data that it has only once it was waited for, as that of a stream that is still busy.
    """

    def __init__(
        self, array: np.ndarray[Any, Any], device: int = 0, pending: np.ndarray[Any, Any] | None = None
    ) -> None:
        self.array, self.device = array, device
        self._pending = pending

    def settle(self) -> None:
        """Wait for the data."""
        if self._pending is not None:
            self.array[...] = self._pending
            self._pending = None

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device == HOST:
            self.settle()
            return self.array.copy(order="C").__dlpack__()
        capsule = self.array.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        # A tensor's address is followed by its device: kind and index.
        where = (ctypes.c_int32 * 2).from_address(pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
        where[0], where[1] = FAKE_KIND, self.device
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return FAKE_KIND, self.device


class _FakeExecutable(Executable):
    def __init__(self, inner: Executable, config: FakeConfig, operators: tuple[str, ...], device: int) -> None:
        self._inner, self._config, self._operators, self.device = inner, config, operators, device
        lost = config.lost_after
        self._lost_after = lost.get(device) if isinstance(lost, Mapping) else lost
        self._calls = itertools.count()
        self._last: tuple[dict[str, Value], dict[str, Value]] | None = None
        self._room = None if config.room is None else threading.Semaphore(config.room)

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        outputs = self._run(inputs)
        self._copied("to_device", inputs)
        self._copied("to_host", outputs)
        return outputs

    def run_resident(self, inputs: Mapping[str, Value | DeviceTensor], keep: Collection[str]) -> dict[str, Any]:
        there = {name: self._read(value) for name, value in inputs.items()}
        outputs = self._run(there)
        self._copied("to_device", {name: value for name, value in inputs.items() if not isinstance(value, FakeTensor)})
        self._copied("to_host", {name: value for name, value in outputs.items() if name not in keep})
        # Copies: what the inner engine gives may be memory of its input.
        return {
            name: FakeTensor(np.array(value, order="C"), self.device) if name in keep else value
            for name, value in outputs.items()
        }

    def to_host(self, tensor: DeviceTensor) -> np.ndarray[Any, Any]:
        self._alive()
        array = super().to_host(tensor)
        self._copied("to_host", {"": array})
        return array

    def _read(self, value: Value | DeviceTensor) -> Value:
        if not isinstance(value, FakeTensor):
            return value
        if value.device != self.device:
            raise RuntimeError(f"the tensor is on device {value.device} of the stand-in, the program on {self.device}")
        return value.array

    def _copied(self, direction: str, values: Mapping[str, Value]) -> None:
        if self._config.copies is not None:
            self._config.copies(direction, _bytes(values.values()))

    def _alive(self) -> None:
        if self._config.gone is not None and self._config.gone():
            raise DeviceLost("The stand-in's devices are gone, as it was told.", backend="fake")

    def _run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        self._alive()
        if self._room is None:
            return self._run_with_room(inputs)
        if not self._room.acquire(blocking=False):
            raise OutOfDeviceMemory("The stand-in's memory is taken by other runs.", backend="fake")
        try:
            return self._run_with_room(inputs)
        finally:
            self._room.release()

    def _run_with_room(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        number, config = next(self._calls), self._config
        if self._lost_after is not None and number >= self._lost_after:
            raise DeviceLost("The stand-in's device is gone, as it was told.", backend="fake")
        if config.fails_to_run is not None and config.fails_to_run(self._operators, number):
            raise RuntimeError("the stand-in was told to fail on this call")
        outputs = self._compute(inputs)
        if config.distorts is not None:
            outputs = config.distorts(self._operators, outputs)
        delay = config.latency_s(self.device) if callable(config.latency_s) else config.latency_s
        if config.bytes_per_s is not None:
            delay += (_bytes(inputs.values()) + _bytes(outputs.values())) / config.bytes_per_s
        if delay:
            time.sleep(delay)
        return outputs

    def _compute(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        if not self._config.recalls:
            return self._inner.run(inputs)
        last = self._last
        if last is None or not all(_same(value, last[0][name]) for name, value in inputs.items()):
            # Copies: the caller may change arrays that it still holds.
            last = self._last = (copy.deepcopy(dict(inputs)), self._inner.run(inputs))
        return copy.deepcopy(last[1])

    def close(self) -> None:
        self._inner.close()


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, list) or one is None or other is None:
        return False  # sequences and empty optionals are computed
    return one.shape == other.shape and bool(np.array_equal(one, other))


def _bytes(values: Collection[Value]) -> int:
    total = 0
    for value in values:
        total += _bytes(value) if isinstance(value, list) else np.asarray(value).nbytes if value is not None else 0
    return total


class FakeBackend(Backend):
    """A backend of fake engines, one if not told otherwise.

    Derive one with `configured` and hand it to `accelrt.register`.
    """

    name: ClassVar[str] = "fake"
    config: ClassVar[FakeConfig] = FakeConfig()

    def __init__(self) -> None:
        others = (FakeEngine(replace(self.config, operators=what), name) for name, what in self.config.others.items())
        self.engines: tuple[Engine, ...] = (FakeEngine(self.config), *others)

    def devices(self) -> Sequence[Device]:
        config = self.config
        # What a compile may measure must tell this device from another of its name.
        link = {"latency_s": config.latency_s, "bytes_per_s": config.bytes_per_s, "recalls": config.recalls}
        facts = {name: repr(value) for name, value in link.items() if value}
        return tuple(
            Device(self.name, index, "stand-in", config.memory_bytes, facts) for index in range(config.devices)
        )

    def dlpack_device(self, device: Device) -> tuple[int, int] | None:
        return (FAKE_KIND, device.index) if self.config.device_tensors else None

    def settle(self, tensors: Sequence[DeviceTensor]) -> None:
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                tensor.settle()

    def groups(self, environ: Mapping[str, str], devices: Sequence[Device]) -> tuple[Group, ...]:
        if not self.config.neuron_variables:
            return super().groups(environ, devices)
        return core_groups(environ, visible_cores(environ, self.config.devices))

    @classmethod
    def configured(cls, name: str = "fake", **behaviour: object) -> type[FakeBackend]:
        """Return a class of this name that behaves as `FakeConfig` is told; unknown words are a TypeError."""
        config = FakeConfig(**behaviour)  # type: ignore[arg-type]
        return type(f"Fake_{name}", (cls,), {"name": name, "config": config, "exclusive": config.exclusive})
