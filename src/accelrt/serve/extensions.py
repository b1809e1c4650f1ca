"""Which extensions of the Open Inference Protocol the server has: what both front ends advertise, and nothing else."""

from __future__ import annotations

from accelrt.protocol.leases import PRECISION_EXTENSION

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
    PRECISION_EXTENSION,
)
"""By the names that Triton gave them, but for the last, which is accelrt's."""

SHARED_MEMORY = "system_shared_memory"


def extensions(*, shared_memory: bool) -> tuple[str, ...]:
    """Return what a server has; shared memory can be switched off."""
    return (*EXTENSIONS, SHARED_MEMORY) if shared_memory else EXTENSIONS
