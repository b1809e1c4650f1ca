"""A program as its holder calls it: in turn with the calls of others, and for as long as its lease is used."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelrt.errors import RequestError
from accelrt.graph.types import Signature
from accelrt.protocol.leases import DETAILS, SLICE, SliceState
from accelrt.serve.interface import InferRequest, InferResponse, ModelMetadata, ServedModel
from accelrt.serve.lending.turns import Turns

if TYPE_CHECKING:
    from accelrt.serve.lending.leases import Lease


class Metered:
    """A `ServedModel` that takes a turn for each call.

    Args:
        model: What computes.
        lease: Whose calls these are.
        turns: Whose turn it is.
    """

    __slots__ = ("_lease", "_model", "_turns", "config", "metadata", "name", "signature", "version")

    def __init__(self, model: ServedModel, lease: Lease, turns: Turns) -> None:
        self._model, self._lease, self._turns = model, lease, turns
        self.name, self.version, self.signature = model.name, model.version, model.signature
        self.metadata, self.config = model.metadata, model.config

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        """Answer at once if it is the client's turn and the model answers at once."""
        party = self._lease.party
        if not self._turns.try_enter(party):
            return None
        try:
            return self._model.infer_now(request)
        finally:
            self._turns.leave(party)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer when the client's turn has come; see `ServedModel`.

        Raises:
            Overloaded: As many calls of this client wait as may.
            RequestTimeout: Its turn did not come in time.
        """
        lease, timeout_s = self._lease, None
        if request.timeout_us:
            since = request.arrived_ns or time.monotonic_ns()
            timeout_s = max(0.0, request.timeout_us / 1e6 - (time.monotonic_ns() - since) / 1e9)
        lease.busy += 1
        try:
            await self._turns.enter(lease.party, timeout_s)
            try:
                return await self._model.infer(request)
            finally:
                self._turns.leave(lease.party)
        finally:
            lease.busy -= 1
            lease.used = time.monotonic()


class SliceModel:
    """What `SLICE` is to clients: a model that tells, and computes nothing."""

    __slots__ = ("config", "metadata", "name", "signature", "version")

    def __init__(self, state: SliceState) -> None:
        self.name, self.version, self.signature = SLICE, "1", Signature((), ())
        self.metadata = ModelMetadata(SLICE, ("1",), "accelrt_slice", (), ())
        self.config: Mapping[str, Any] = {
            "name": SLICE,
            "platform": "accelrt_slice",
            "backend": "accelrt",
            "max_batch_size": 0,
            "parameters": {DETAILS: {"string_value": json.dumps(state.to_json())}},
        }

    def infer_now(self, request: InferRequest) -> InferResponse | None:
        """Refuse."""
        raise RequestError(f"{SLICE!r} tells what is lent in its configuration; it computes nothing.")

    async def infer(self, request: InferRequest) -> InferResponse:
        """Refuse."""
        raise RequestError(f"{SLICE!r} tells what is lent in its configuration; it computes nothing.")
