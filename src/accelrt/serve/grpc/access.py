"""Who may call: API keys in the metadata, and which callers are on this machine."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

_OPEN = frozenset(
    {
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
        "/grpc.health.v1.Health/Check",
    }
)
"""What tells nothing but the server's health, which load balancers ask for and have no key."""


class Keys:
    """The API keys of a server; compared by digest, so that the time taken tells nothing about them."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    def admit(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Tell whether a call may be made: no keys are set, the method is open to all, or it carries a key."""
        return not self._digests or method in _OPEN or self.who(metadata) is not None

    def who(self, metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
        """Return a name for the key that a call carries, which does not open what the key does; None without one."""
        found: bytes | None = None
        for name, value in metadata:
            if name not in ("authorization", "x-api-key") or isinstance(value, bytes):
                continue
            scheme, _, rest = value.partition(" ")
            key = rest.strip() if name == "authorization" and scheme.lower() == "bearer" else value
            given = _digest(key)
            for digest in self._digests:
                if hmac.compare_digest(given, digest):
                    found = digest
        return None if found is None else found.hex()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def is_local(peer: str) -> bool:
    """Tell whether a peer, as gRPC writes it, is on this machine."""
    return peer.startswith(("unix:", "unix-abstract:", "ipv4:127.", "ipv6:[::1]:", "ipv6:%5B::1%5D:"))
