"""Accelerators that are reached over a network: endpoints of the Open Inference Protocol.

``ACCELRT_EIA_ACCELERATORS="grpc://host:8001,grpcs://other:8001"`` makes the devices ``eia:0`` and ``eia:1``. Amazon's
own accelerators are driven through its packages, where somebody still has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from accelrt.backend import Backend, Device, Engine
from accelrt_eia.accelerators import Accelerators
from accelrt_eia.predictor import PredictorEngine
from accelrt_eia.remote import RemoteEngine
from accelrt_eia.served import ServedEngine
from accelrt_eia.torcheia import TorchEiaEngine


class EiaBackend(Backend):
    """The endpoints that the environment names, in its order."""

    name: ClassVar[str] = "eia"

    def __init__(self) -> None:
        accelerators = Accelerators()
        self._remote = RemoteEngine(accelerators)
        self.engines: tuple[Engine, ...] = (
            self._remote,
            ServedEngine(accelerators),
            PredictorEngine(),
            TorchEiaEngine(),
        )

    def devices(self) -> Sequence[Device]:
        return self._remote.endpoints()
