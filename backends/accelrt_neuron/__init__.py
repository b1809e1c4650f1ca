"""AWS Inferentia and Trainium, driven through the vendor's SDKs; and an emulator of their instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from accelrt.backend import Backend, Device, Engine
from accelrt_neuron.emulator import EmulatorEngine


class NeuronBackend(Backend):
    """The NeuronCores of this machine."""

    name: ClassVar[str] = "neuron"

    def __init__(self) -> None:
        self.engines: tuple[Engine, ...] = (EmulatorEngine(),)

    def devices(self) -> Sequence[Device]:
        return ()
