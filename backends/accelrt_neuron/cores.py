"""NeuronCores as the vendor's placement functions count them, and the one lock under which they are called.

``neuron_cores_context`` and ``set_neuron_cores`` take a first core and a number of cores, relative to those that the
process may see, and say of themselves that they are not safe to call from several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from accelrt.backend import Device
from accelrt.errors import CoresUnavailable

PLACEMENT = threading.Lock()
"""Held around every load and every call of a placement function of this process."""


@dataclass(frozen=True, slots=True)
class CoreRange:
    """Cores in a row: what the vendor calls ``start_nc`` and ``nc_count``."""

    start: int
    count: int

    @property
    def ids(self) -> list[int]:
        """Each of them."""
        return list(range(self.start, self.start + self.count))


def core_range(devices: Sequence[Device], engine: str) -> CoreRange:
    """Return the cores of these devices as the vendor counts them.

    Raises:
        CoresUnavailable: There are none, they are not in a row, or they are emulated.
    """
    if not devices:
        raise CoresUnavailable(
            "There is no NeuronCore here: the program is compiled, and cannot run on this machine.",
            hint="Load it on an instance with Neuron devices, or on neuron/emulator to try it out.",
            backend=engine,
        )
    if any(device.properties.get("nature") != "real" for device in devices):
        raise CoresUnavailable("Emulated cores run the programs of neuron/emulator alone.", backend=engine)
    places = [int(device.properties.get("visible_index", device.index)) for device in devices]
    if places != list(range(places[0], places[0] + len(places))):
        raise CoresUnavailable(
            f"The cores {[device.index for device in devices]} are not in a row; Neuron places on consecutive cores.",
            hint="Name a range: devices='0-3'.",
            backend=engine,
        )
    return CoreRange(places[0], len(places))
