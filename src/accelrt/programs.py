"""What engines share about programs: keep a source among their files, and what compiled code depends on."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

# What changes the layout of weights or the choice of kernels in onnxruntime and OpenVINO.
_RELEVANT = frozenset(
    "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_tile amx_bf16 amx_int8 asimd sve i8mm bf16".split()  # noqa: SIM905
)


def keep(source: Path, out: Path) -> Path:
    """Put a source into a program's folder: as a link to the same bytes where the file system can."""
    target = out / source.name
    with contextlib.suppress(OSError):
        os.link(source, target)
        return target
    shutil.copyfile(source, target)
    return target


def first_line(error: BaseException, describe: Callable[[BaseException], str] = str) -> str:
    """Return the kind of an error and the first line of what it says."""
    lines = [line.strip() for line in describe(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


@cache
def instruction_set() -> str:
    """Return what code compiled for this CPU depends on, machine and relevant extensions: ``x86_64+avx2+avx512f``."""
    flags: set[str] = set()
    try:
        with Path("/proc/cpuinfo").open() as lines:
            for line in lines:
                if line.startswith(("flags", "Features")):
                    flags = set(line.partition(":")[2].split())
                    break
    except OSError:
        pass  # other systems tell in other ways; the machine alone is then the whole answer
    return "+".join([platform.machine(), *sorted(flags & _RELEVANT)])
