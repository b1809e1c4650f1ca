"""The contract between accelrt and the runtimes under it.

A *backend* is a family of devices with one name; an *engine* is one runtime that compiles for and runs on them. An
author writes both: five methods an engine, one a backend. accelrt owns the rest: partitioning, fallback, artifacts,
scheduling. `accelrt.testing.contract` is a test suite to inherit, ``backends/README.md`` a walk-through.

Importing a backend must not import its vendor's SDK, which may be missing or broken: `Engine.status` tells that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, ClassVar, Literal, Protocol, Self, TypeAlias, runtime_checkable

import numpy as np

from accelrt.cores import Group
from accelrt.graph.node import Node
from accelrt.graph.types import Signature, Value
from accelrt.nature import Nature

API_VERSION = 1
"""Raised when the contract changes in a way that breaks engines; a plug-in of another version is refused."""

WHOLE_FILES: Mapping[str, str] = MappingProxyType(
    {
        "torch.export": "model.pt2",
        "torchscript": "model.pt",
        "saved_model": "saved_model.zip",
        "open-inference": "endpoint.json",
    }
)
"""The forms in which a source is handed over whole, and the file that holds it: an exported program as
``torch.export.save`` writes it, TorchScript, and a SavedModel folder as a zip without compression, in which
`SAVED_MODEL_BINDING` says how its signature is called. A model that a server of the Open Inference Protocol holds is
JSON: ``address``, as `accelrt.protocol.address` has it, with the model's name."""

SAVED_MODEL_BINDING = "accelrt.json"
"""JSON: ``signature``, the name of one; ``inputs`` and ``outputs``, its arguments and results in the order of the
model's."""

Precision: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
"""What an engine computes in: ``fp32`` as the model declares, ``bf16`` and ``fp16`` fewer bits where the model says
float32, ``int8`` a model whose QuantizeLinear and DequantizeLinear say where integers are."""


@dataclass(frozen=True, slots=True)
class Device:
    """One place where programs run; ``index`` counts within the backend, ``memory_bytes`` is None if unknown."""

    backend: str
    index: int
    description: str
    memory_bytes: int | None = None
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The device as a target names it: ``cpu:0``."""
        return f"{self.backend}:{self.index}"


@dataclass(frozen=True, slots=True)
class Status:
    """Whether an engine is usable here; if not, ``reason`` says why and ``remedy`` is the command that helps."""

    usable: bool
    version: str | None = None
    reason: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """An engine's answer about one node; a refusal carries its reason."""

    supported: bool
    reason: str = ""

    @classmethod
    def refuse(cls, reason: str) -> Verdict:
        """Return a refusal."""
        return cls(False, reason)


SUPPORTED = Verdict(True)


@dataclass(frozen=True, slots=True)
class Caps:
    """What an engine can do, as data.

    Attributes:
        concurrent: `Executable.run` may be called from several threads at once.
        parallelism: Calls in flight that keep one device busy; the scheduler has as many threads for each.
        nature: ``emulated`` computes on the CPU in the name of other hardware and is never chosen unless asked for by
            name; a ``stand-in`` takes the place of a runtime in tests. Every report says so.
        last_resort: Right but slow; nodes are never moved here to save a cut.
        default_precision: What the engine computes in unless told otherwise; recorded in every artifact.
        executes_code: Loading a program may run code that is in it. Such programs are loaded from a file only if the
            user says that the file is to be trusted.
        device_tensors: Its executables have `Executable.run_resident`, so that values stay on the device between the
            segments of any two such engines of one device.
    """

    concurrent: bool = True
    parallelism: int = 1
    nature: Nature = "real"
    last_resort: bool = False
    default_precision: Precision = "fp32"
    executes_code: bool = False
    device_tensors: bool = False


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of an engine that has none."""


@dataclass(frozen=True, slots=True)
class CompileJob:
    """What an engine is asked to compile.

    ``model`` is an ONNX file whose weights lie beside it as external data; if ``format`` is another, it is the one file
    that holds the whole source, named as `WHOLE_FILES` says.
    """

    model: Path
    signature: Signature
    precision: Precision
    options: Any
    format: str = "onnx"


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled segment: the files an engine wrote, and the toolchain they depend on.

    ``files`` maps the names the engine gave to where the files are now: an artifact keeps them under names of its own,
    all in one folder, with the weights of every ONNX file among them in a shared ``weights.bin`` beside it.
    ``fingerprint`` is compared with `Engine.fingerprint` before a program is loaded. ``precision`` is that of the job.
    ``remark`` says how it runs, for `explain`: a whole source compiled or not and why, nodes that stay on the CPU.
    """

    files: Mapping[str, Path]
    fingerprint: Mapping[str, str]
    signature: Signature
    options: Any
    precision: Precision = "fp32"
    remark: str = ""


HOST = (1, 0)
"""The host as DLPack names devices: kind (``kDLCPU``) and index."""


@runtime_checkable
class DeviceTensor(Protocol):
    """A tensor where it was computed, as DLPack's Python protocol has it: whoever reads it copies nothing."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


class _OnHost:
    """A tensor as the copy in the host's memory that it is asked for, for readers that know the host only."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def __dlpack__(self, **request: Any) -> Any:
        return self._tensor.__dlpack__(**{**request, "dl_device": HOST, "copy": True})

    def __dlpack_device__(self) -> tuple[int, int]:
        return HOST


def copy_to_host(tensor: DeviceTensor) -> np.ndarray[Any, Any]:
    """Ask a tensor for a copy of itself in the host's memory, as DLPack has it since version 1.

    Raises:
        Exception: The tensor knows no such request, or fails.
    """
    array = np.from_dlpack(_OnHost(tensor))
    # numpy marks as read-only what a producer of before version 1 gives; this copy is the caller's.
    return array if array.flags.writeable else array.copy()


class Executable(ABC):
    """A program resident on a device."""

    parallelism: int | None = None
    """Calls in flight that keep it busy, where that depends on the program; None for what `Caps` says."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Compute the outputs by name; ``inputs`` have been checked against the signature.

        Arrays are numpy's (C order), sequences lists, an empty optional None. Inputs are never written to, and
        outputs must stay valid when ``run`` is called again.

        Raises:
            DeviceLost: The device is gone; the executable will not be used again.
            Exception: Anything else fails this call only.
        """

    def run_resident(self, inputs: Mapping[str, Value | DeviceTensor], keep: Collection[str]) -> dict[str, Any]:
        """Compute as `run` does, with values that are on the device already, or are to stay there.

        Called only where `Caps.device_tensors` says so. Everything in ``inputs`` and in the result is complete: what
        is given has been computed before the call, and what is returned before it ends, whatever stream did it.

        Args:
            inputs: By name: values as `run` takes them, or tensors on this executable's device in C order, made by any
                engine or by the caller of `predict`.
            keep: Outputs to be returned as tensors on the device, in C order, of memory that no later run touches; the
                others as `run` returns them. Only tensors of numpy's own dtypes are asked for.

        Raises:
            AccelrtError: What `run` raises.
        """
        raise NotImplementedError

    def to_host(self, tensor: DeviceTensor) -> np.ndarray[Any, Any]:
        """Return a copy in the host's memory of a tensor that `run_resident` of this executable returned.

        May be called from several threads, during runs, and for a tensor whose executable would fail by now. By default
        the tensor is asked for the copy, as DLPack has it since version 1 (``dl_device``); an engine whose tensors
        cannot do that overrides this.

        Raises:
            DeviceLost: The device is gone, and the tensor with it.
            Exception: Anything else keeps this tensor from being read.
        """
        return copy_to_host(tensor)

    @abstractmethod
    def close(self) -> None:
        """Free the device; called once, after the last ``run`` has returned."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine(ABC):
    """One vendor runtime. Cheap to construct; the vendor's SDK is imported by the methods that need it.

    ``formats`` says what it compiles: ``onnx`` stands for segments of a graph, the names in `WHOLE_FILES` for the whole
    source in its framework's own form. An engine of whole sources refuses every node, keeps the source among the
    files of its program under the name that it came by, and is chosen only by name, or for a model that does not
    convert.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]] = ("onnx",)
    caps: ClassVar[Caps] = Caps()
    options: ClassVar[type] = NoOptions
    requires: ClassVar[str] = ""

    @abstractmethod
    def status(self) -> Status:
        """Tell whether the engine is usable. Never raises, never takes the process down."""

    def with_options(self, options: Any) -> Engine:
        """Return the engine as its options make it, itself where they change nothing about it.

        For options that change what the engine supports, its fingerprint or its devices, such as the kind of chip to
        compile for: the engine returned is the one that is asked about all that. ``options`` is an instance of the
        class ``options``. Must not fail where the values have passed that class's own checks.
        """
        return self

    def devices(self) -> Sequence[Device] | None:
        """Return the devices that belong to this engine alone, as an emulator's do; None for those of its backend."""
        return None

    @abstractmethod
    def fingerprint(self) -> Mapping[str, str]:
        """Return what a program depends on: versions, instruction set, device kind. Only called when usable."""

    @abstractmethod
    def supports(self, node: Node, precision: Precision) -> Verdict:
        """Tell whether a node can be compiled, with the reason if not. Depends on nothing but its arguments."""

    def supports_all(self, nodes: Sequence[Node], precision: Precision) -> list[Verdict]:
        """Answer for many nodes at once; override where asking together is cheaper than one by one."""
        return [self.supports(node, precision) for node in nodes]

    def supports_source(self, format: str, signature: Signature, precision: Precision) -> Verdict:
        """Tell whether a whole source can be compiled, with the reason if not."""
        if format == "onnx" or format not in self.formats:
            return Verdict.refuse(f"it takes {', '.join(self.formats)}, and the source is {format}")
        if precision != self.caps.default_precision:
            return Verdict.refuse(f"it computes in {self.caps.default_precision}, not in {precision}")
        return SUPPORTED

    @abstractmethod
    def compile(self, job: CompileJob, out: Path) -> Program:
        """Write a program into the empty folder ``out``.

        ONNX files among a program's may keep weights as external data in ``weights.bin`` beside them, which is
        not listed among the files: it is merged with all other weights, so that equal ones are stored once.

        Raises:
            CompileError: The segment cannot be compiled; it goes to the next engine.
        """

    def devices_needed(self, options: Any) -> int:
        """Return how many devices one copy of a program takes that was compiled with ``options``, at least 1.

        The scheduler hands `load` that many, neighbours by index, a set of its own for every copy.
        """
        return 1

    @abstractmethod
    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        """Make a program resident on ``devices``: as many as `devices_needed` said.

        Raises:
            IncompatibleProgram: The files do not fit this toolchain after all.
            OutOfDeviceMemory, CoresUnavailable: The devices cannot take it.
        """


class Backend(ABC):
    """A family of devices and the engines that run on it, in order of preference."""

    name: ClassVar[str]
    api_version: ClassVar[int] = API_VERSION
    engines: tuple[Engine, ...]
    fallback: ClassVar[tuple[str, ...]] = ()
    """Engines, in order, that take what others refuse: the ``cpu`` backend's alone are asked."""
    exclusive: ClassVar[bool] = False
    """Whether a device takes the programs of one session only. Otherwise sessions share; the least used is first."""

    @abstractmethod
    def devices(self) -> Sequence[Device]:
        """Return the devices at hand; an empty sequence means that programs can be compiled but not run."""

    def groups(self, environ: Mapping[str, str], devices: Sequence[Device]) -> tuple[Group, ...]:
        """Return what this process may use of devices, cut into groups; by default one pool of them all.

        Sessions take the next free group in this order. `accelrt.cores` has the grammar of the variables that vendors
        use for it.

        Args:
            environ: The environment variables, handed in by the core.
            devices: Those of the backend, or those that belong to the engine that is to run.

        Raises:
            OptionError: A variable cannot be read.
            CoresUnavailable: A variable asks for devices that are not there.
        """
        indices = tuple(device.index for device in devices)
        return (Group(indices),) if indices else ()

    def dlpack_device(self, device: Device) -> tuple[int, int] | None:
        """Return how DLPack names a device, kind and index: ``(2, 0)`` for CUDA's first.

        None, the default, says that tensors which the caller of `predict` has there cannot be taken as they are: they
        go through the host.
        """
        return None

    def settle(self, tensors: Sequence[DeviceTensor]) -> None:
        """Wait until tensors are complete that the caller of `predict` gives, and that other streams may still write.

        Called for the tensors of a call that are on one device that `dlpack_device` names, before an engine sees them.

        Raises:
            Exception: It cannot be told; the call fails.
        """
        raise NotImplementedError

    def occupants(self) -> Mapping[int, Sequence[str]]:
        """Return which other processes of this machine hold devices, by index, as texts: ``process 4242``.

        For ``accelrt cores``. Only what the vendor's tools tell, and no command lines, which may hold secrets; by
        default nothing is known. May take seconds; must not raise.
        """
        return {}

    def report(self) -> Mapping[str, Any]:
        """Return what somebody far away needs to see of this machine to find a fault: JSON, without secrets.

        Written to the file of ``accelrt doctor --report``. May take seconds; a backend has nothing to add by default.
        """
        return {}
