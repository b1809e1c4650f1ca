"""Find an earlier choice without reading the model: by the file's stamp instead of its contents.

Reading and hashing a model of 100 MB takes longer than all else that a second ``auto`` does. A file that has the size,
inode and times it had then is taken for the same. This holds for one file that has no weights outside, and arguments
that can be hashed as they are; everything else takes the long way, which finds the same choice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Cache
from accelrt.partition.report import apply_policy
from accelrt.tune.machine import fingerprint

if TYPE_CHECKING:
    from accelrt.sources.request import SourceRequest
    from accelrt.tune.wishes import Wishes


class _Unknown(Exception):
    """An argument that says nothing about its contents."""


def shortcut_key(model: Any, request: SourceRequest, options: Mapping[str, Any] | None, wishes: Wishes) -> str | None:
    """Return a name for a model's file as it is now with all arguments of a call; None where there can be none."""
    if not isinstance(model, str | os.PathLike) or not wishes.cache or wishes.profile is not None:
        return None
    arguments = {"options": options}
    arguments |= {field.name: getattr(wishes, field.name) for field in fields(wishes) if field.name != "progress"}
    arguments |= {field.name: getattr(request, field.name) for field in fields(request) if field.name != "options"}
    try:
        path = Path(model).resolve()
        status = path.stat()
        if not path.is_file():
            return None
        digest = hashlib.sha256()
        stamp = [str(path), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        digest.update(json.dumps([stamp, fingerprint()], sort_keys=True).encode())
        for part in _parts(arguments):
            digest.update(part)
    except (_Unknown, OSError, ValueError):
        return None
    return digest.hexdigest()


def find(key: str, wishes: Wishes) -> Artifact | None:
    """Return what was chosen earlier under this name."""
    if (entry := Cache().find_compiled(key)) is None:
        return None
    artifact = Artifact(entry)
    apply_policy(artifact.placement, wishes.fallback)
    return artifact


def _parts(value: Any) -> Iterator[bytes]:
    """Yield what tells a value from others; each part says how long it is, so that no two values read alike."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        yield f"array {value.dtype}{value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for name in sorted(value, key=repr):
            yield from _parts(name)
            yield from _parts(value[name])
    elif isinstance(value, list | tuple):
        yield f"{type(value).__name__} {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif value is None or isinstance(value, bool | int | float | str):
        text = repr(value).encode()
        yield f"{type(value).__name__} {len(text)} ".encode() + text
    else:
        raise _Unknown
