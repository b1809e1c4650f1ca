"""What compiled CPU programs depend on besides the runtime's version: the instruction set."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# What changes the layout of weights or the choice of kernels in onnxruntime and OpenVINO.
_RELEVANT = frozenset(
    "avx2 avx512f avx512_vnni avx_vnni avx512_bf16 amx_tile amx_bf16 amx_int8 asimd sve i8mm bf16".split()  # noqa: SIM905
)


@cache
def instruction_set() -> str:
    """Return machine and relevant extensions: ``x86_64+avx2+avx512f``."""
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
