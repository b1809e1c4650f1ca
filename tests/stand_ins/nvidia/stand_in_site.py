"""A folder of packages as on a machine with a GPU: the stand-ins, and files where the wheels have libraries."""

from __future__ import annotations

import shutil
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

_HERE = Path(__file__).parent
_MODULES = ("pynvml", "onnxruntime_cuda_stand_in", "cuda_stand_in")


def shared_library(needed: Sequence[str]) -> bytes:
    """Return a 64-bit ELF file that names libraries as needed, and holds nothing else."""
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    places, place = [], 1
    for name in needed:
        places.append(place)
        place += len(name) + 1
    base, text = 0x1000, 64 + 2 * 56
    dynamic = text + len(strings)
    entries = [(1, place) for place in places] + [(5, base + text), (0, 0)]
    table = b"".join(struct.pack("<qQ", *entry) for entry in entries)
    size = dynamic + len(table)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 4, 0, base, base, size, size, 0x1000)
    dyn = struct.pack("<IIQQQQQQ", 2, 6, dynamic, base + dynamic, base + dynamic, len(table), len(table), 8)
    return header + load + dyn + strings + table


def build(
    site: Path, *, needed: Sequence[str] = ("libc.so.6",), cudnn: bool = True, cuda: str = "13.0", provider: bool = True
) -> Path:
    """Write the folder and return it.

    Args:
        site: Where; it must not be there yet.
        needed: Libraries that onnxruntime's CUDA provider names.
        cudnn: Whether there is a cuDNN.
        cuda: The CUDA that onnxruntime was built for; empty for a build without.
        provider: Whether the file of the CUDA provider is there.
    """
    shutil.copytree(_HERE, site, ignore=shutil.ignore_patterns("__pycache__", "stand_in_site.py"))
    capi = site / "onnxruntime_cuda_stand_in" / "capi"
    if provider:
        (capi / "libonnxruntime_providers_cuda.so").write_bytes(shared_library(needed))
    name = "onnxruntime-gpu" if cuda else "onnxruntime"
    said = f"package_name = '{name}'\n__version__ = '1.31.1'\n" + (f"cuda_version = '{cuda}'\n" if cuda else "")
    (capi / "build_and_package_info.py").write_text(said)
    if cudnn:
        folder = site / "nvidia" / "cudnn" / "lib"
        folder.mkdir(parents=True)
        # Any library will do that loads; numpy's own is there.
        (folder / "libcudnn.so.9").symlink_to(np._core._multiarray_umath.__file__)
    return site


@contextmanager
def installed(site: Path) -> Iterator[None]:
    """Put the folder at the front of the import path, of this process and of its children."""
    from accelrt import isolation
    from accelrt_cuda import nvml

    def forget() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in _MODULES]:
            del sys.modules[name]
        session = sys.modules.get("accelrt_cuda.onnxruntime_session")
        if session is not None:
            session.runtime.cache_clear()
        nvml.forget()
        isolation.restart()

    sys.path.insert(0, str(site))
    forget()
    try:
        yield
    finally:
        sys.path.remove(str(site))
        forget()
