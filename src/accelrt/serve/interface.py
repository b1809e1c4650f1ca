"""What the front ends (HTTP, gRPC) ask for, and what answers them.

A front end turns bytes into an `InferRequest` and an `InferResponse` into bytes; a `Service` holds the models. Neither
knows how the other works. Errors are those of `accelrt.errors`: `RequestError`, `ModelNotFound`, `ModelUnavailable`,
`Overloaded`, `NotAllowed`, `RequestTimeout`, and `InputError` where tensors do not fit a model's signature. Any other
`AccelrtError` is the model's fault, not the client's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from accelrt.graph.types import Signature, Value

ModelState = Literal["LOADING", "READY", "UNLOADING", "UNAVAILABLE"]
"""States of a version of a model, in the words of the model repository extension."""


@dataclass(slots=True)
class Clock:
    """When a request's turn came and was over, of `time.monotonic_ns`, 0 if not; ``rows`` are those of its run."""

    begun_ns: int = 0
    ended_ns: int = 0
    rows: int = 0


@dataclass(slots=True)
class InferRequest:
    """One request for one model.

    Not frozen: one is made for each request, and a frozen dataclass costs three times as much to make.

    Attributes:
        inputs: Numpy arrays by name: C order, little endian, of the dtype that the datatype says; text as objects of
            type ``bytes``. They may be views of the request's bytes and are never written to.
        outputs: Names asked for, in order; None for all.
        id: Chosen by the client, returned as it is; empty if none.
        priority: 0 for the model's default, 1 for the highest.
        timeout_us: How long it may wait for its turn, 0 for the model's default.
        parameters: What else the client sent with it; ``priority`` and ``timeout`` are not repeated here.
        arrived_ns: `time.monotonic_ns` when its last byte came.
        clock: Where whoever queues it writes down its times; None if nobody wants to know.
    """

    inputs: dict[str, Value]
    outputs: Sequence[str] | None = None
    id: str = ""
    priority: int = 0
    timeout_us: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arrived_ns: int = 0
    clock: Clock | None = None


@dataclass(slots=True)
class InferResponse:
    """The answer: arrays by name, in the order asked for, else in the model's."""

    model_name: str
    model_version: str
    outputs: dict[str, Value]
    id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output as clients see it: ``datatype`` is the protocol's (``FP32``), -1 stands for an open size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What the protocol tells about a model; ``platform`` is as ``accelrt_cpu/onnxruntime``."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of the repository's index; ``version`` is empty where none was ever loaded."""

    name: str
    version: str
    state: ModelState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened, and the time it took in all, in nanoseconds."""

    count: int = 0
    ns: int = 0


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """Counts and times of one version since it was loaded, as the statistics extension means them.

    ``inference_count`` counts rows, ``execution_count`` calls of the model; with batching the former is larger.
    ``batches`` gives, for each batch size that ran, the executions and their times.
    """

    name: str
    version: str
    last_inference_ms: int
    inference_count: int
    execution_count: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batches: Mapping[int, tuple[Duration, Duration, Duration]] = field(default_factory=dict)
    pending: int = 0
    rejected: int = 0
    timed_out: int = 0


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """The state of one version at a moment, for status pages and metrics.

    Attributes:
        rate: Requests answered a second of late.
        waiting: Requests whose turn has not come.
        resident_bytes: What it holds in memory, 0 if it is not loaded.
        program_bytes: The files that it was loaded from, 0 if it is not loaded.
        placement: Nodes on each engine.
        batching: Whether requests may share runs, and why or why not.
        pid: Of its worker process, None if it has none.
        loads: How often it was loaded, since the server was started.
    """

    name: str
    version: str
    state: ModelState
    reason: str
    engines: tuple[str, ...]
    devices: tuple[str, ...]
    rate: float
    p50_ms: float | None
    p99_ms: float | None
    waiting: int
    resident_bytes: int
    placement: Mapping[str, int]
    batching: str
    pinned: bool
    pid: int | None
    restarts: int
    program_bytes: int = 0
    loads: int = 0


class ServedModel(Protocol):
    """One version of a model that is loaded. It stays usable until the requests that it was found for are answered."""

    name: str
    version: str
    signature: Signature
    metadata: ModelMetadata
    config: Mapping[str, Any]
    """The model's configuration in the words of Triton's ``ModelConfig``, as JSON."""

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        """Answer at once, in the caller's thread, or return None if that could hold up an event loop.

        Raises:
            InputError, RequestError: The request does not fit the model.
            AccelrtError: The model failed.
        """
        ...

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer when the request's turn has come.

        Raises:
            InputError, RequestError: The request does not fit the model.
            Overloaded: Its queue is full.
            RequestTimeout: Its time was over before its turn had come; nothing was computed.
            ModelUnavailable: It was being unloaded, or its worker died with the request in it.
            AccelrtError: The model failed.
        """
        ...


class Service(Protocol):
    """The models of a server."""

    def live(self) -> bool:
        """Tell whether the server answers at all."""
        ...

    def ready(self) -> bool:
        """Tell whether every model that should be loaded is."""
        ...

    async def model(self, name: str, version: str = "") -> ServedModel:
        """Return a version of a model (by default the highest that is ready), loading it where that is allowed.

        Raises:
            ModelNotFound, ModelUnavailable: There is none, or it cannot answer now.
        """
        ...

    def find(self, name: str, version: str = "") -> ServedModel | None:
        """Return a version of a model that is ready, None where `model` would have to wait or to refuse."""
        ...

    def index(self, *, ready: bool = False) -> Sequence[IndexEntry]:
        """Return every version known, or those that are ready."""
        ...

    async def load(self, name: str, parameters: Mapping[str, str | bytes | int | bool]) -> None:
        """Load a model, or load it again.

        Args:
            name: The model's.
            parameters: ``config``, JSON that takes the place of the model's own; ``file:<version>/<name>``, bytes of a
                file to load in place of the repository's.

        Raises:
            NotAllowed: The server's control mode is not ``explicit``.
            ModelNotFound, RequestError: It is not in the repository, or cannot be loaded as asked for.
        """
        ...

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Unload all versions of a model; requests that it holds are answered first.

        Raises:
            NotAllowed: The server's control mode is not ``explicit``.
            ModelNotFound: It is not known.
        """
        ...

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Return the statistics of one version, of all versions of a model, or of everything.

        Raises:
            ModelNotFound: There is no such model.
        """
        ...

    def snapshot(self) -> Sequence[ModelSnapshot]:
        """Return the state of every version now, for metrics and the status page."""
        ...


def is_ready(service: Service, name: str, version: str = "") -> bool:
    """Tell whether a request for a model would be answered: it is loaded, or its request loads it.

    `Service.find` alone says nothing of models that made room for others.
    """
    if service.find(name, version) is not None:
        return True
    return any(entry.name == name and version in ("", entry.version) for entry in service.index(ready=True))


class Lending(Protocol):
    """What a front end asks where each client has models of its own."""

    extensions: Sequence[str]
    """What is offered beyond what every server does."""

    def of(self, key: str | None, token: str | None) -> Service:
        """Return what a client may ask.

        Args:
            key: Names the API key that the client showed; None if the server has none.
            token: What the client says to be its token, None if nothing.
        """
        ...
