"""Sources among a program's files: a folder as one file and back, and a file without a second copy of its bytes."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from pathlib import Path, PurePosixPath

from accelrt.errors import IncompatibleProgram

_LARGEST = 64 << 30
_MANY = 100_000


def keep(source: Path, target: Path) -> Path:
    """Put a source where a program's files are: as a link to the same bytes where the file system can."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return target
    shutil.copyfile(source, target)
    return target


def pack(folder: Path, file: Path) -> None:
    """Write a folder into a zip file, uncompressed and always in the same order."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target)


def unpack(file: Path, folder: Path) -> None:
    """Read a folder back.

    Raises:
        IncompatibleProgram: It is no zip file, holds a name that leads outside, or more than any model has.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > _MANY or sum(entry.file_size for entry in entries) > _LARGEST:
                raise IncompatibleProgram("The packed SavedModel is larger than any model.")
            for entry in entries:
                name = PurePosixPath(entry.filename)
                if name.is_absolute() or ".." in name.parts or "\\" in entry.filename or entry.compress_type != 0:
                    raise IncompatibleProgram(f"The packed SavedModel holds the name {entry.filename!r}.")
                target = folder.joinpath(*name.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as written:
                    shutil.copyfileobj(source, written)
    except (zipfile.BadZipFile, OSError) as error:
        raise IncompatibleProgram(f"The packed SavedModel cannot be read: {error}") from error
