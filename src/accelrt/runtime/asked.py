"""What a call of `accelrt.load` asks for: devices, copies, calls in flight."""

from __future__ import annotations

from dataclasses import dataclass

from accelrt.artifact.manifest import Manifest
from accelrt.cores import MOST_CORES, Group
from accelrt.errors import CorruptArtifact, OptionError

MOST_WORKERS = 1024
"""Threads that one session may have."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call of `accelrt.load` asks for; None means "you choose".

    Attributes:
        groups: Devices of the artifact's backend.
        backend: The backend that these were said to be of.
        replicas: Copies of the model.
        workers: Calls in flight.

    Raises:
        OptionError: A number is out of its range.
    """

    groups: tuple[Group, ...] | None = None
    backend: str | None = None
    replicas: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        for name, value, most in (("replicas", self.replicas, MOST_CORES), ("workers", self.workers, MOST_WORKERS)):
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise OptionError(f"{name} must be a whole number from 1 to {most}, not {value!r}.")

    @property
    def explicit(self) -> bool:
        """Whether devices or copies were asked for by number, so that nothing else will do."""
        return self.groups is not None or self.replicas is not None


def workers_of(asked: Asked, manifest: Manifest) -> int | None:
    """Return how many calls are to be in flight by the caller, else by the artifact's manifest; None if neither says.

    Raises:
        CorruptArtifact: The manifest's is no such number.
    """
    recorded = manifest.options.get("workers")
    if asked.workers is not None or recorded is None:
        return asked.workers
    if type(recorded) is not int or not 1 <= recorded <= MOST_WORKERS:
        raise CorruptArtifact(
            f"The manifest's option 'workers' is {recorded!r}, not a number from 1 to {MOST_WORKERS}."
        )
    return recorded
