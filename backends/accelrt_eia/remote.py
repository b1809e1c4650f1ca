"""The engine `eia/remote`: segments that a server of the Open Inference Protocol compiles and runs.

A program is the segment as ONNX. It is uploaded under a name made of its content, ``accelrt-<hash>``, so that a second
session, a second process or a second client finds it there and uploads nothing. A server that lends slices keeps each
client's programs apart: there a second session finds it, and so does a process with the same API key.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelrt.backend import Caps, CompileJob, Device, Engine, Executable, Precision, Program, Status, Verdict
from accelrt.errors import (
    AccelrtError,
    CompileError,
    CoresUnavailable,
    DeviceError,
    DeviceLost,
    IncompatibleProgram,
    ModelNotFound,
    ModelUnavailable,
    NotAllowed,
    OptionError,
    OutOfDeviceMemory,
    Overloaded,
    RequestTimeout,
    RequestTooLarge,
    SessionClosed,
)
from accelrt.graph.node import WEIGHTS_FILE, Node
from accelrt.graph.types import Value
from accelrt.protocol.address import Address, parse_address
from accelrt.protocol.client import ClientSettings, Endpoint
from accelrt.protocol.leases import EXTENSION, PRECISION, PRECISION_EXTENSION, content_name, placement_of
from accelrt.protocol.wire import MOST_MESSAGE_BYTES
from accelrt_eia.accelerators import Accelerators, addresses
from accelrt_eia.borrowing import DEFAULT_LEASE_S, Borrowed
from accelrt_eia.calls import Caller, Model, carriable

if TYPE_CHECKING:
    from accelrt_cpu.onnxruntime import OnnxRuntimeEngine

logger = logging.getLogger("accelrt")

REDUCED = ("bf16", "fp16")
"""Precisions that a server is told to compute in, and that it has to confirm."""

_MODEL = "model.onnx"
_ASKING_S = 5.0
_EXPORT = "export ACCELRT_EIA_ACCELERATORS=grpc://host:8001, and the other variables ACCELRT_EIA_* as documented"
_REMEDY = "pip install 'accelrt[eia]'"


@dataclass(frozen=True, slots=True)
class RemoteOptions:
    """Options of the engine.

    Attributes:
        timeout_s: How long one call may take, trying again included.
        load_timeout_s: How long the server may take to load a model, the upload included.
        lost_after_s: An endpoint that was not reached for this long counts as lost: its calls go to other replicas, and
            this session does not ask it again. Until then each call that it fails is answered by the CPU.
        shared_memory: Let tensors travel in shared memory where the server is on this machine.
        local_socket: Let calls go over the server's Unix socket there, in place of gRPC.
    """

    timeout_s: float = 30.0
    load_timeout_s: float = 600.0
    lost_after_s: float = 30.0
    shared_memory: bool = True
    local_socket: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.timeout_s <= 86400 or not 0 < self.load_timeout_s <= 86400 or not self.lost_after_s >= 0:
            raise OptionError(
                "timeout_s and load_timeout_s must be above 0 and at most a day, lost_after_s must not be negative."
            )


class RemoteEngine(Engine):
    """Endpoints of the Open Inference Protocol over gRPC, as accelerators."""

    name: ClassVar[str] = "remote"
    caps: ClassVar[Caps] = Caps(concurrent=True, parallelism=4)
    options: ClassVar[type] = RemoteOptions
    requires: ClassVar[str] = _REMEDY

    def __init__(self, accelerators: Accelerators | None = None) -> None:
        self._accelerators = accelerators or Accelerators()
        self._borrowed = Borrowed()
        self._loading: dict[tuple[Address, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def endpoints(self) -> Sequence[Device]:
        """Return the endpoints that the environment names; none where it cannot be read, which `status` tells."""
        if not self.status().usable:
            return ()
        return self._accelerators.devices(os.environ)

    def status(self) -> Status:
        return status()

    def fingerprint(self) -> Mapping[str, str]:
        # The server compiles, so that a program depends on nothing of this machine. What the server made of it differs
        # from server to server; it is asked when the program is loaded, and held to the precision that was asked for.
        return {"format": "onnx", "protocol": "open-inference/2"}

    def supports(self, node: Node, precision: Precision) -> Verdict:
        """Take what onnxruntime has kernels for: servers of the protocol run ONNX with it, or with more."""
        # What a server computes in, it says when a program is loaded; which operators there are is all that is asked.
        return self._cpu.supports(node, "fp32" if precision in REDUCED else precision)

    def compile(self, job: CompileJob, out: Path) -> Program:
        from accelrt.graph.load import load_graph
        from accelrt.graph.weights import WeightFile

        if problem := carriable(job.signature):
            raise CompileError(f"The segment cannot be reached over the network: {problem}.", backend=self.name)
        weights = WeightFile(out / WEIGHTS_FILE)
        load_graph(job.model).write(out / _MODEL, weights)
        weights.close()
        remark = ""
        if job.precision in REDUCED:
            remark = self._consult(out / _MODEL, job.precision, job.options.load_timeout_s)
        return Program({_MODEL: out / _MODEL}, self.fingerprint(), job.signature, job.options, job.precision, remark)

    def load(self, program: Program, devices: Sequence[Device]) -> Executable:
        if not devices:
            raise CoresUnavailable("No accelerator was given to load the program onto.", backend=self.name)
        address = parse_address(devices[0].properties["address"])
        path, options = program.files[_MODEL], program.options
        endpoint = self._accelerators.endpoint(address)
        asked = program.precision if program.precision in REDUCED else None
        whole = _whole(path)
        name = content_name(whole, asked)
        health = self._accelerators.health(address)
        lent = EXTENSION in health.extensions
        if lent:
            lease_s = health.slice.lease_s if health.slice is not None else DEFAULT_LEASE_S
            self._borrowed.use(endpoint, name, lease_s)
        release = partial(self._borrowed.release, endpoint, name) if lent else None
        try:
            self._upload(endpoint, name, asked, lambda: whole, options.load_timeout_s, patient=True)
            placed = self._hold_to(endpoint, name, asked)
        except BaseException:
            if release is not None:
                release()
            raise
        logger.info("Program %s runs %s.", name, placed or f"on {endpoint.address.endpoint}")

        def restore(timeout_s: float) -> None:
            self._upload(endpoint, name, asked, lambda: _whole(path), timeout_s)
            self._hold_to(endpoint, name, asked)

        # Where slices are lent, clients would share a machine's memory with each other.
        share = not lent and options.shared_memory and self._accelerators.shares_memory(address)
        model = Model(name, "", program.signature)
        caller = Caller(endpoint, model, share=share, local_socket=options.local_socket)
        return RemoteExecutable(endpoint, caller, options.timeout_s, options.lost_after_s, restore, release)

    def _consult(self, path: Path, precision: Precision, timeout_s: float) -> str:
        """Have the first server that answers compile a program, and return where it says that it runs.

        One that does not compute in the precision makes no program fail here: another server may load it, and loading
        holds each to it.
        """
        if not self.status().usable:
            return _later(precision)
        for address, health in self._accelerators.states(os.environ):
            if health.problem:
                continue
            endpoint = self._accelerators.endpoint(address)
            whole = _whole(path)
            try:
                name = content_name(whole, precision)
                self._upload(endpoint, name, precision, lambda whole=whole: whole, timeout_s)  # type: ignore[misc]
                return self._hold_to(endpoint, name, precision)
            except (CoresUnavailable, OutOfDeviceMemory):
                continue
            except IncompatibleProgram as error:
                return error.message.rstrip(".")
        return _later(precision)

    def _hold_to(self, endpoint: Endpoint, name: str, precision: str | None) -> str:
        """Return where a server says that a program runs, in words; empty if it says nothing.

        Raises:
            CoresUnavailable: It cannot be asked now.
            IncompatibleProgram: It does not compute in the precision that was asked for.
        """
        try:
            told = endpoint.ask("ModelConfig", _ASKING_S, name=name).config.parameters
        except (DeviceError, RequestTimeout, ModelUnavailable, ModelNotFound) as error:
            if precision is None:
                return ""
            raise CoresUnavailable(
                f"{endpoint.address.endpoint} cannot be asked now: {error.message}", backend=self.name
            ) from error
        except AccelrtError:
            if precision is None:
                return ""
            raise
        placed = placement_of({key: value.string_value for key, value in told.items()})
        words = f"on {endpoint.address.endpoint}: " + ", ".join(map(str, placed)) if placed else ""
        if precision is not None and not any(one.precision == precision for one in placed):
            raise IncompatibleProgram(
                f"{endpoint.address.endpoint} was asked to compute in {precision}; "
                f"{f'it runs {words}' if placed else 'it does not say what it computes in'}.",
                hint="Ask for another precision, or take a server whose accelerator has this one.",
                backend=self.name,
            )
        return words

    def _upload(
        self,
        endpoint: Endpoint,
        name: str,
        precision: str | None,
        whole: Callable[[], bytes],
        timeout_s: float,
        *,
        patient: bool = False,
    ) -> None:
        """See that the server has the model; several threads that want it wait for one upload.

        Raises:
            CoresUnavailable: The server cannot be reached, is overloaded, or takes longer than ``timeout_s``.
            OutOfDeviceMemory, IncompatibleProgram: It does not take the model.
        """
        deadline = time.monotonic() + timeout_s
        with self._lock:
            lock = self._loading.setdefault((endpoint.address, name), threading.Lock())
        if not lock.acquire(timeout=timeout_s):
            raise CoresUnavailable(f"{endpoint.address.endpoint} takes long to load the program.", backend=self.name)
        try:
            try:
                asking_s = min(_ASKING_S, timeout_s)
                if endpoint.ask("ModelReady", asking_s, patient=patient, name=name).ready:
                    return
                if precision is not None:
                    self._knows_precisions(endpoint, asking_s)
                endpoint.ask(
                    "RepositoryModelLoad",
                    max(0.001, deadline - time.monotonic()),
                    model_name=name,
                    parameters={
                        "config": {"string_param": json.dumps(_config(name, precision))},
                        "file:1/model.onnx": {"bytes_param": whole()},
                    },
                )
            except NotAllowed as error:
                raise IncompatibleProgram(
                    f"{endpoint.address.endpoint} does not take models: {error.message}",
                    hint="Start the server with explicit model control, and give this client a key that may load.",
                    backend=self.name,
                ) from error
            except RequestTooLarge as error:
                raise OutOfDeviceMemory(
                    f"{endpoint.address.endpoint} does not take a model of this size: {error.message}",
                    hint="Raise the longest message that the server takes.",
                    backend=self.name,
                ) from error
            except OutOfDeviceMemory:
                raise
            except (DeviceError, RequestTimeout, Overloaded) as error:
                raise CoresUnavailable(
                    f"{endpoint.address.endpoint} cannot take the program now: {error.message}", backend=self.name
                ) from error
            except AccelrtError as error:
                raise IncompatibleProgram(
                    f"{endpoint.address.endpoint} cannot load the program: {error.message}", backend=self.name
                ) from error
        finally:
            lock.release()

    def _knows_precisions(self, endpoint: Endpoint, timeout_s: float) -> None:
        if PRECISION_EXTENSION not in endpoint.ask("ServerMetadata", timeout_s).extensions:
            raise IncompatibleProgram(
                f"{endpoint.address.endpoint} cannot be told what to compute in: it has no extension "
                f"{PRECISION_EXTENSION}.",
                hint="accelrt's server has it.",
                backend=self.name,
            )

    @cached_property
    def _cpu(self) -> OnnxRuntimeEngine:
        from accelrt_cpu.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine()


class RemoteExecutable(Executable):
    """A model on a server.

    Args:
        endpoint: The server.
        caller: Calls the model.
        timeout_s: How long a call may take.
        lost_after_s: After how long without an answer the device counts as lost; None for never.
        restore: Sees within so many seconds that the server has the model, which it has forgotten if it was started
            anew; None if that is not ours to do.
        release: Called once when the executable is closed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        caller: Caller,
        timeout_s: float,
        lost_after_s: float | None = None,
        restore: Callable[[float], None] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self._endpoint, self._caller, self._restore, self._release = endpoint, caller, restore, release
        self._timeout_s, self._lost_after_s = timeout_s, lost_after_s
        self._closed = False

    def run(self, inputs: Mapping[str, Value]) -> dict[str, Value]:
        if self._closed:
            raise SessionClosed("The program was closed.", hint="Load it again.")
        deadline = time.monotonic() + self._timeout_s
        try:
            try:
                return self._caller.call(inputs, self._timeout_s)
            except (ModelNotFound, ModelUnavailable) as error:
                if self._restore is None or isinstance(error, Overloaded):
                    raise
            self._restore(_left(deadline))
            return self._caller.call(inputs, _left(deadline))
        except (DeviceError, RequestTimeout) as error:
            if self._lost_after_s is not None and self._endpoint.failing_s() > self._lost_after_s:
                raise DeviceLost(
                    f"{self._endpoint.address.endpoint} has not been reached for {self._endpoint.failing_s():.0f} s: "
                    f"{error.message}",
                    backend="eia",
                ) from error
            raise

    def close(self) -> None:
        self._closed = True
        self._caller.close()
        release, self._release = self._release, None
        if release is not None:
            release()


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def status() -> Status:
    """Tell whether endpoints can be reached at all: what is installed, and whether the environment can be read."""
    with contextlib.suppress(ImportError, ValueError):
        if importlib.util.find_spec("grpc") is not None and importlib.util.find_spec("google.protobuf") is not None:
            try:
                count = len(addresses(os.environ))
                ClientSettings.of_environment(os.environ)
            except OptionError as error:
                return Status(False, reason=error.message.rstrip("."), remedy=_EXPORT)
            return Status(True, version=f"gRPC, {count} endpoint{'s' * (count != 1)}")
    return Status(False, reason="grpcio or protobuf is not installed", remedy=_REMEDY)


def _config(name: str, precision: str | None) -> dict[str, Any]:
    """Return the least that Triton wants to hear of a model whose files come with the request."""
    config: dict[str, Any] = {"name": name, "backend": "onnxruntime", "max_batch_size": 0}
    if precision is not None:
        config["parameters"] = {PRECISION: {"string_value": precision}}
    return config


def _later(precision: str) -> str:
    return f"compiled by the server that it is loaded on, which must say that it computes in {precision}"


def _whole(path: Path) -> bytes:
    """Return a model with its weights in it, the same bytes wherever its weights lie.

    Raises:
        IncompatibleProgram: It cannot be read, or is too long for a message.
    """
    import onnx

    try:
        model = onnx.load(path)
        if model.ByteSize() > MOST_MESSAGE_BYTES - (1 << 16):
            raise OutOfDeviceMemory(
                f"The program takes {model.ByteSize()} bytes, and a message holds {MOST_MESSAGE_BYTES}.",
                backend="remote",
            )
        return bytes(model.SerializeToString())
    except (OSError, ValueError) as error:
        raise IncompatibleProgram(f"The program cannot be read: {error}", backend="remote") from error
