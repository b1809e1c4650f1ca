"""Timings of kernels, kept from build to build: one file for each version of TensorRT and kind of device.

A build reads the file, and adds to what is there when it is done: builds side by side lose nothing of each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def folder() -> Path:
    """Return where the files lie: in accelrt's cache, ``$ACCELRT_CACHE_DIR`` or the user's own.

    Raises:
        RuntimeError: There is no home folder, and no variable names another.
    """
    if own := os.environ.get("ACCELRT_CACHE_DIR"):
        return Path(own).expanduser() / "tensorrt"
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "accelrt" / "tensorrt"
    return Path.home() / ".cache" / "accelrt" / "tensorrt"


def file_for(version: str, device: str, compute_capability: str) -> str:
    """Return the name of the file for a version of TensorRT and a kind of device."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"timing-{version}-{device}-{compute_capability}") + ".cache"


def attach(config: Any, path: Path) -> Any:
    """Give a builder's config the timings of a file, or a new cache where there are none that it takes."""
    stored = b""
    with contextlib.suppress(OSError):
        stored = path.read_bytes()
    if stored and (cache := _made(config, stored)) is not None and config.set_timing_cache(cache, False):
        return cache
    if (cache := _made(config, b"")) is not None:
        config.set_timing_cache(cache, False)
    return cache


def _made(config: Any, data: bytes) -> Any:
    try:
        return config.create_timing_cache(data)
    except (TypeError, RuntimeError):  # pybind11 where TensorRT makes none, as of a file that is cut short
        return None


def keep(config: Any, cache: Any, path: Path) -> None:
    """Add the timings of a build to a file. A file that cannot be written is left: it only saves time.

    The file is replaced by one under a temporary name, so that a reader sees all of it or the one before.
    """
    if cache is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            with contextlib.suppress(OSError):
                if (others := _made(config, path.read_bytes())) is not None:
                    cache.combine(others, False)
            data = cache.serialize()
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                file.write(data)
            Path(file.name).replace(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
