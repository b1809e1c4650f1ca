"""FakeBackend: a stand-in for an accelerator that really computes, refuses what it is told to, and fails on demand."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, TypeAlias

import numpy as np

from accelrt.backend import (
    SUPPORTED,
    Backend,
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
        distorts: Given the operator types of a segment and its outputs, returns outputs that are wrong.
    """

    operators: Operators = None
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
    distorts: Callable[[tuple[str, ...], dict[str, Value]], dict[str, Value]] | None = None


class FakeEngine(Engine):
    """The only engine of a fake backend. It computes with the CPU's engines, and says so: it is a stand-in."""

    name: ClassVar[str] = "fake"
    requires: ClassVar[str] = "part of accelrt.testing"

    def __init__(self, config: FakeConfig) -> None:
        self.config = config
        self.caps = Caps(concurrent=config.concurrent, parallelism=config.parallelism, nature="stand-in")  # type: ignore[misc]

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


class _FakeExecutable(Executable):
    def __init__(self, inner: Executable, config: FakeConfig, operators: tuple[str, ...], device: int) -> None:
        self._inner, self._config, self._operators, self.device = inner, config, operators, device
        lost = config.lost_after
        self._lost_after = lost.get(device) if isinstance(lost, Mapping) else lost
        self._calls = itertools.count()
        self._last: tuple[dict[str, Value], dict[str, Value]] | None = None

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
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
    """A backend of one fake engine. Derive one with `configured` and hand it to `accelrt.register`."""

    name: ClassVar[str] = "fake"
    config: ClassVar[FakeConfig] = FakeConfig()

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (FakeEngine(self.config),)

    def devices(self) -> Sequence[Device]:
        config = self.config
        # What a compile may measure must tell this device from another of its name.
        link = {"latency_s": config.latency_s, "bytes_per_s": config.bytes_per_s, "recalls": config.recalls}
        facts = {name: repr(value) for name, value in link.items() if value}
        return tuple(
            Device(self.name, index, "stand-in", config.memory_bytes, facts) for index in range(config.devices)
        )

    def groups(self, environ: Mapping[str, str], devices: Sequence[Device]) -> tuple[Group, ...]:
        if not self.config.neuron_variables:
            return super().groups(environ, devices)
        return core_groups(environ, visible_cores(environ, self.config.devices))

    @classmethod
    def configured(cls, name: str = "fake", **behaviour: object) -> type[FakeBackend]:
        """Return a class of this name that behaves as `FakeConfig` is told; unknown words are a TypeError."""
        config = FakeConfig(**behaviour)  # type: ignore[arg-type]
        return type(f"Fake_{name}", (cls,), {"name": name, "config": config, "exclusive": config.exclusive})
