"""The accelerators of this process: endpoints that the environment names, and how they are.

::

    ACCELRT_EIA_ACCELERATORS   grpc://host:8001,grpcs://other:8001   eia:0, eia:1
    ACCELRT_EIA_API_KEY        sent with each call
    ACCELRT_EIA_CA             PEM file of who vouches for servers, if not the system's authorities
    ACCELRT_EIA_CERTIFICATE    PEM file that is shown to servers, with
    ACCELRT_EIA_KEY            its private key
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from accelrt.backend import Device
from accelrt.errors import AccelrtError, OptionError
from accelrt.protocol.address import Address, parse_address
from accelrt.protocol.client import ClientSettings, Endpoint
from accelrt.protocol.leases import EXTENSION, SLICE, SliceState, describe_slice

VARIABLE = "ACCELRT_EIA_ACCELERATORS"
PROBE_TIMEOUT_S = 1.0
"""How long asking an endpoint how it is may take; they are asked side by side."""

PROBE_EVERY_S = 10.0
"""How long an answer is taken for true."""

_MOST = 256


def addresses(environ: Mapping[str, str]) -> tuple[Address, ...]:
    """Return the endpoints that the environment names, in its order.

    Raises:
        OptionError: One of them is no address, is named twice, or names a model.
    """
    found = tuple(parse_address(text) for text in environ.get(VARIABLE, "").replace(",", " ").split())
    if len(found) > _MOST or len(set(found)) != len(found):
        raise OptionError(f"{VARIABLE} names an endpoint twice, or more than {_MOST}.")
    if named := [str(address) for address in found if address.model]:
        raise OptionError(f"{VARIABLE} takes endpoints, and {named[0]} names a model.", hint="Leave the model out.")
    return found


@dataclass(frozen=True, slots=True)
class Health:
    """What an endpoint last said of itself.

    ``server`` is its name and version, ``slice`` what it lends if it lends slices, ``problem`` why it is not ready.
    """

    server: str = ""
    extensions: tuple[str, ...] = ()
    problem: str = ""
    slice: SliceState | None = None

    @property
    def description(self) -> str:
        """What it is, without what changes by itself."""
        if self.problem:
            return "unreachable"
        return f"{self.server}, {self.slice.type} of {self.slice.accelerator}" if self.slice else self.server


class Accelerators:
    """Endpoints by address, each connected once in this process, and what is known of their health."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._endpoints: dict[tuple[Address, ClientSettings], Endpoint] = {}
        self._health: dict[Address, tuple[float, Health]] = {}

    def endpoint(self, address: Address) -> Endpoint:
        """Return the connection to an endpoint, by its address without a model."""
        address = Address(address.host, address.port, address.secure)
        key = (address, ClientSettings.of_environment(os.environ))
        with self._lock:
            if key not in self._endpoints:
                # A token for each server: none can borrow from another in this client's name.
                self._endpoints[key] = Endpoint(*key, token=secrets.token_urlsafe(32))
            return self._endpoints[key]

    def health(self, address: Address, *, fresh: bool = False) -> Health:
        """Return how an endpoint is, asking it if that was not done lately."""
        with self._lock:
            at, known = self._health.get(address, (0.0, None))
        if known is not None and not fresh and time.monotonic() - at < PROBE_EVERY_S:
            return known
        found = _probe(self.endpoint(address))
        with self._lock:
            self._health[address] = (time.monotonic(), found)
        return found

    def shares_memory(self, address: Address) -> bool:
        """Tell whether a server is on this machine and takes tensors in shared memory."""
        plain = Address(address.host, address.port, address.secure)
        return plain.local and "system_shared_memory" in self.health(plain, fresh=True).extensions

    def devices(self, environ: Mapping[str, str]) -> tuple[Device, ...]:
        """Return the endpoints as devices, those that do not answer too: their numbers must not change."""
        # Recorded figures belong to a machine by these: what changes by itself is not in them, see `states`.
        return tuple(
            Device(
                "eia",
                index,
                f"{address.endpoint}, {health.description}",
                None if health.slice is None else health.slice.memory_bytes,
                {
                    "address": address.endpoint,
                    "health": health.problem or "ready",
                    **({} if health.slice is None else {"accelerator_type": health.slice.type}),
                },
            )
            for index, (address, health) in enumerate(self.states(environ))
        )

    def states(self, environ: Mapping[str, str]) -> tuple[tuple[Address, Health], ...]:
        """Return how each endpoint is that the environment names."""
        named = addresses(environ)
        if not named:
            return ()
        with ThreadPoolExecutor(min(len(named), 16), thread_name_prefix="eia-probe") as pool:
            return tuple(zip(named, pool.map(self.health, named), strict=True))


def _probe(endpoint: Endpoint) -> Health:
    try:
        told = endpoint.ask("ServerMetadata", PROBE_TIMEOUT_S)
    except AccelrtError as error:
        return Health(problem=" ".join(error.message.split())[:200])
    extensions = tuple(told.extensions)
    return Health(
        f"{told.name} {told.version}".strip(),
        extensions,
        slice=ask_slice(endpoint, PROBE_TIMEOUT_S) if EXTENSION in extensions else None,
    )


def ask_slice(endpoint: Endpoint, timeout_s: float) -> SliceState | None:
    """Return what a server lends to this client, None if it does not say so."""
    try:
        told = endpoint.ask("ModelConfig", timeout_s, name=SLICE).config.parameters
    except AccelrtError:
        return None
    return describe_slice({key: value.string_value for key, value in told.items()})
