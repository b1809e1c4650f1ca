"""``torcheia`` 1.5.1 over PyTorch's own interpreter on the CPU."""

import os
import sys

import torch

sys.path.insert(0, os.path.join(os.path.dirname(__file__), os.pardir, os.pardir, "common"))
import eia_client_stand_in as client  # noqa: E402

from . import jit as jit  # noqa: E402
