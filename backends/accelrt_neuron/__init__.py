"""AWS Inferentia and Trainium, driven through the vendor's SDKs; and an emulator of their instances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accelrt.backend import Backend, Device, Engine
from accelrt.cores import Group, core_groups, visible_cores
from accelrt_neuron import discovery
from accelrt_neuron.emulator import EmulatorEngine
from accelrt_neuron.report import facts_of
from accelrt_neuron.tensorflow_neuron import TensorFlowNeuronEngine
from accelrt_neuron.torch_neuron import TorchNeuronEngine
from accelrt_neuron.torch_neuronx import TorchNeuronxEngine


class NeuronBackend(Backend):
    """The NeuronCores of this machine: one device a logical core.

    Whether an engine is usable says that it can compile; whether there are devices, that its programs can run.

    Args:
        root: Where the file system with the driver's files begins.
    """

    name: ClassVar[str] = "neuron"
    exclusive: ClassVar[bool] = True

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self.engines: tuple[Engine, ...] = (
            torch_neuronx := TorchNeuronxEngine(root=root),
            torch_neuron := TorchNeuronEngine(root=root),
            tensorflow_neuron := TensorFlowNeuronEngine(),
            EmulatorEngine(),
        )
        self._sdks = (torch_neuronx, torch_neuron, tensorflow_neuron)

    def devices(self) -> Sequence[Device]:
        return discovery.devices(self._root)

    def groups(self, environ: Mapping[str, str], devices: Sequence[Device]) -> tuple[Group, ...]:
        here = {device.index for device in devices}
        visible = visible_cores(environ, max(here, default=-1) + 1) if here else ()
        return core_groups(environ, [index for index in visible if index in here])

    def occupants(self) -> Mapping[int, Sequence[str]]:
        return discovery.occupants(self._root)

    def report(self) -> Mapping[str, Any]:
        return facts_of(self._root, {engine.name: engine.facts for engine in self._sdks})
