"""Files that come with a load request: kept in private temporary folders, equal ones once."""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

from accelrt.errors import ModelUnavailable, RequestError, RequestTooLarge
from accelrt.serve.models.repository import is_version

MAX_FILES = 1024
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_IS_FULL = "No space left on the server's disk."

_LOCK = threading.RLock()  # a folder may be dropped by the garbage collector while this thread holds it
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", re.ASCII)


class Uploads:
    """Keeps uploaded files by their SHA-256 while a model uses them.

    Args:
        limit: Bytes that one request may bring.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._folder: Path | None = None

    def keep(self, files: Mapping[str, bytes]) -> UploadedFiles:
        """Write the files of one request, named ``file:<version>/<name>``.

        Raises:
            RequestTooLarge: They are more or larger than allowed.
            RequestError: A name is none that a model's file may have.
            ModelUnavailable: They cannot be written: the disk is full. Nothing of them is left.
        """
        size = sum(map(len, files.values()))
        if size > self._limit or len(files) > MAX_FILES:
            raise RequestTooLarge(
                f"A load request with {len(files)} files of {size} bytes in all is refused; {MAX_FILES} files of "
                f"{self._limit} bytes are the most."
            )
        targets = {key: _place(key) for key in files}
        if len(set(targets.values())) < len(targets):
            raise RequestError("A load request names a file twice.")
        try:
            return self._written(files, targets)
        except OSError as error:
            why = DISK_IS_FULL if error.errno in DISK_FULL else f"{error.strerror}."
            unavailable = ModelUnavailable(
                f"The files of a load request ({size} bytes) cannot be kept: {why}", hint="Ask again later."
            )
            unavailable.retry_after_s = 10.0
            raise unavailable from error

    def _written(self, files: Mapping[str, bytes], targets: Mapping[str, Path]) -> UploadedFiles:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="accelrt-uploads-"))  # readable by this user only
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        content = self._folder / "content"
        content.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._folder, prefix="model-"))
        kept = UploadedFiles(folder, content)
        try:
            for key, data in files.items():
                target = folder / targets[key]
                target.parent.mkdir(parents=True, exist_ok=True)
                stored = content / hashlib.sha256(data).hexdigest()
                # Hard links: equal bytes are there once, and go when the last model that uses them does.
                with _LOCK:
                    if stored.exists():
                        target.hardlink_to(stored)
                        continue
                    target.write_bytes(data)
                    stored.hardlink_to(target)
        except OSError:
            kept.drop()  # now: who looks at the error holds on to it
            raise
        return kept

    def folders(self) -> tuple[Path, ...]:
        """Return the folders of the models that are kept, and the one that they are in."""
        if self._folder is None:
            return ()
        return (*self._folder.glob("model-*"), self._folder)

    def close(self) -> None:
        """Remove everything."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class UploadedFiles:
    """A folder of versions, as in the repository; removed when nobody refers to this."""

    def __init__(self, folder: Path, content: Path) -> None:
        self.folder = folder
        self.drop = weakref.finalize(self, _drop, folder, content)

    @property
    def versions(self) -> tuple[str, ...]:
        """Versions that there are files for, ascending."""
        return tuple(sorted((path.name for path in self.folder.iterdir()), key=int))


def _drop(folder: Path, content: Path) -> None:
    """Remove a model's folder, and content that no other model links to."""
    shutil.rmtree(folder, ignore_errors=True)
    with _LOCK:
        for stored in content.iterdir() if content.is_dir() else ():
            if stored.stat().st_nlink == 1:
                stored.unlink(missing_ok=True)


def _place(key: str) -> Path:
    """Return where a file belongs, relative to its model's folder."""
    version, slash, name = key.removeprefix("file:").partition("/")
    parts = name.split("/")
    if not key.startswith("file:") or not slash or not is_version(version) or len(parts) > 4:
        raise RequestError(f"{key[:80]!r} names no file of a version; the form is file:<version>/<name>.")
    if not all(_PART.fullmatch(part) for part in parts):
        raise RequestError(f"{key[:80]!r} has a part that is no plain file name.")
    return Path(version, *parts)
