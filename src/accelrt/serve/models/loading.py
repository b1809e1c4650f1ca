"""From a file of the repository to something that computes: an artifact, a session, and what is known of both."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from accelrt.errors import (
    AccelrtError,
    InputError,
    OptionError,
    RegistryError,
    RequestError,
    TargetError,
    UntrustedProgram,
)
from accelrt.graph.types import Port, Signature, TensorType, Value, numpy_dtype
from accelrt.runtime.inputs import Binder
from accelrt.runtime.runner import Outputs
from accelrt.serve.models.config import ModelConfig, TensorConfig
from accelrt.serve.models.settings import DEFAULT_MAX_BATCH, ModelSettings

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact

_COMPILING = ("backend", "precision", "options", "batch_sizes")
_SHARES_CALLS = "cpu/onnxruntime"
"""The engine that by default shares each call out to all cores, however short it is."""

_UPLOADABLE = (".onnx", ".accel")


class Predictor(Protocol):
    """What computes a model's calls: a session here, or in a process of its own."""

    signature: Signature

    @property
    def capacity(self) -> int:
        """Calls under way at once that keep it busy."""
        ...

    def predict(self, feeds: Mapping[str, Value], /) -> Outputs:
        """Compute one call; thread-safe."""
        ...

    def close(self) -> None:
        """Wait for the calls under way, then free what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a model that was loaded.

    Attributes:
        signature: As clients see it.
        platform: What runs most of it: ``accelrt_cpu/onnxruntime``.
        engines: What runs its segments, in order.
        devices: Names of the devices that it was placed on.
        resident_bytes: What it holds: its programs' files, or the measured growth if that is more.
        rows_proved: Whether calls may share a run.
        rows_reason: Why, or why not.
        placement: How many nodes run on each engine.
        program_bytes: The files that its programs are loaded from.
    """

    signature: Signature
    platform: str
    engines: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    resident_bytes: int = 0
    rows_proved: bool = False
    rows_reason: str = ""
    placement: Mapping[str, int] = field(default_factory=dict)
    program_bytes: int = 0


def defaults_for(path: Path, defaults: ModelSettings) -> ModelSettings:
    """Return the server's settings as far as they can be meant for a file: an artifact is compiled already."""
    from accelrt.artifact.artifact import is_artifact

    if not is_artifact(path):
        return defaults
    return replace(defaults, backend=None, precision=None, options=None, batch_sizes=None)


def compiled(path: Path, settings: ModelSettings, *, trust: bool, uploaded: bool = False) -> Artifact:
    """Open an artifact, or compile a model through the cache.

    Raises:
        UntrustedProgram: The file came from a client, and its format may run code when it is read.
        AccelrtError: Whatever opening or compiling raises.
    """
    import accelrt
    from accelrt.artifact.artifact import is_artifact, open_artifact

    if is_artifact(path):
        for name in _COMPILING:
            if getattr(settings, name) is not None:
                raise OptionError(f"The setting {name!r} is for compiling, and {path.name} is compiled already.")
        return open_artifact(path, trust=trust)
    if uploaded and not trust:
        _refuse_code(path)
    return accelrt.compile(
        path,
        settings.backend,
        precision=settings.precision,  # type: ignore[arg-type]  # checked by compile
        options=settings.options,
        batch=settings.batch_sizes,
    )


def compiled_for_one_thread(
    path: Path, settings: ModelSettings, facts: Facts, *, trust: bool, uploaded: bool
) -> Artifact | None:
    """Return a model compiled for one thread, None where its settings say otherwise, or it is compiled already.

    While a server answers, its other cores are busy with the network: a second thread gets its turn late, and a call of
    50 microseconds that waits for it takes 700.
    """
    from accelrt.artifact.artifact import is_artifact

    plain = settings.options is None and settings.backend in (None, "cpu", _SHARES_CALLS)
    if not plain or facts.engines != (_SHARES_CALLS,) or is_artifact(path):
        return None
    alone = replace(settings, backend=_SHARES_CALLS, options={"threads": 1})
    return compiled(path, alone, trust=trust, uploaded=uploaded)


def _refuse_code(path: Path) -> None:
    """Refuse what another reader than that of ONNX would open, by its content, whatever it is called."""
    from accelrt.sources import tensorflow_files, torch_files

    foreign = tensorflow_files.recognises_file(path) or torch_files.recognises_file(path)
    if path.suffix not in _UPLOADABLE or foreign:
        raise UntrustedProgram(
            f"The uploaded {path.name} is no ONNX model and no artifact; reading other formats may run code.",
            hint="Upload ONNX or an artifact, or start the server so that it trusts what clients send.",
        )


def rows_of(artifact: Artifact, settings: ModelSettings, config: ModelConfig | None) -> tuple[bool, str]:
    """Tell whether calls of an artifact may share a run, and why: its rows must be proved independent."""
    most = most_rows(settings, config)
    if most <= 1:
        return False, "batching of requests is switched off"
    manifest = artifact.manifest
    if manifest.batch_sizes:
        return True, "it was compiled for several batch sizes, which proves its rows independent"
    if manifest.whole_format is not None or not manifest.has_source:
        return False, "its graph is not at hand, so its rows are not proved independent"
    from accelrt.partition.rows import prove_batch_axis

    proof = prove_batch_axis(artifact.source_graph(), sorted({1, 2, 3, most}))
    return proof.proved, proof.reason


def most_rows(settings: ModelSettings, config: ModelConfig | None) -> int:
    """Return how many rows requests may share a run with, 1 if they may not share any.

    With Triton's configuration its words count: without ``dynamic_batching`` requests do not share runs.
    """
    if settings.max_batch_size is not None:
        return settings.max_batch_size
    if config is not None and config.max_batch_size is not None:
        return max(config.max_batch_size, 1) if config.batching is not None else 1
    return DEFAULT_MAX_BATCH


def wants_process(artifact: Artifact, settings: ModelSettings) -> bool:
    """Tell whether a model gets a process of its own: as its settings say, else if its programs run code of theirs.

    Engines whose programs are data run in the server's process, which is faster. A program that is code can do to the
    server whatever the server can. Where a device takes one session only, the sessions of a server must know of each
    other to share the devices out, so they stay in one process unless the settings say otherwise.
    """
    if settings.isolation in ("none", "process"):
        return settings.isolation == "process"
    from accelrt.registry import REGISTRY, find_engine

    runs_code = False
    for segment in artifact.manifest.segments:
        try:
            backend = REGISTRY.backend(segment.backend)
            runs_code |= find_engine(backend, segment.engine).caps.executes_code
        except (TargetError, RegistryError):
            continue  # it is compiled again for another engine, or loading says what is wrong
        if backend.exclusive:
            return False
    return runs_code


def open_predictor(artifact: Artifact, settings: ModelSettings, config: ModelConfig | None) -> tuple[Predictor, Facts]:
    """Load an artifact in this process.

    Raises:
        AccelrtError: Whatever `accelrt.load` raises.
    """
    import accelrt

    before = resident_bytes()
    with _COUNTING:
        _Loads.under_way += 1
        alone = _Loads.under_way == 1
        _Loads.begun += 1
        begun = _Loads.begun
    try:
        session = accelrt.load(
            artifact,
            devices=settings.devices,
            replicas=settings.replicas or (config.replicas if config is not None else None),
            workers=settings.workers,
        )
    finally:
        with _COUNTING:
            _Loads.under_way -= 1
            alone = alone and _Loads.begun == begun
    # The growth of the process is this model's only if no other was loaded meanwhile.
    grown = resident_bytes() - before if alone else 0
    stats = session.stats()
    names = stats.engines or ("cpu",)
    devices = tuple(dict.fromkeys(name for replica in stats.replicas for name in replica.devices))
    facts = Facts(
        session.signature,
        f"accelrt_{names[0]}",
        names,
        devices,
        max(program_bytes(artifact) * max(len(stats.replicas), 1), grown),
        placement=_placement(artifact),
    )
    return session, facts


class _Loads:
    under_way = 0
    begun = 0


_COUNTING = threading.Lock()


def program_bytes(artifact: Artifact) -> int:
    """Return the size of the files that an artifact's programs are loaded from."""
    files = {name for segment in artifact.manifest.segments for name in segment.files.values()}
    return sum(record.size for name, record in artifact.manifest.files.items() if name in files)


def _placement(artifact: Artifact) -> Mapping[str, int]:
    try:
        return dict(artifact.placement.nodes_by_engine)
    except AccelrtError:
        return {}


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process, 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


# Triton's configuration held against the model


@dataclass(frozen=True, slots=True)
class Reshapes:
    """Shapes that clients send and get, and those that the model has, for each tensor with ``reshape``."""

    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    batched: bool = False


def hold_against(config: ModelConfig | None, signature: Signature) -> tuple[Signature, Reshapes]:
    """Check a configuration against the model; return the signature as clients see it, and what is reshaped.

    Where the model leaves a size open and the configuration names one, clients see the configuration's.

    Raises:
        RequestError: It names another tensor, type or shape than the model has.
    """
    if config is None:
        return signature, Reshapes()
    batched = bool(config.max_batch_size)
    if batched:
        for port in signature.inputs:
            shape = port.type.shape if isinstance(port.type, TensorType) else None
            if shape is not None and (not shape or isinstance(shape[0], int)):
                raise RequestError(
                    f"max_batch_size is {config.max_batch_size}, and input {port.name!r} is {port.type}, whose first "
                    "dimension is not open."
                )
    inputs, there = _seen(signature.inputs, config.inputs, batched, "input")
    outputs, back = _seen(signature.outputs, config.outputs, batched, "output")
    return Signature(inputs, outputs), Reshapes(there, back, batched)


def _seen(
    ports: Sequence[Port], tensors: Sequence[TensorConfig], batched: bool, side: str
) -> tuple[tuple[Port, ...], Mapping[str, tuple[int, ...]]]:
    by_name = {port.name: port for port in ports}
    changed: dict[str, Port] = {}
    reshapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        port = by_name.get(tensor.name)
        if port is None:
            raise RequestError(
                f"The configuration has an {side} {tensor.name[:80]!r}; the model has {', '.join(by_name)}."
            )
        type_ = port.type
        if not isinstance(type_, TensorType):
            continue
        if tensor.dtype and tensor.dtype != type_.dtype:
            raise RequestError(
                f"The configuration says that {side} {tensor.name!r} is {tensor.dtype}; it is {type_.dtype}."
            )
        inner = tensor.dims if tensor.reshape is None else tensor.reshape
        if type_.shape is not None and (tensor.dims or tensor.reshape is not None):
            full = (-1, *inner) if batched else inner
            if len(full) != len(type_.shape) or any(
                want != -1 and isinstance(have, int) and want != have
                for want, have in zip(full, type_.shape, strict=True)
            ):
                raise RequestError(
                    f"The configuration says that {side} {tensor.name!r} is of shape {list(full)}; it is {type_}."
                )
            if any(want != -1 and want != have for want, have in zip(full, type_.shape, strict=True)):
                narrowed = (have if want == -1 else want for want, have in zip(full, type_.shape, strict=True))
                changed[port.name] = Port(port.name, TensorType(type_.dtype, tuple(narrowed)))
        if tensor.reshape is not None:
            outer = tuple(None if dim == -1 else dim for dim in tensor.dims)
            changed[port.name] = Port(
                port.name, TensorType(type_.dtype, ((type_.shape or (None,))[0], *outer) if batched else outer)
            )
            # Inputs take the model's shape, outputs that of the configuration.
            reshapes[port.name] = tensor.reshape if side == "input" else tensor.dims
            if reshapes[port.name].count(-1) > 1:
                raise RequestError(f"The reshape of {side} {tensor.name!r} leaves more than one size open.")
    return tuple(changed.get(port.name, port) for port in ports), reshapes


def admission(
    config: ModelConfig | None, seen: Signature, own: Signature
) -> Callable[[Mapping[str, Value]], None] | None:
    """Return what refuses inputs that the model takes and its configuration does not; None if there are no such.

    Args:
        config: Triton's; its ``max_batch_size`` is the most rows of one request, as it is there.
        seen: The signature as clients see it.
        own: The model's.
    """
    most = config.max_batch_size if config is not None else None
    narrower = seen.inputs != own.inputs
    if not narrower and not most:
        return None
    bind = Binder(seen).bind if narrower else None
    names = seen.input_names

    def check(inputs: Mapping[str, Value]) -> None:
        if bind is not None:
            bind((inputs,))
        if most:
            for name in names:
                shape = getattr(inputs.get(name), "shape", ())
                if shape and shape[0] > most:
                    raise InputError(
                        f"Input {name!r} has {shape[0]} rows; the model's max_batch_size is {most}.",
                        hint="Send the rows in several requests.",
                    )

    return check


def reshaping(
    predict: Callable[[Mapping[str, Value]], Outputs], reshapes: Reshapes
) -> Callable[[Mapping[str, Value]], Outputs]:
    """Return ``predict`` for clients that send and get other shapes than the model has."""
    if not reshapes.inputs and not reshapes.outputs:
        return predict

    def reshaped(feeds: Mapping[str, Value]) -> Outputs:
        outputs = predict(_reshaped(feeds, reshapes.inputs, reshapes.batched))
        return _reshaped(outputs, reshapes.outputs, reshapes.batched)

    return reshaped


def _reshaped(values: Mapping[str, Value], shapes: Mapping[str, tuple[int, ...]], batched: bool) -> dict[str, Value]:
    changed = dict(values)
    for name, shape in shapes.items():
        value = changed.get(name)
        if not isinstance(value, np.ndarray):
            continue
        try:
            changed[name] = value.reshape((value.shape[0], *shape) if batched else shape)
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{name!r} of shape {list(value.shape)} cannot be reshaped as configured: {error}."
            ) from error
    return changed


def facts_with(facts: Facts, signature: Signature, proved: tuple[bool, str], program_bytes: int) -> Facts:
    """Return facts with the signature that clients see, what is known of its rows, and the bytes of its files."""
    return replace(
        facts, signature=signature, rows_proved=proved[0], rows_reason=proved[1], program_bytes=program_bytes
    )


# Warm-up


def warmup_calls(signature: Signature, config: ModelConfig | None) -> list[tuple[dict[str, Value], int]]:
    """Return the calls that a model answers before it is ready, and how often each.

    As ``model_warmup`` says, else zeros with every open size 1: zero is valid wherever a number is an index.
    """
    calls: list[tuple[dict[str, Value], int]] = []
    generator = np.random.default_rng(0)
    for warmup in config.warmup if config is not None else ():
        feeds = {}
        for each in warmup.inputs:
            shape = (warmup.batch_size, *each.dims) if warmup.batch_size else each.dims
            feeds[each.name] = _filled(each.dtype, shape, generator if each.random else None)
        calls.append((feeds, warmup.count))
    if not calls:
        feeds = {}
        for port in signature.inputs:
            if not isinstance(port.type, TensorType) or port.type.shape is None:
                return []
            feeds[port.name] = _filled(
                port.type.dtype, [dim if isinstance(dim, int) else 1 for dim in port.type.shape], None
            )
        calls.append((feeds, 3))
    return calls


def _filled(dtype: str, shape: Sequence[int], generator: np.random.Generator | None) -> Value:
    if dtype == "string":
        return np.full(tuple(shape), "", object)
    kind = numpy_dtype(dtype)
    if generator is None or kind.kind not in "f":
        return np.zeros(tuple(shape), kind)
    return generator.standard_normal(tuple(shape)).astype(kind)
