"""``torcheia`` 1.5.1 over PyTorch's own interpreter on the CPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "common"))
from . import jit as jit
