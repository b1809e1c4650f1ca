"""Where an endpoint of the protocol is: ``grpc://host:8001``, ``grpcs://host:443/model/version``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from accelrt.errors import OptionError

SCHEMES = ("grpc", "grpcs")
DEFAULT_PORT = 8001
"""Triton's port for gRPC, which other servers of the protocol took over."""

_FORM = re.compile(
    r"(?P<scheme>grpcs?)://(?P<host>\[[0-9A-Fa-f:.%a-z]{2,64}\]|[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}))"
    r"(?::(?P<port>[0-9]{1,5}))?(?:/(?P<model>[^/\s]{1,256})(?:/(?P<version>[0-9]{1,18}))?)?/?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Address:
    """An endpoint, and a model on it where one is named."""

    host: str
    port: int = DEFAULT_PORT
    secure: bool = False
    model: str = ""
    version: str = ""

    @property
    def target(self) -> str:
        """The endpoint as gRPC names it."""
        return f"{self.host}:{self.port}"

    @property
    def endpoint(self) -> str:
        """The endpoint as users name it, without the model."""
        return f"{SCHEMES[self.secure]}://{self.target}"

    @property
    def local(self) -> bool:
        """Whether it is on this machine for certain, so that memory can be shared."""
        return self.host in ("localhost", "[::1]") or self.host.startswith("127.")

    def __str__(self) -> str:
        return "/".join(part for part in (self.endpoint, self.model, self.version) if part)


def is_address(text: object) -> bool:
    """Tell whether a text means an endpoint, well written or not."""
    return isinstance(text, str) and text.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def parse_address(text: str) -> Address:
    """Parse an address.

    Raises:
        OptionError: It is not of the form.
    """
    matched = _FORM.fullmatch(text.strip())
    port = int(matched["port"] or DEFAULT_PORT) if matched is not None else 0
    if matched is None or not 0 < port < 1 << 16:
        raise OptionError(
            f"{text[:200]!r} is no address of an endpoint.", hint="The form is grpc://host:8001, or grpcs:// with TLS."
        )
    return Address(
        matched["host"], port, matched["scheme"] == "grpcs", matched["model"] or "", matched["version"] or ""
    )
