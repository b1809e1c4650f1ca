"""What the engines of whole sources share: keep a source among a program's files without a second copy."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from accelrt import isolation
from accelrt.backend import Status
from accelrt.errors import AccelrtError

PROBE_S = 180.0


def keep(source: Path, out: Path) -> Path:
    """Put a source into a program's folder: as a link to the same bytes where the file system can."""
    target = out / source.name
    with contextlib.suppress(OSError):
        os.link(source, target)
        return target
    shutil.copyfile(source, target)
    return target


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


def first_line(error: BaseException, describe: Callable[[BaseException], str] = str) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip() for line in describe(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__
