"""Options by name: each belongs to the sources, to the partitioner or to engines; one that nobody knows is an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from accelrt.errors import OptionError
from accelrt.registry import Candidate
from accelrt.sources.request import SourceOptions


@dataclass(frozen=True, slots=True)
class PartitionOptions:
    """Options of the partitioner.

    Attributes:
        min_segment_nodes: Segments of fewer nodes return to a later engine where one supports them.
    """

    min_segment_nodes: int = 1

    def __post_init__(self) -> None:
        if self.min_segment_nodes < 1:
            raise OptionError(f"min_segment_nodes must be 1 or more, not {self.min_segment_nodes}.")


@dataclass(frozen=True, slots=True)
class Options:
    """All options of one compile; ``engines`` has one entry a candidate."""

    source: SourceOptions = field(default_factory=SourceOptions)
    partition: PartitionOptions = field(default_factory=PartitionOptions)
    engines: tuple[Any, ...] = ()


def resolve(given: Mapping[str, Any] | None, candidates: Sequence[Candidate]) -> Options:
    """Hand each option to whoever knows it.

    A plain name goes to every engine that has it; ``engine.name`` to that engine alone.

    Raises:
        OptionError: Nobody knows an option, or a value has the wrong type or is out of range.
    """
    pending = dict(given or {})
    used: set[str] = set()

    def build(cls: type, scope: str | None) -> Any:
        values: dict[str, Any] = {}
        for known in fields(cls):
            for key in (known.name, f"{scope}.{known.name}") if scope else (known.name,):
                if key in pending:
                    values[known.name] = _checked(key, pending[key], cls, known.name)
                    used.add(key)
        return cls(**values)

    engines = tuple(build(candidate.engine.options, candidate.engine.name) for candidate in candidates)
    options = Options(build(SourceOptions, None), build(PartitionOptions, None), engines)
    if unknown := sorted(set(pending) - used):
        raise OptionError(_unknown(unknown[0], candidates))
    return options


def take(cls: type, given: Mapping[str, Any] | None) -> tuple[Any, dict[str, Any]]:
    """Return an instance of ``cls`` made of the options that it knows, and the others.

    Raises:
        OptionError: A value has the wrong type or is out of range.
    """
    names = {known.name for known in fields(cls)}
    pending = dict(given or {})
    taken = {name: _checked(name, pending.pop(name), cls, name) for name in names & set(pending)}
    return cls(**taken), pending


def one_core_each(options: Options) -> Options:
    """Return the options of a pipeline: engines that would share each operator among all cores use one core.

    By custom that is the option ``threads``, 0 for all cores; a number that was given stays.
    """
    engines = tuple(
        replace(engine, threads=1) if getattr(engine, "threads", None) == 0 else engine for engine in options.engines
    )
    return replace(options, engines=engines)


@cache  # a server that loads models as they are asked for would spend a third of a load on evaluating annotations
def _hints(cls: type) -> Mapping[str, Any]:
    return get_type_hints(cls)


def _checked(key: str, value: Any, cls: type, name: str) -> Any:
    """Check a value against its field's annotation, as far as that names plain classes."""
    hint = _hints(cls)[name]
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if Any in kinds or not all(isinstance(kind, type) for kind in kinds):  # `Any` is a class, and says nothing
        return value
    if type(value) in kinds or (float in kinds and type(value) is int):
        return value
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    raise OptionError(f"The option {key!r} takes {wanted}, not {value!r} ({type(value).__name__}).")


def _unknown(key: str, candidates: Sequence[Candidate]) -> str:
    known = {f.name for cls in (SourceOptions, PartitionOptions) for f in fields(cls)}
    for candidate in candidates:
        names = {f.name for f in fields(candidate.engine.options)}
        known |= names | {f"{candidate.engine.name}.{name}" for name in names}
    close = difflib.get_close_matches(key, known, 1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    plain = ", ".join(sorted(name for name in known if "." not in name))
    return f"No option is named {key!r} for {', '.join(c.name for c in candidates)}.{guess} Known: {plain}."


def from_json(cls: type, data: Mapping[str, Any]) -> Any:
    """Rebuild an engine's options from an artifact.

    Raises:
        OptionError: The artifact holds an option that this engine does not know, or a value of the wrong type.
    """
    try:
        known = {known.name for known in fields(cls)}
        return cls(**{key: _checked(key, value, cls, key) if key in known else value for key, value in data.items()})
    except (TypeError, AttributeError) as error:
        raise OptionError(f"The artifact holds options that {cls.__name__} does not know: {error}.") from error
