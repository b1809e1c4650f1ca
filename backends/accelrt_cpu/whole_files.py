"""What the engines of whole sources share: whether a framework is there and works."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

from accelrt import isolation
from accelrt.backend import Status
from accelrt.errors import AccelrtError

PROBE_S = 180.0


def status_of(package: str, probe: str, remedy: str) -> Status:
    """Return whether a package is there and, as a child process sees it, works."""
    try:
        found = find_spec(package) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        return Status(False, reason=f"{package} is not installed", remedy=remedy)
    version, problem = _probe(probe)
    if problem is not None:
        return Status(False, reason=f"{package} does not work here: {problem}", remedy=remedy)
    return Status(True, version=version)


@cache
def _probe(function: str) -> tuple[str | None, str | None]:
    """Return the version that a probe found, or its problem; asked once a process."""
    try:
        return isolation.call(function, timeout_s=PROBE_S), None
    except (AccelrtError, OSError) as error:
        return None, str(error)
