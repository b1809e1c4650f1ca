"""The instances that carry Neuron chips: how many chips, cores and how much memory each has.

Figures are those of the vendor's hardware pages (about-neuron/arch/neuron-hardware/*-arch.rst of its SDK's
documentation, SDK 2.32); generations of cores are named as those pages name them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Generation: TypeAlias = Literal["v1", "v2", "v3"]
"""NeuronCore-v1 (Inf1), -v2 (Inf2, Trn1), -v3 (Trn2)."""

GIB = 1 << 30

CORES_PER_CHIP: Mapping[Generation, int] = {"v1": 4, "v2": 2, "v3": 8}
"""Physical cores of a chip."""

DEFAULT_LNC: Mapping[Generation, int] = {"v1": 1, "v2": 1, "v3": 2}
"""Physical cores that make a logical one, unless NEURON_RT_VIRTUAL_CORE_SIZE says otherwise."""

CHIP_MEMORY: Mapping[Generation, int] = {"v1": 8 * GIB, "v2": 32 * GIB, "v3": 96 * GIB}
"""Bytes of device memory of a chip."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One size of machine.

    Attributes:
        name: As the vendor sells it: ``inf2.xlarge``.
        generation: Of its cores.
        target: What neuronx-cc calls the chip; ``inf1`` is neuron-cc's and has no such argument.
        chips: How many it has.
    """

    name: str
    generation: Generation
    target: str
    chips: int

    @property
    def cores_per_chip(self) -> int:
        """Logical cores of one chip: what a program is loaded on."""
        return CORES_PER_CHIP[self.generation] // DEFAULT_LNC[self.generation]

    @property
    def cores(self) -> int:
        """Logical cores of all chips."""
        return self.chips * self.cores_per_chip

    @property
    def core_memory(self) -> int:
        """Bytes of a chip's memory that fall to one of its cores."""
        return CHIP_MEMORY[self.generation] // self.cores_per_chip


INSTANCES: Mapping[str, Instance] = {
    instance.name: instance
    for instance in (
        Instance("inf1.xlarge", "v1", "inf1", 1),
        Instance("inf1.2xlarge", "v1", "inf1", 1),
        Instance("inf1.6xlarge", "v1", "inf1", 4),
        Instance("inf1.24xlarge", "v1", "inf1", 16),
        Instance("inf2.xlarge", "v2", "inf2", 1),
        Instance("inf2.8xlarge", "v2", "inf2", 1),
        Instance("inf2.24xlarge", "v2", "inf2", 6),
        Instance("inf2.48xlarge", "v2", "inf2", 12),
        Instance("trn1.2xlarge", "v2", "trn1", 1),
        Instance("trn1.32xlarge", "v2", "trn1", 16),
        Instance("trn1n.32xlarge", "v2", "trn1n", 16),
        Instance("trn2.48xlarge", "v3", "trn2", 16),
    )
}
