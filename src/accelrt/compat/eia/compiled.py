"""Models compiled once a process, however many predictors are made of them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact

MOST = 32
"""Artifacts that are remembered; the one that was not asked for the longest time is forgotten first."""


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.artifact: Artifact | None = None


_LOCK = threading.Lock()
_SLOTS: OrderedDict[Hashable, _Slot] = OrderedDict()


def once(key: Hashable, compile_: Callable[[], Artifact]) -> Artifact:
    """Return the artifact of a key, compiling it where nobody has; threads that ask meanwhile wait for it.

    A failure is not remembered: who asks next tries again.
    """
    with _LOCK:
        slot = _SLOTS.setdefault(key, _Slot())
        _SLOTS.move_to_end(key)
        while len(_SLOTS) > MOST:
            _SLOTS.popitem(last=False)
    with slot.lock:
        if slot.artifact is None:
            slot.artifact = compile_()
        return slot.artifact


def stamp(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether a file, or the files of a folder, have changed: names, sizes and times."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return tuple((str(one.relative_to(path)), (s := one.stat()).st_size, s.st_mtime_ns) for one in files)
