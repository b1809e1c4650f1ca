"""Settings of the models behind a server: the server's own, and each model's in its ``accelrt.json``."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from accelrt.errors import OptionError

ControlMode: TypeAlias = Literal["none", "poll", "explicit"]
Isolation: TypeAlias = Literal["auto", "none", "process"]

SETTINGS_FILE = "accelrt.json"
MAX_SETTINGS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What a model's ``accelrt.json`` may say; None stands for the server's setting, or for no wish.

    Attributes:
        backend: The target to compile a model for; an artifact has its own.
        precision: What it computes in, as for `accelrt.compile`.
        options: Options of the engine, as for `accelrt.compile`.
        batch_sizes: Batch sizes to specialise the model to.
        devices: Indices of devices, as for `accelrt.load`.
        replicas: Copies of the model.
        workers: Calls under way at once, if not what its engines say.
        max_batch_size: Rows that calls of several requests may have together; 1 for no batching.
        max_queue_delay_us: Microseconds that a request may wait for others to share its run.
        latency_target_ms: What a request may take in all. Batches are kept small enough for it, and requests that
            would wait longer are turned away.
        max_queue: Requests that may wait.
        timeout_ms: How long a request waits for its turn if it does not say itself; 0 for ever.
        pinned: Never unloaded to make room.
        isolation: Whether it has a process of its own.
        hang_timeout_s: Seconds after which a worker process that does not answer is killed.
        warmup: Call it once with zeros, or as Triton's configuration says, before it is ready.
    """

    backend: str | None = None
    precision: str | None = None
    options: dict[str, Any] | None = None
    batch_sizes: list[int] | None = None
    devices: str | None = None
    replicas: int | None = None
    workers: int | None = None
    max_batch_size: int | None = None
    max_queue_delay_us: int | None = None
    latency_target_ms: float | None = None
    max_queue: int | None = None
    timeout_ms: float | None = None
    pinned: bool = False
    isolation: Isolation | None = None
    hang_timeout_s: float | None = None
    warmup: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (
            ("replicas", 1, 1024),
            ("workers", 1, 1024),
            ("max_batch_size", 1, 1 << 20),
            ("max_queue_delay_us", 0, 10**9),
            ("max_queue", 1, 1 << 20),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise OptionError(f"{name} must be from {least} to {most}, not {value}.")
        for name in ("latency_target_ms", "hang_timeout_s"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1e9:
                raise OptionError(f"{name} must be more than 0, not {value}.")
        if self.timeout_ms is not None and not 0 <= self.timeout_ms <= 1e9:
            raise OptionError(f"timeout_ms must be 0 or more, not {self.timeout_ms}.")
        if self.batch_sizes is not None and any(type(size) is not int for size in self.batch_sizes):
            raise OptionError(f"batch_sizes must be whole numbers, not {self.batch_sizes}.")


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """How a `ModelService` works.

    Attributes:
        repository: Folders of models, a model, or an artifact.
        control: ``none`` loads all models at the start; ``poll`` also follows changes of the folders; ``explicit``
            loads what ``load_models`` names and what clients ask for.
        load_models: For ``explicit``: names to load at the start; ``*`` for all.
        poll_s: Seconds between two looks at the folders.
        trust: Artifacts may hold programs that run code, and so may files that clients send.
        defaults: Settings of models that do not say themselves.
        load_threads: Models that are loaded at once.
        max_resident_models: Models that are loaded at a time, None for no limit.
        max_resident_bytes: Bytes that they may hold, None for no limit.
        load_wait_s: Seconds that a request waits for a model that is being loaded.
        drain_s: Seconds that an old version is kept for requests that hold it.
        max_upload_bytes: Bytes of files in one load request.
        direct_us: Calls are answered in the front end's thread while nearly all take less than this, in microseconds.
    """

    repository: tuple[Path, ...]
    control: ControlMode = "none"
    load_models: tuple[str, ...] = ()
    poll_s: float = 15.0
    trust: bool = False
    defaults: ModelSettings = field(default_factory=ModelSettings)
    load_threads: int = 2
    max_resident_models: int | None = None
    max_resident_bytes: int | None = None
    load_wait_s: float = 60.0
    drain_s: float = 30.0
    max_upload_bytes: int = 2 << 30
    direct_us: float = 200.0

    def __post_init__(self) -> None:
        if not self.repository:
            raise OptionError("A server needs a repository.", hint="Name a folder of models, a model, or an artifact.")
        if self.control not in get_args(ControlMode):
            raise OptionError(
                f"The control mode must be one of {', '.join(get_args(ControlMode))}, not {self.control!r}."
            )
        for name in ("max_resident_models", "max_resident_bytes", "load_threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{name} must be 1 or more, not {value}.")
        if self.poll_s <= 0 or self.load_wait_s < 0 or self.drain_s < 0 or self.direct_us < 0:
            raise OptionError("poll_s must be more than 0; load_wait_s, drain_s and direct_us 0 or more.")
        if self.load_models and self.control != "explicit":
            raise OptionError(
                f"Models to load are named, and the control mode is {self.control!r}.", hint="Use the mode explicit."
            )


DEFAULT_MAX_BATCH = 32
DEFAULT_MAX_QUEUE = 1024
DEFAULT_HANG_S = 60.0


def read_settings(path: Path) -> ModelSettings:
    """Read an ``accelrt.json``.

    Raises:
        OptionError: It cannot be read, holds a key that is not known, or a value that is not what the key takes.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_SETTINGS_BYTES + 1)
        data = json.loads(text) if len(text) <= MAX_SETTINGS_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"{path.name} of the model cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise OptionError(f"{path.name} of the model must be a JSON object of at most {MAX_SETTINGS_BYTES} bytes.")
    return settings_from(data)


def settings_from(data: Mapping[str, Any]) -> ModelSettings:
    """Check settings that came as JSON.

    Raises:
        OptionError: A key is not known, or a value is not what the key takes.
    """
    known = {each.name for each in fields(ModelSettings)}
    if unknown := sorted(set(data) - known):
        raise OptionError(f"No setting of a model is named {unknown[0]!r}.", hint=f"Known: {', '.join(sorted(known))}.")
    hints = get_type_hints(ModelSettings)
    for name, value in data.items():
        if not _fits(value, hints[name]):
            raise OptionError(f"The setting {name!r} of a model cannot be {value!r}.")
    return ModelSettings(**data)


def merged(own: ModelSettings, default: ModelSettings) -> ModelSettings:
    """Return a model's settings, with the server's where the model does not say."""
    unset = ModelSettings()
    chosen = {
        each.name: getattr(own, each.name)
        if getattr(own, each.name) != getattr(unset, each.name)
        else getattr(default, each.name)
        for each in fields(ModelSettings)
    }
    return ModelSettings(**chosen)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType or str(origin) == "typing.Union":
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
