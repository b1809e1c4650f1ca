"""Which target a script for Elastic Inference computes on, and which device the ordinal of an accelerator means."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import accelrt
from accelrt.target import parse, requested

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.runtime.session import Session

logger = logging.getLogger("accelrt")

HOST = "cpu"
"""What ``use_ei=False`` computes on."""
EIA = "eia"

_NOTED: set[str] = set()


def note_once(text: str) -> None:
    """Log a text as a warning, the first time in this process."""
    if text not in _NOTED:
        _NOTED.add(text)
        logger.warning("%s", text)


def target_of(use_ei: bool) -> str:
    """Return the target of a model: what ``ACCELRT_BACKEND`` says, or the host's CPU."""
    return str(requested(None)) if use_ei else HOST


def check_ordinal(value: Any, name: str) -> int:
    """Return the ordinal of an accelerator.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is less than 0.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is the ordinal of an accelerator, a number from 0 on, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} is the ordinal of an accelerator, a number from 0 on, not {value}")
    return value


def load(artifact: Artifact, ordinal: int | None) -> Session:
    """Load an artifact; on the backend ``eia`` an ordinal is the index of a device, elsewhere it has no meaning.

    Raises:
        CoresUnavailable: There is no such accelerator.
    """
    name = parse(artifact.manifest.target).backend
    if ordinal and name != EIA:
        note_once(f"The accelerator {ordinal} that was asked for has no counterpart on {artifact.manifest.target}.")
    if ordinal is None or name != EIA:
        return accelrt.load(artifact)
    return accelrt.load(artifact, devices=[ordinal])
