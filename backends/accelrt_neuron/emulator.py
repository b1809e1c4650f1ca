"""The engine `neuron/emulator`: what a named instance would take, hold and round, computed on the CPU.

It knows an instance's cores and memory, the operators its compilers list, that shapes are static, and where values are
rounded. Outputs are real numbers, rounded as the cast mode says at the border of every ONNX operator; inside one the
CPU computes in float32, as the chip accumulates in float32. It makes no claim about speed, and none about what the
chip's own kernels round within an operator.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from accelrt.backend import (
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
from accelrt.errors import (
    CompileError,
    CoresUnavailable,
    ExecutionError,
    GraphError,
    IncompatibleProgram,
    OptionError,
    OutOfDeviceMemory,
)
from accelrt.graph.node import WEIGHTS_FILE, Node
from accelrt.graph.types import Signature, TensorType, Value
from accelrt_cpu.onnxruntime import MAX_THREADS, OnnxRuntimeEngine, OnnxRuntimeOptions
from accelrt_neuron import support
from accelrt_neuron.catalogue import INSTANCES, Instance
from accelrt_neuron.flags import CastMode, cast_mode, check_cast_options, neuron_cc_args, neuronx_cc_args

ENVIRONMENT = "ACCELRT_NEURON_EMULATE"
DEFAULT_INSTANCE = "inf2.xlarge"

_FACTS = "neuron.json"
_REVISION = "1"
"""Raised when the same model would give other numbers."""


@dataclass(frozen=True, slots=True)
class EmulatorOptions:
    """Options of the engine.

    Attributes:
        instance: What is emulated, as the vendor sells it: ``inf1.xlarge`` to ``trn2.48xlarge``. None for that of
            ACCELRT_NEURON_EMULATE, else ``inf2.xlarge``.
        auto_cast: What is cast in bf16 and fp16: ``all`` or ``matmult``; None for ``all``.
        auto_cast_type: To what: ``tf32`` or ``fp8_e4m3`` in place of bf16, from NeuronCore-v2 on.
        threads: Threads of the CPU that share one operator; 0 takes all.
    """

    instance: str | None = None
    auto_cast: str | None = None
    auto_cast_type: str | None = None
    threads: int = 0

    def __post_init__(self) -> None:
        if self.instance is not None and self.instance not in INSTANCES:
            raise OptionError(f"instance must be one of {', '.join(INSTANCES)}, not {self.instance!r}.")
        check_cast_options(self.auto_cast, self.auto_cast_type)
        if not 0 <= self.threads <= MAX_THREADS:
            raise OptionError(f"threads must be 0 to {MAX_THREADS}, not {self.threads}.")


class EmulatorEngine(Engine):
    """An instance with Neuron chips, in software."""

    name: ClassVar[str] = "emulator"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=2, nature="emulated", default_precision="bf16")
    options: ClassVar[type] = EmulatorOptions
    requires: ClassVar[str] = "pip install onnxruntime"

    def __init__(self, options: EmulatorOptions | None = None, cpu: OnnxRuntimeEngine | None = None) -> None:
        self._options = options or EmulatorOptions()
        self._cpu = cpu or OnnxRuntimeEngine()

    def with_options(self, options: Any) -> Engine:
        return self if options == self._options else EmulatorEngine(options, self._cpu)

    def status(self) -> Status:
        if (name := self._instance_name()) not in INSTANCES:
            return Status(
                False,
                reason=f"{ENVIRONMENT} holds {name!r}, which is no instance",
                remedy=f"export {ENVIRONMENT}=inf2.xlarge, or one of {', '.join(INSTANCES)}",
            )
        status = self._cpu.status()
        if not status.usable:
            return status
        one = INSTANCES[name]
        return Status(True, version=f"{_REVISION}: {name}, {one.cores} cores of {one.core_memory >> 20} MiB")

    def devices(self) -> Sequence[Device]:
        instance = self._instance()
        return tuple(_device(instance, index) for index in range(instance.cores))

    def fingerprint(self) -> Mapping[str, str]:
        return {"emulator": _REVISION, "instance": self._instance().name, **self._cpu.fingerprint()}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        generation = self._instance().generation
        try:
            mode = self._mode(precision)
        except CompileError as error:
            return Verdict.refuse(error.message.rstrip("."))
        verdict = support.verdict(node, generation)
        if not verdict.supported:
            return verdict
        if precision == "fp32" and generation == "v1" and node.op_type in support.PRODUCTS:
            return Verdict.refuse(support.NO_FLOAT32_PRODUCT)
        if mode.what != "none" and (problem := _rounding_problem(mode, node)) is not None:
            return Verdict.refuse(problem)
        computed = self._cpu.supports(node, "fp32")
        return computed if computed.supported else Verdict.refuse(f"cannot be emulated here: {computed.reason}")

    def compile(self, job: CompileJob, out: Path) -> Program:
        """Rewrite the segment and compile it for the CPU, with the arguments that the vendor's compiler would get."""
        from accelrt.graph.load import load_graph
        from accelrt.graph.rounding import round_floats
        from accelrt.graph.weights import WeightFile

        one = self._instance()
        mode = self._mode(job.precision)
        graph = load_graph(job.model)
        for node in graph.nodes:
            if not (verdict := support.verdict(node, one.generation)).supported:
                raise CompileError(f"{node.name} ({node.kind}): {verdict.reason}.", backend=self.name)
        if (wide := _wide_integers(graph)) is not None:
            raise CompileError(
                f"The weight {wide!r} holds integers that exceed 32 bits, in which Neuron computes int64 "
                f"(neuronx-cc: --native-int64 is off by default).",
                backend=self.name,
            )
        facts = {
            "instance": one.name,
            "auto_cast": mode.what,
            "auto_cast_type": None if mode.what == "none" else mode.type,
            "compiler_args": _arguments(one, mode),
            "device_bytes": _device_bytes(graph, job.signature, mode),
            "operators": dict(Counter(node.op_type for node in graph.nodes)),
        }
        if mode.what != "none":
            try:
                graph = round_floats(graph, mode.kind, lambda node: _borders(node, mode))
            except GraphError as error:
                raise CompileError(error.message, backend=self.name) from error
        with tempfile.TemporaryDirectory(prefix="accelrt-") as scratch:
            weights = WeightFile(Path(scratch) / WEIGHTS_FILE)
            graph.write(Path(scratch) / "rounded.onnx", weights)
            weights.close()
            inner = CompileJob(Path(scratch) / "rounded.onnx", job.signature, "fp32", _cpu_options(job.options))
            program = self._cpu.compile(inner, out)
        (out / _FACTS).write_text(json.dumps(facts))
        files = {**program.files, _FACTS: out / _FACTS}
        return Program(files, self.fingerprint(), job.signature, job.options, job.precision)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        try:
            facts = json.loads(program.files[_FACTS].read_text())
            instance, size = INSTANCES[facts["instance"]], int(facts["device_bytes"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise IncompatibleProgram(
                f"The program does not say what it was made for: {error!r}", backend=self.name
            ) from error
        cores = _cores_of(instance, devices)
        with _CHIPS.taken(instance, cores, size) as seats:
            files = {name: path for name, path in program.files.items() if name != _FACTS}
            inner = Program(files, {}, program.signature, _cpu_options(program.options), "fp32")
            return _Emulated(self._cpu.load(inner, devices), program.signature, seats.keep())

    def _instance_name(self) -> str:
        return self._options.instance or os.environ.get(ENVIRONMENT) or DEFAULT_INSTANCE

    def _instance(self) -> Instance:
        name = self._instance_name()
        if name not in INSTANCES:
            raise OptionError(f"{ENVIRONMENT} holds {name!r}; it takes one of {', '.join(INSTANCES)}.")
        return INSTANCES[name]

    def _mode(self, precision: Precision) -> CastMode:
        chosen = self._options
        return cast_mode(precision, self._instance().generation, chosen.auto_cast, chosen.auto_cast_type)


def _device(instance: Instance, index: int) -> Device:
    chip, core = divmod(index, instance.cores_per_chip)
    return Device(
        "neuron",
        index,
        f"NeuronCore-{instance.generation} {core} of chip {chip}, {instance.name} (emulated)",
        instance.core_memory,
        {"nature": "emulated", "instance": instance.name, "chip": str(chip), "core": str(core)},
    )


def _cores_of(instance: Instance, devices: Sequence[Device]) -> tuple[int, ...]:
    cores = tuple(device.index for device in devices)
    if not cores or max(cores) >= instance.cores:
        named = f"nc{min(cores)}-nc{max(cores)}" if cores else "none"
        raise CoresUnavailable(
            f"NeuronCore(s) not available - Requested:{named} Available:{instance.cores} ({instance.name}, emulated).",
            backend="emulator",
        )
    return cores


def _cpu_options(options: EmulatorOptions) -> OnnxRuntimeOptions:
    return OnnxRuntimeOptions(threads=options.threads)


def _arguments(instance: Instance, mode: CastMode) -> list[str]:
    if instance.generation == "v1":
        return neuron_cc_args(mode)
    lnc = 2 if instance.generation == "v3" else None
    return neuronx_cc_args(mode, instance.target, optlevel=2, model_type="generic", lnc=lnc)


def _borders(node: Node, mode: CastMode) -> Any:
    if mode.what == "all":
        return "both"
    return "inputs" if node.op_type in support.PRODUCTS else "none"


def _rounding_problem(mode: CastMode, node: Node) -> str | None:
    from accelrt.graph.rounding import rounding_problem

    problem = rounding_problem(mode.kind, node.opset)
    return None if problem is None else f"cannot be emulated: {problem}"


def _wide_integers(graph: Any) -> str | None:
    """Return which int64 initialiser holds values beyond 32 bits; limits that mean "to the end" are none."""
    from onnx import TensorProto, numpy_helper

    for node in graph.nodes:
        for index, name in enumerate(node.inputs):
            tensor = graph.initializers.get(name)
            if tensor is None or tensor.data_type != TensorProto.INT64:
                continue
            array = graph.weights[name].numpy() if name in graph.weights else numpy_helper.to_array(tensor)
            if _exceeds_int32(array) and index not in support.shape_inputs(node):
                return str(name)
    return None


def _exceeds_int32(array: Any) -> bool:
    return bool(array.size) and bool(array.max() > 2**31 - 1 or array.min() < -(2**31))


def _device_bytes(graph: Any, signature: Signature, mode: CastMode) -> int:
    """Return what a program needs at least: its weights, in the type they are cast to, its inputs and its outputs."""
    from accelrt.graph.rounding import float_bytes
    from accelrt.graph.types import static_bytes

    products = {name for node in graph.nodes if node.op_type in support.PRODUCTS for name in node.reads}
    total = 0
    for name, tensor in graph.initializers.items():
        narrow = mode.what == "all" or (mode.what == "matmult" and name in products)
        type_ = graph.types.get(name) or TensorType("float32", tuple(tensor.dims))
        total += (float_bytes(type_, mode.kind if narrow else None)) or 0
    return total + sum(static_bytes(port.type) or 0 for port in (*signature.inputs, *signature.outputs))


class _Emulated(Executable):
    """A program of the CPU that holds seats on emulated cores."""

    def __init__(self, inner: Executable, signature: Signature, seats: _Seats) -> None:
        self._inner, self._seats = inner, seats
        self._int64 = [p.name for p in signature.inputs if isinstance(p.type, TensorType) and p.type.dtype == "int64"]

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        for name in self._int64:
            if _exceeds_int32(np.asarray(inputs[name])):
                raise ExecutionError(
                    f"The input {name!r} holds integers that exceed 32 bits, in which Neuron computes int64.",
                    hint="Run the model on cpu/onnxruntime.",
                    backend="emulator",
                )
        return self._inner.run(inputs)

    def close(self) -> None:
        self._inner.close()
        self._seats.give_back()


class _Seats:
    """Memory that a program holds on its cores; given back once, also when loading fails half way."""

    def __init__(self, chips: _Chips, pools: Mapping[tuple[str, int], int]) -> None:
        self._chips, self._pools = chips, dict(pools)
        self._kept = False

    def keep(self) -> _Seats:
        """Hold the memory beyond the with statement."""
        self._kept = True
        return self

    def give_back(self) -> None:
        """Free the memory."""
        pools, self._pools = self._pools, {}
        self._chips.free(pools)

    def __enter__(self) -> _Seats:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._kept:
            self.give_back()


class _Chips:
    """The memory of the emulated chips of this process: what is taken of each pool.

    On an Inf1 the cores of a chip borrow from each other, so that the pool is the chip's; elsewhere it is the core's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used: Counter[tuple[str, int]] = Counter()

    def taken(self, instance: Instance, cores: Sequence[int], size: int) -> _Seats:
        """Take ``size`` bytes on each core.

        Raises:
            OutOfDeviceMemory: A pool has not got them.
        """
        shared = instance.generation == "v1"
        limit = instance.core_memory * (instance.cores_per_chip if shared else 1)
        wanted = Counter({(instance.name, core // instance.cores_per_chip if shared else core): 0 for core in cores})
        for core in cores:
            wanted[instance.name, core // instance.cores_per_chip if shared else core] += size
        with self._lock:
            for pool, needed in wanted.items():
                if (used := self._used[pool]) + needed > limit:
                    raise OutOfDeviceMemory(
                        f"Could not load the model status=4 message=Allocation Failure (emulated: device mempool "
                        f"[{pool[1]}:0] total {limit} occupied {used} needed {needed} available {limit - used}).",
                        hint="Name other cores with devices=, take a smaller batch, or a larger instance.",
                        backend="emulator",
                    )
            self._used.update(wanted)
        return _Seats(self, wanted)

    def free(self, pools: Mapping[tuple[str, int], int]) -> None:
        """Give bytes back."""
        with self._lock:
            self._used.subtract(pools)


_CHIPS = _Chips()
