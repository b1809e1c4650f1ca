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
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from accelrt.artifact.manifest import MANIFEST, Manifest
from accelrt.artifact.store import check_files
from accelrt.errors import ArtifactError, OptionError

logger = logging.getLogger("accelrt")

DEFAULT_SIZE = 20 << 30
_STAMP = ".stamp"
_IDENTITY = re.compile(r"[0-9a-f]{64}", re.ASCII)
_ABANDONED_S = 24 * 3600.0


def cache_folder() -> Path:
    """Return ``$ACCELRT_CACHE_DIR``, else ``$XDG_CACHE_HOME/accelrt``, else ``~/.cache/accelrt``.

    Raises:
        OptionError: There is no home folder, and no variable names another.
    """
    try:
        if own := os.environ.get("ACCELRT_CACHE_DIR"):
            return Path(own).expanduser()
        if shared := os.environ.get("XDG_CACHE_HOME"):
            return Path(shared).expanduser() / "accelrt"
        return Path.home() / ".cache" / "accelrt"
    except RuntimeError as error:
        raise OptionError(f"There is no folder for the cache: {error}", hint="Set ACCELRT_CACHE_DIR.") from error


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
    """An unpacked artifact in use. While it is referred to, the cache does not evict it.

    A ``temporary`` one goes when nobody refers to it; an ``unfinished`` one is still being made by who refers to it.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, temporary: bool = False, unfinished: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        if unfinished:
            return
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        else:
            descriptor = os.open(folder / _STAMP, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            weakref.finalize(self, os.close, descriptor)


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
        if not _IDENTITY.fullmatch(identity):
            return None
        try:
            if not folder.exists():
                return None
            manifest = Manifest.parse((folder / MANIFEST).read_bytes())
            if _read_stamp(folder) != _stamp(folder, manifest):
                # Something touched the files since they were verified: trust nothing but their hashes.
                check_files(folder, manifest, identity)
                _write_atomically(folder / _STAMP, json.dumps(_stamp(folder, manifest)).encode())
            entry = Entry(folder, manifest)
            os.utime(folder / _STAMP)
        except (OSError, ArtifactError) as error:
            logger.warning("The cache entry %s was damaged and is removed: %s", identity[:12], error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return entry

    def find_compiled(self, key: str) -> Entry | None:
        """Return what a compile of ``key`` gave, if it is still there."""
        try:
            identity = (self.folder / "compiled" / key).read_bytes()
        except OSError:
            return None
        return self.find(identity.decode("ascii", "replace"))

    def remember(self, key: str, identity: str) -> None:
        """Let another key lead to an artifact that is there already."""
        try:
            _write_atomically(self.folder / "compiled" / key, identity.encode())
        except OSError as error:  # it will be found by its first key alone
            logger.warning("The cache at %s is not in order: %s", self.folder, error)

    def work_folder(self) -> Path:
        """Return a new empty folder on the cache's file system."""
        work = self.folder / "work"
        work.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=work))

    def discard(self, work: Path) -> None:
        """Remove an unfinished folder."""
        shutil.rmtree(work, ignore_errors=True)

    def adopt(self, work: Path, manifest: Manifest, identity: str, key: str | None = None) -> Entry:
        """Move a finished and verified folder into the cache; an equal one that is already there wins.

        Raises:
            OSError: The cache cannot be written; ``work`` may still be there.
        """
        (work / _STAMP).write_text(json.dumps(_stamp(work, manifest)))
        entry = self._settle(work, manifest, identity)
        try:
            if key is not None:
                (self.folder / "compiled").mkdir(mode=0o700, exist_ok=True)
                _write_atomically(self.folder / "compiled" / key, identity.encode())
            self.trim()
        except OSError as error:  # the entry is there; it will not be found by key, or be more than it should
            logger.warning("The cache at %s is not in order: %s", self.folder, error)
        return entry

    def _settle(self, work: Path, manifest: Manifest, identity: str) -> Entry:
        folder = self.folder / "artifacts" / identity
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry = Entry(work, manifest)  # held before others can see it, so that none evicts it
        try:
            work.rename(folder)
        except OSError:
            # Another process was faster, or what is there is damaged, in which case looking at it removes it.
            if (other := self.find(identity)) is not None:
                shutil.rmtree(work, ignore_errors=True)
                return other
            work.rename(folder)
        entry.folder = folder
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
        before = total
        for _, size, folder in sorted(entries):
            if total > self._limit and self._remove_unused(folder):
                total -= size
        if total < before:
            self._forget_compiled()

    def _forget_compiled(self) -> None:
        """Remove the keys whose artifacts are gone."""
        for key in (self.folder / "compiled").iterdir():
            with contextlib.suppress(OSError):
                if not (self.folder / "artifacts" / key.read_text("ascii", "replace")).exists():
                    key.unlink()

    def _remove_unused(self, folder: Path) -> bool:
        """Remove an entry unless some process holds it; moved away first, so that nobody finds it half removed."""
        try:
            with (folder / _STAMP).open() as stamp:
                fcntl.flock(stamp, fcntl.LOCK_EX | fcntl.LOCK_NB)
                away = self.work_folder()
                folder.rename(away / folder.name)
        except OSError:
            return False
        shutil.rmtree(away, ignore_errors=True)
        return True


def _read_stamp(folder: Path) -> object:
    try:
        return json.loads((folder / _STAMP).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _stamp(folder: Path, manifest: Manifest) -> dict[str, list[int]]:
    """What tells cheaply that files are as they were when they were verified."""
    stamp = {}
    for name in sorted((*manifest.files, MANIFEST)):
        status = (folder / name).stat()
        stamp[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return stamp


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
