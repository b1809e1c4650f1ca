"""The cache folder: artifacts unpacked under their identity, found again by what they were compiled from.

::

    <cache>/artifacts/<identity>/     an unpacked artifact and its stamp; never changed once it is there
    <cache>/compiled/<key>            the identity of the artifact that a compile of <key> gave
    <cache>/locks/<key>               held while <key> is compiled
    <cache>/work/                     unfinished folders

The identity is the SHA-256 of the manifest, which holds the SHA-256 of every other file. A folder is finished under
``work`` and renamed into place, so that a reader sees all of it or nothing. Several processes may share a cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from accelrt.artifact.manifest import MANIFEST, Manifest
from accelrt.artifact.store import check_files
from accelrt.errors import ArtifactError, CorruptArtifact, OptionError

logger = logging.getLogger("accelrt")

DEFAULT_SIZE = 20 << 30
_STAMP = ".stamp"
_ABANDONED_S = 24 * 3600.0


def cache_folder() -> Path:
    """Return ``$ACCELRT_CACHE_DIR``, else ``$XDG_CACHE_HOME/accelrt``, else ``~/.cache/accelrt``."""
    if own := os.environ.get("ACCELRT_CACHE_DIR"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "accelrt"
    return Path.home() / ".cache" / "accelrt"


def cache_limit() -> int:
    """Return the bound on the cache in bytes: ``$ACCELRT_CACHE_SIZE`` (bytes), else 20 GiB.

    Raises:
        OptionError: The variable holds no number.
    """
    text = os.environ.get("ACCELRT_CACHE_SIZE")
    if text is None:
        return DEFAULT_SIZE
    if not text.strip().isdecimal():
        raise OptionError(f"ACCELRT_CACHE_SIZE holds {text!r}; it takes a number of bytes.")
    return int(text)


class Entry:
    """An unpacked artifact in use. While it is referred to, the cache does not evict it."""

    def __init__(self, folder: Path, manifest: Manifest, *, temporary: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        if temporary:
            self._release = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        else:
            descriptor = os.open(folder / _STAMP, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            self._release = weakref.finalize(self, os.close, descriptor)


class Cache:
    """One cache folder.

    Args:
        folder: Where; created, readable by its owner only, when something is stored.
        limit: Bytes above which the least recently used artifacts are removed.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or cache_folder()
        self._limit = cache_limit() if limit is None else limit

    def find(self, identity: str) -> Entry | None:
        """Return an artifact by identity; None if it is not there or was found altered and has been removed."""
        folder = self.folder / "artifacts" / identity
        try:
            manifest_bytes = (folder / MANIFEST).read_bytes()
            stamped = json.loads((folder / _STAMP).read_bytes())
        except (OSError, ValueError):
            return None
        manifest = Manifest.parse(manifest_bytes)
        try:
            if stamped != _stamp(folder, manifest):
                # Something touched the files since they were verified: trust nothing but their hashes.
                check_files(folder, manifest, identity)
                _write_atomically(folder / _STAMP, json.dumps(_stamp(folder, manifest)).encode())
            entry = Entry(folder, manifest)
            os.utime(folder / _STAMP)
        except (OSError, CorruptArtifact) as error:
            logger.warning("The cache entry %s was damaged and is removed: %s", identity[:12], error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return entry

    def find_compiled(self, key: str) -> Entry | None:
        """Return what a compile of ``key`` gave, if it is still there."""
        try:
            identity = (self.folder / "compiled" / key).read_text()
        except OSError:
            return None
        return self.find(identity)

    def work_folder(self) -> Path:
        """Return a new empty folder on the cache's file system."""
        work = self.folder / "work"
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=work))

    def discard(self, work: Path) -> None:
        """Remove an unfinished folder."""
        shutil.rmtree(work, ignore_errors=True)

    def adopt(self, work: Path, manifest: Manifest, identity: str, key: str | None = None) -> Entry:
        """Move a finished and verified folder into the cache; an equal one that is already there wins."""
        (work / _STAMP).write_text(json.dumps(_stamp(work, manifest)))
        folder = self.folder / "artifacts" / identity
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            work.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(work, ignore_errors=True)
        if key is not None:
            (self.folder / "compiled").mkdir(mode=0o700, exist_ok=True)
            _write_atomically(self.folder / "compiled" / key, identity.encode())
        entry = self.find(identity)
        if entry is None:
            raise ArtifactError(f"The cache at {self.folder} lost the entry {identity[:12]} at once.")
        self.trim()
        return entry

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of ``key`` across processes."""
        locks = self.folder / "locks"
        locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (locks / key).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def trim(self) -> None:
        """Remove the least recently used artifacts that nobody holds, until the cache is within its limit."""
        entries = []
        for folder in (self.folder / "artifacts").iterdir():
            with contextlib.suppress(OSError):
                size = sum(file.stat().st_size for file in folder.iterdir())
                entries.append(((folder / _STAMP).stat().st_mtime_ns, size, folder))
        for abandoned in (self.folder / "work").iterdir():
            with contextlib.suppress(OSError):
                if time.time() - abandoned.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(abandoned, ignore_errors=True)
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= self._limit:
                return
            if _remove_unused(folder):
                total -= size


def _remove_unused(folder: Path) -> bool:
    """Remove an entry unless some process holds it; its stamp goes first, so that nobody finds it half removed."""
    try:
        with (folder / _STAMP).open() as stamp:
            fcntl.flock(stamp, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / _STAMP).unlink()
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return False
    return True


def _stamp(folder: Path, manifest: Manifest) -> dict[str, list[int]]:
    """What tells cheaply that files are as they were when they were verified."""
    stamp = {}
    for name in sorted((*manifest.files, MANIFEST)):
        status = (folder / name).stat()
        stamp[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return stamp


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
