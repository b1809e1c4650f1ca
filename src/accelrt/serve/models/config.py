"""A model's configuration in Triton's words: the fields that are honoured, checked; what is not is named.

It comes as ``config.pbtxt`` (protobuf's text format), or as JSON with a load request. Both become plain data first, and
one reader checks that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from accelrt.errors import RequestError
from accelrt.protocol.datatypes import DTYPES
from accelrt.serve.models import text_format

T = TypeVar("T")

MAX_BATCH = 1 << 20
MAX_INSTANCES = 1024
MAX_PRIORITIES = 1024
MAX_QUEUE = 1 << 20
MAX_JSON = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """An input or output: ``dims`` without the batch's where there is one; ``reshape`` is what the model itself has."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    reshape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How long a request waits. ``max_queue_size`` 0 stands for the server's own limit."""

    timeout_us: int = 0
    delay: bool = False
    allow_timeout_override: bool = True
    max_queue_size: int = 0


@dataclass(frozen=True, slots=True)
class DynamicBatching:
    """How requests are put together, and in which order."""

    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    priority_levels: int = 0
    default_priority_level: int = 0
    policy: QueuePolicy = field(default_factory=QueuePolicy)


@dataclass(frozen=True, slots=True)
class VersionPolicy:
    """Which versions are served: the latest few, all, or those named."""

    kind: Literal["latest", "all", "specific"] = "latest"
    count: int = 1
    versions: tuple[int, ...] = ()

    def choose(self, present: Sequence[str]) -> tuple[str, ...]:
        """Return the versions to serve of those present, in ascending order."""
        ordered = sorted(present, key=int)
        if self.kind == "specific":
            wanted = set(self.versions)
            return tuple(version for version in ordered if int(version) in wanted)
        return tuple(ordered if self.kind == "all" else ordered[-self.count :])


@dataclass(frozen=True, slots=True)
class WarmupInput:
    """One input of a warm-up call, without the batch's dimension."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    random: bool


@dataclass(frozen=True, slots=True)
class Warmup:
    """Calls that a model answers before it is ready."""

    name: str
    batch_size: int
    inputs: tuple[WarmupInput, ...]
    count: int = 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a configuration says.

    Attributes:
        max_batch_size: 0 if the model's dimensions include whatever batch there is; None if nothing was said.
        replicas: Instances in all, None if nothing was said.
        ignored: Fields that were there and have no effect here, by path.
    """

    name: str = ""
    platform: str = ""
    backend: str = ""
    max_batch_size: int | None = None
    inputs: tuple[TensorConfig, ...] = ()
    outputs: tuple[TensorConfig, ...] = ()
    version_policy: VersionPolicy = field(default_factory=VersionPolicy)
    replicas: int | None = None
    batching: DynamicBatching | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    default_model_filename: str = ""
    warmup: tuple[Warmup, ...] = ()
    ignored: tuple[str, ...] = ()


def from_text(text: str) -> ModelConfig:
    """Read a ``config.pbtxt``.

    Raises:
        RequestError: It cannot be read, or a field is not as it should be.
    """
    return _Reader().model(text_format.parse(text))


def from_json(text: str | bytes) -> ModelConfig:
    """Read a configuration as JSON, with protobuf's field names or their form in lowerCamelCase.

    Raises:
        RequestError: It cannot be read, or a field is not as it should be.
    """
    if len(text) > MAX_JSON:
        raise RequestError(f"A configuration of {len(text)} bytes is more than the {MAX_JSON} that are read.")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The configuration is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise RequestError(f"The configuration is a JSON {type(data).__name__}, not an object.")
    return _Reader().model(_as_message(data, "", 0))


_MAPS = frozenset({"parameters", "inputs"})


def _as_message(data: Mapping[str, Any], path: str, depth: int) -> text_format.Message:
    """Bring JSON into the form that text format is read into: lists of values; maps as entries of key and value."""
    if depth > text_format.MAX_DEPTH:
        raise RequestError(f"The configuration nests more than {text_format.MAX_DEPTH} deep.")
    message: text_format.Message = {}
    for name, value in data.items():
        snake = "".join("_" + letter.lower() if letter.isupper() else letter for letter in name)
        if value is None:
            continue
        if snake in _MAPS and isinstance(value, dict):
            message[snake] = [
                {"key": [key], "value": [_as_value(item, f"{path}{snake}.{key}", depth + 1)]}
                for key, item in value.items()
            ]
            continue
        items = value if isinstance(value, list) else [value]
        message[snake] = [_as_value(item, f"{path}{snake}", depth + 1) for item in items]
    return message


def _as_value(value: Any, path: str, depth: int) -> Any:
    if isinstance(value, dict):
        return _as_message(value, path + ".", depth)
    if isinstance(value, bool | int | float | str):
        return value
    raise RequestError(f"The configuration's {path} is {value!r}, which is no value of one.")


class _Reader:
    """Reads messages field by field, and remembers which fields nobody asked for."""

    def __init__(self) -> None:
        self._ignored: list[str] = []

    def model(self, message: text_format.Message) -> ModelConfig:
        fields = _Fields(message, "", self._ignored)
        config = ModelConfig(
            name=fields.text("name"),
            platform=fields.text("platform"),
            backend=fields.text("backend"),
            max_batch_size=fields.number("max_batch_size", None, 0, MAX_BATCH),
            inputs=fields.each("input", self._tensor),
            outputs=fields.each("output", self._tensor),
            version_policy=fields.one("version_policy", self._versions) or VersionPolicy(),
            replicas=self._replicas(fields),
            batching=fields.one("dynamic_batching", self._batching),
            parameters=dict(fields.each("parameters", self._parameter)),
            default_model_filename=fields.text("default_model_filename"),
            warmup=fields.each("model_warmup", self._warmup),
        )
        fields.ignore_rest()
        _check(config)
        return replace(config, ignored=tuple(dict.fromkeys(self._ignored)))

    def _tensor(self, fields: _Fields) -> TensorConfig:
        reshape = fields.one("reshape", lambda inner: inner.numbers("shape", -1))
        return TensorConfig(fields.text("name"), fields.datatype("data_type"), fields.numbers("dims", -1), reshape)

    def _versions(self, fields: _Fields) -> VersionPolicy:
        found = [
            fields.one(
                "latest", lambda inner: VersionPolicy("latest", inner.number("num_versions", 1, 1, 1 << 31) or 1)
            ),
            fields.one("all", lambda inner: VersionPolicy("all")),
            fields.one("specific", lambda inner: VersionPolicy("specific", 1, inner.numbers("versions", 1))),
        ]
        policies = [policy for policy in found if policy is not None]
        if len(policies) > 1:
            raise RequestError("The configuration's version_policy says more than one of latest, all and specific.")
        return policies[0] if policies else VersionPolicy()

    def _replicas(self, fields: _Fields) -> int | None:
        """Sum the instances of all groups; where they run is the artifact's own affair."""
        counts = fields.each("instance_group", lambda group: group.number("count", 1, 1, MAX_INSTANCES) or 1)
        if not counts:
            return None
        if sum(counts) > MAX_INSTANCES:
            raise RequestError(f"The configuration asks for {sum(counts)} instances; {MAX_INSTANCES} is the most.")
        return sum(counts)

    def _batching(self, fields: _Fields) -> DynamicBatching:
        levels = fields.number("priority_levels", 0, 0, MAX_PRIORITIES) or 0
        default = fields.number("default_priority_level", 0, 0, MAX_PRIORITIES) or 0
        if levels and not 1 <= default <= levels:
            raise RequestError(
                f"The configuration's default_priority_level is {default}; with {levels} levels it must be from "
                f"1 to {levels}."
            )
        return DynamicBatching(
            preferred_batch_sizes=fields.numbers("preferred_batch_size", 1),
            max_queue_delay_us=fields.number("max_queue_delay_microseconds", 0, 0, 10**9) or 0,
            priority_levels=levels,
            default_priority_level=default,
            policy=fields.one("default_queue_policy", self._policy) or QueuePolicy(),
        )

    def _policy(self, fields: _Fields) -> QueuePolicy:
        action = fields.word("timeout_action", "REJECT", ("REJECT", "DELAY"))
        return QueuePolicy(
            timeout_us=fields.number("default_timeout_microseconds", 0, 0, 10**12) or 0,
            delay=action == "DELAY",
            # Protobuf's default: unless it says so, requests cannot change it.
            allow_timeout_override=fields.flag("allow_timeout_override", False),
            max_queue_size=fields.number("max_queue_size", 0, 0, MAX_QUEUE) or 0,
        )

    def _parameter(self, fields: _Fields) -> tuple[str, str]:
        value = fields.one("value", lambda inner: inner.text("string_value"))
        return fields.text("key"), value or ""

    def _warmup(self, fields: _Fields) -> Warmup:
        pairs = fields.each("inputs", lambda entry: (entry.text("key"), entry.one("value", self._warmup_input)))
        inputs = tuple(
            WarmupInput(name, found[0], found[1], found[2]) for name, found in pairs if found is not None and name
        )
        return Warmup(
            fields.text("name"),
            fields.number("batch_size", 0, 0, MAX_BATCH) or 0,
            inputs,
            max(1, fields.number("count", 0, 0, 10_000) or 0),
        )

    def _warmup_input(self, fields: _Fields) -> tuple[str, tuple[int, ...], bool]:
        random = fields.flag("random_data", False)
        fields.flag("zero_data", False)
        return fields.datatype("data_type"), fields.numbers("dims", 1), random


class _Fields:
    """The fields of one message; each is taken once, and what is left was not known."""

    def __init__(self, message: text_format.Message, path: str, ignored: list[str]) -> None:
        self._left, self._path, self._ignored = dict(message), path, ignored

    def ignore_rest(self) -> None:
        self._ignored.extend(self._path + name for name in self._left)

    def text(self, name: str) -> str:
        value = self._single(name)
        if value is None:
            return ""
        if not isinstance(value, str) or isinstance(value, text_format.Word):
            raise self._wrong(name, value, "text")
        return value

    def word(self, name: str, default: str, known: Sequence[str]) -> str:
        value = self._single(name)
        if value is None:
            return default
        if type(value) is int and 0 <= value < len(known):  # as JSON may write them
            return known[value]
        if not isinstance(value, str) or value not in known:
            raise self._wrong(name, value, f"one of {', '.join(known)}")
        return str(value)

    def datatype(self, name: str) -> str:
        value = self._single(name)
        if value is None:
            return ""
        # In configurations BYTES is called STRING, and all begin with TYPE_.
        known = str(value).removeprefix("TYPE_").replace("STRING", "BYTES")
        if not isinstance(value, str) or known not in DTYPES:
            raise self._wrong(name, value, f"one of {', '.join('TYPE_' + each for each in DTYPES)}")
        return DTYPES[known]

    def flag(self, name: str, default: bool) -> bool:
        value = self._single(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def number(self, name: str, default: int | None, least: int, most: int) -> int | None:
        value = self._single(name)
        return default if value is None else self._whole(name, value, least, most)

    def numbers(self, name: str, least: int) -> tuple[int, ...]:
        return tuple(self._whole(name, value, least, 1 << 62) for value in self._left.pop(name, ()))

    def one(self, name: str, read: Callable[[_Fields], T]) -> T | None:
        value = self._single(name)
        return None if value is None else self._read(name, value, read)

    def each(self, name: str, read: Callable[[_Fields], T]) -> tuple[T, ...]:
        return tuple(self._read(name, value, read) for value in self._left.pop(name, ()))

    def _read(self, name: str, value: Any, read: Callable[[_Fields], T]) -> T:
        if not isinstance(value, dict):
            raise self._wrong(name, value, "a message")
        inner = _Fields(value, f"{self._path}{name}.", self._ignored)
        result = read(inner)
        inner.ignore_rest()
        return result

    def _single(self, name: str) -> Any:
        values = self._left.pop(name, ())
        if len(values) > 1:
            raise RequestError(f"The configuration has {self._path}{name} {len(values)} times; once is allowed.")
        return values[0] if values else None

    def _whole(self, name: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, str) and not isinstance(value, text_format.Word) and _is_whole(value):
            value = int(value)  # JSON writes 64 bits as text
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def _wrong(self, name: str, value: Any, wanted: str) -> RequestError:
        return RequestError(f"The configuration's {self._path}{name} is {str(value)[:80]!r}, not {wanted}.")


def _is_whole(text: str) -> bool:
    return len(text) <= 20 and text.isascii() and text.removeprefix("-").isdecimal()


def _check(config: ModelConfig) -> None:
    for side, tensors in (("input", config.inputs), ("output", config.outputs)):
        names = [tensor.name for tensor in tensors]
        if "" in names or len(set(names)) < len(names):
            raise RequestError(f"The configuration has an {side} without a name, or two of one name.")
    filename = config.default_model_filename
    if "/" in filename or "\\" in filename or filename in (".", "..") or "\0" in filename:
        raise RequestError(f"The configuration's default_model_filename is {filename!r}, which is no plain file name.")
