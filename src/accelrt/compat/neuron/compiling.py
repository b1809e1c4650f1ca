"""Compile for what ``ACCELRT_BACKEND`` says, with what a vendor's arguments ask for; and the vendor's errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import accelrt
from accelrt.compat.neuron.flags import Flags
from accelrt.errors import AccelrtError, ConversionError, OptionError
from accelrt.registry import REGISTRY, Candidate
from accelrt.target import AUTO, requested

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact

logger = logging.getLogger("accelrt")

NEURON = "neuron"
_NOTED: set[str] = set()


def note_once(text: str) -> None:
    """Log a text as a warning, the first time in this process."""
    if text not in _NOTED:
        _NOTED.add(text)
        logger.warning("%s", text)


def note_ignored(arguments: Mapping[str, Any]) -> None:
    """Say once of each argument that was given, by its name, that it means nothing here."""
    for name, value in arguments.items():
        if value:
            note_once(f"The argument {name!r} means nothing on {_target_text()} and has no effect.")


@contextlib.contextmanager
def vendors_errors() -> Iterator[None]:
    """Let errors of accelrt leave as those that the vendor's functions document: ValueError or RuntimeError.

    The error of accelrt, with its hint, is the cause.
    """
    try:
        yield
    except OptionError as error:
        raise ValueError(str(error)) from error
    except AccelrtError as error:
        raise RuntimeError(str(error)) from error


def first_candidate() -> Candidate | None:
    """Return the engine that is asked for; None if accelrt is to choose."""
    target = requested(None)
    return None if str(target) == AUTO else REGISTRY.candidates(target)[0]


def build(
    models: Sequence[Any],
    examples: Any,
    flags: Flags,
    *,
    fallback: str = "warn",
    input_names: Sequence[str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Artifact:
    """Compile the first of several forms of a model that converts.

    Flags count on the backend ``neuron``: elsewhere engines compute in their own default. Options go to the engine if
    it has them; the others are named once in the log.

    Raises:
        AccelrtError: Whatever `accelrt.compile` raises.
    """
    candidate = first_candidate()
    known = set() if candidate is None else {one.name for one in fields(candidate.engine.options)}
    for_neuron = candidate is not None and candidate.backend.name == NEURON
    wanted = {**(flags.options if for_neuron else {}), **(options or {})}
    taken = {name: value for name, value in wanted.items() if name in known or name == "min_segment_nodes"}
    unused = sorted({*wanted} - {*taken})
    ignored = [*flags.rest, *(f"{name}={wanted[name]}" for name in unused)]
    if not for_neuron and flags.options:
        ignored += [f"{name}={value}" for name, value in flags.options.items()]
    if ignored:
        note_once(f"Of the compiler's arguments, these have no effect on {_target_text()}: {', '.join(ignored)}.")
    failure: ConversionError | None = None
    for model in models:
        try:
            return accelrt.compile(
                model() if isinstance(model, Later) else model,
                example_inputs=examples,
                fallback=fallback,
                input_names=input_names,
                options=taken or None,
                precision=flags.precision if for_neuron else None,
            )
        except ConversionError as error:
            failure = failure or error
    assert failure is not None  # there is at least one model
    raise failure


class Later:
    """A form of a model that is made only when the ones before did not convert."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self) -> Any:
        return self._make()


def share_on_target(artifact: Artifact) -> float:
    """Return the share of nodes on the engine that was asked for; 1 where the model runs whole or has none."""
    placement = artifact.placement
    counts = placement.nodes_by_engine
    total = sum(counts.values())
    return 1.0 if placement.whole is not None or not total else counts.get(placement.primary, 0) / total


def _target_text() -> str:
    return str(requested(None))
