"""Who may ask: API keys, and no pages of other sites in a browser on this machine."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from accelrt.errors import NotAllowed
from accelrt.serve.http.replies import Reply, failure
from accelrt.serve.shared_memory import SharedMemoryRegistry

OPEN_TARGETS = frozenset({b"/v2/health/live", b"/v2/health/ready", b"/ping", b"/ui", b"/ui/page.css", b"/ui/page.js"})
"""Asked by orchestrators and by browsers for the status page, which have no key yet; they tell nothing but whether the
server is up."""

_LOOPBACK_NAMES = frozenset({b"localhost", b"127.0.0.1", b"[::1]"})


class Doorman:
    """Refuses requests without a key and, where there is no key, those that a foreign web page makes.

    Args:
        keys: Any of which opens; none lets everybody in.
        local: Whether the server listens to this machine only.
    """

    def __init__(self, keys: Sequence[str], *, local: bool) -> None:
        # Digests are of one length, so that comparing them tells nothing about a key's.
        self._digests = tuple(_digest(key.encode()) for key in keys)
        self._local = local

    def refusal(self, target: bytes, headers: dict[bytes, bytes]) -> Reply | None:
        """Return why a request is refused, None if it is let in.

        Args:
            target: Path and query.
            headers: By name, in lower case.
        """
        if self._digests:
            if target in OPEN_TARGETS or self._has_key(headers):
                return None
            return failure(
                401, "An API key is needed: Authorization: Bearer KEY, or X-API-Key.", {"www-authenticate": "Bearer"}
            )
        host = headers.get(b"host", b"")
        # A page can make a name of its own stand for this machine, and then ask it what it likes.
        if self._local and host and host.rpartition(b":")[0] not in _LOOPBACK_NAMES and host not in _LOOPBACK_NAMES:
            return failure(403, "Without an API key the server answers to localhost only.")
        origin = headers.get(b"origin")
        if origin is not None and origin.rpartition(b"//")[2] != host:
            return failure(403, "Without an API key the server does not answer to pages of other sites.")
        return None

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        key = headers.get(b"x-api-key")
        if key is None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer":
                return False
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, whichever it is
        return any(matches)


def is_local(peer: str) -> bool:
    """Tell whether a peer, an address and its port, is on this machine."""
    host = peer.rpartition(":")[0].removeprefix("::ffff:")
    return host == "::1" or host.startswith("127.")


def local_regions(regions: SharedMemoryRegistry, peer: str) -> SharedMemoryRegistry:
    """Return the regions, if the caller shares this machine's memory.

    Raises:
        NotAllowed: It does not.
    """
    if not is_local(peer):
        raise NotAllowed("Shared memory is for clients on the server's own machine.", hint="Send the tensors.")
    return regions


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
