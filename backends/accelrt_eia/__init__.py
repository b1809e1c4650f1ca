"""Accelerators that are reached over a network: endpoints of the Open Inference Protocol.

``ACCELRT_EIA_ACCELERATORS="grpc://host:8001,grpcs://other:8001"`` makes the devices ``eia:0`` and ``eia:1``. Amazon's
own accelerators are driven through its packages, where somebody still has both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from accelrt.backend import Backend, Device, Engine
from accelrt_eia.accelerators import PROBE_TIMEOUT_S, Accelerators, ask_slice
from accelrt_eia.predictor import PredictorEngine
from accelrt_eia.remote import RemoteEngine
from accelrt_eia.served import ServedEngine
from accelrt_eia.torcheia import TorchEiaEngine


class EiaBackend(Backend):
    """The endpoints that the environment names, in its order."""

    name: ClassVar[str] = "eia"

    def __init__(self) -> None:
        accelerators = Accelerators()
        self._accelerators, self._remote = accelerators, RemoteEngine(accelerators)
        self.engines: tuple[Engine, ...] = (
            self._remote,
            ServedEngine(accelerators),
            PredictorEngine(),
            TorchEiaEngine(),
        )

    def devices(self) -> Sequence[Device]:
        return self._remote.endpoints()

    def occupants(self) -> Mapping[int, Sequence[str]]:
        """Return who holds the slices of each server that lends any, this process included where it does."""
        return {
            one["ordinal"]: [
                f"lease {holder['id']}, {holder['programs']} programs of {holder['held_bytes']} bytes"
                for holder in one["holders"]
            ]
            for one in self.report()["accelerators"]
            if one.get("holders")
        }

    def report(self) -> Mapping[str, Any]:
        """Return each endpoint as it is now: its health and, if it lends slices, type, memory and holders."""
        if not self._remote.status().usable:
            return {"accelerators": []}
        told = []
        for index, (address, health) in enumerate(self._accelerators.states(os.environ)):
            known = {
                "ordinal": index,
                "address": address.endpoint,
                "health": health.problem or "ready",
                "server": health.server,
            }
            if health.slice is not None:
                now = ask_slice(self._accelerators.endpoint(address), PROBE_TIMEOUT_S) or health.slice
                known |= {**now.to_json(), "free_bytes": now.free_bytes}
            told.append(known)
        return {"accelerators": told}
