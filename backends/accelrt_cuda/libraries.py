"""Which shared libraries a runtime needs, and which of them cannot be loaded.

`needed_by` reads the file itself, so that all that is missing is known at once: the loader names the first only.
`missing` loads libraries, so it belongs into a child process.
"""

from __future__ import annotations

import ctypes
import glob
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed_by(path: Path) -> tuple[str, ...]:
    """Return the libraries that a shared library names as needed, in order: ``libcublasLt.so.13``.

    Reads 64-bit little-endian ELF, which is what every machine has that NVIDIA's runtimes are built for; () for
    anything else. Origin of the numbers: the System V ABI, chapters 4 and 5.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
            if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
                return ()
            (table,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(table)
            rows = file.read(size * count)
            segments = [struct.unpack_from("<IIQQQQ", rows, size * n) for n in range(count)]
            dynamic = next((segment for segment in segments if segment[0] == _PT_DYNAMIC), None)
            if dynamic is None:
                return ()
            file.seek(dynamic[2])
            data = file.read(dynamic[5])
            entries = list(struct.iter_unpack("<qQ", data[: len(data) // 16 * 16]))
            entries = entries[: next((n for n, (tag, _) in enumerate(entries) if tag == _DT_NULL), len(entries))]
            strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
            base = None if strings is None else _offset_of(strings, segments)
            if base is None:
                return ()
            names = []
            for tag, value in entries:
                if tag == _DT_NEEDED:
                    file.seek(base + value)
                    names.append(file.read(256).partition(b"\0")[0].decode("utf-8", "replace"))
            return tuple(names)
    except (OSError, struct.error):
        return ()


def _offset_of(address: int, segments: Sequence[tuple[int, ...]]) -> int | None:
    """Return where in the file an address lies."""
    for kind, _, offset, start, _, size in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    return None


def missing(names: Sequence[str]) -> list[str]:
    """Return those libraries that cannot be loaded, neither by the loader nor from NVIDIA's Python packages."""
    absent = []
    for name in names:
        if not any(_loads(place) for place in (name, *_in_packages(name))):
            absent.append(name)
    return absent


def _loads(place: str) -> bool:
    try:
        ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _in_packages(name: str) -> Iterator[str]:
    """Yield where NVIDIA's Python packages put a library: ``nvidia/cu13/lib``, ``nvidia/cudnn/lib``."""
    for folder in sys.path:
        if folder:
            yield from sorted(glob.glob(f"{glob.escape(folder)}/nvidia/*/lib/{glob.escape(name)}"))  # noqa: PTH207
            yield from sorted(glob.glob(f"{glob.escape(folder)}/*_libs/{glob.escape(name)}"))  # noqa: PTH207
