"""``torcheia.jit``."""

from __future__ import annotations

from accelrt.compat.eia.scripts import attach_eia as attach_eia
