"""The contract between accelrt and the runtimes under it.

A *backend* is a family of devices with one name; an *engine* is one runtime that compiles for and runs on them. An
author writes both: five methods an engine, one a backend. accelrt owns the rest: partitioning, fallback, artifacts,
scheduling. `accelrt.testing.contract` is a test suite to inherit, ``backends/README.md`` a walk-through.

Importing a backend must not import its vendor's SDK, which may be missing or broken: `Engine.status` tells that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TypeAlias

from accelrt.graph.node import Node
from accelrt.graph.types import Signature, Value
from accelrt.nature import Nature

API_VERSION = 1
"""Raised when the contract changes in a way that breaks engines; a plug-in of another version is refused."""

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
        parallelism: Calls in flight that keep one device busy.
        nature: ``emulated`` computes on the CPU in the name of other hardware and is never chosen unless asked for by
            name; a ``stand-in`` takes the place of a runtime in tests. Every report says so.
        last_resort: Right but slow; nodes are never moved here to save a cut.
        default_precision: What the engine computes in unless told otherwise; recorded in every artifact.
    """

    concurrent: bool = True
    parallelism: int = 1
    nature: Nature = "real"
    last_resort: bool = False
    default_precision: Precision = "fp32"


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The options of an engine that has none."""


@dataclass(frozen=True, slots=True)
class CompileJob:
    """What an engine is asked to compile: an ONNX file whose weights lie beside it as external data."""

    model: Path
    signature: Signature
    precision: Precision
    options: Any


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled segment: the files an engine wrote, and the toolchain they depend on.

    ``files`` maps the names the engine gave to where the files are now: an artifact keeps them under names of its own,
    all in one folder, with the weights of every ONNX file among them in a shared ``weights.bin`` beside it.
    ``fingerprint`` is compared with `Engine.fingerprint` before a program is loaded. ``precision`` is that of the job.
    """

    files: Mapping[str, Path]
    fingerprint: Mapping[str, str]
    signature: Signature
    options: Any
    precision: Precision = "fp32"


class Executable(ABC):
    """A program resident on a device."""

    @abstractmethod
    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        """Compute the outputs by name; ``inputs`` have been checked against the signature.

        Arrays are numpy's (C order), sequences lists, an empty optional None. Inputs are never written to, and
        outputs must stay valid when ``run`` is called again.

        Raises:
            DeviceLost: The device is gone; the executable will not be used again.
            Exception: Anything else fails this call only.
        """

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
    """One vendor runtime. Cheap to construct; the vendor's SDK is imported by the methods that need it."""

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

    @abstractmethod
    def compile(self, job: CompileJob, out: Path) -> Program:
        """Write a program into the empty folder ``out``.

        ONNX files among a program's may keep weights as external data in ``weights.bin`` beside them, which is
        not listed among the files: it is merged with all other weights, so that equal ones are stored once.

        Raises:
            CompileError: The segment cannot be compiled; it goes to the next engine.
        """

    @abstractmethod
    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        """Make a program resident on ``devices``.

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

    @abstractmethod
    def devices(self) -> Sequence[Device]:
        """Return the devices at hand; an empty sequence means that programs can be compiled but not run."""

    def report(self) -> Mapping[str, Any]:
        """Return what somebody far away needs to see of this machine to find a fault: JSON, without secrets.

        Written to the file of ``accelrt doctor --report``. May take seconds; a backend has nothing to add by default.
        """
        return {}
