"""What can be set about the gRPC front end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from accelrt.errors import OptionError

SHORTEST_KEY = 16
"""Characters of an API key: fewer can be guessed."""


@dataclass(frozen=True, slots=True)
class GrpcSettings:
    """Settings of the gRPC front end.

    Attributes:
        host: Address to listen on; ``0.0.0.0`` for all. Without TLS and keys only the loopback interface is sensible.
        port: 0 for a free one.
        max_message_bytes: The longest message taken. A model that is uploaded comes in one message, too.
        max_calls: Calls under way at a time; more are answered RESOURCE_EXHAUSTED at once.
        max_streams: Calls under way on one connection; more wait on the client's side.
        stream_window: Requests of one ``ModelStreamInfer`` that are under way at a time; more are not read yet.
        keepalive_s: After this many quiet seconds a client is asked whether it is still there.
        keepalive_timeout_s: How long its answer may take before the connection is closed.
        least_ping_s: Clients that ping a quiet connection more often than this are cut off after a few times.
        certificate, private_key: PEM files; TLS where both are given.
        client_ca: PEM file; where given, clients must show a certificate that it signed (mutual TLS).
        api_keys: Where not empty, each call but those that ask for health must carry one of them, as the metadata
            ``authorization: Bearer <key>`` or ``x-api-key: <key>``.
        shared_memory: Whether clients of this machine may register system shared memory.
        local_socket: Whether they may call over a Unix socket (`accelrt.protocol.local_socket`); not with TLS, whose
            certificates it would go around.
    """

    host: str = "127.0.0.1"
    port: int = 0
    max_message_bytes: int = 256 << 20
    max_calls: int = 1024
    max_streams: int = 256
    stream_window: int = 32
    keepalive_s: float = 60.0
    keepalive_timeout_s: float = 20.0
    least_ping_s: float = 5.0
    certificate: Path | None = None
    private_key: Path | None = None
    client_ca: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    shared_memory: bool = True
    local_socket: bool = True

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise OptionError("TLS needs a certificate and its private key; one of them is missing.")
        if self.client_ca is not None and self.certificate is None:
            raise OptionError("Clients cannot be asked for certificates without TLS: certificate is missing.")
        if any(len(key) < SHORTEST_KEY or not key.isascii() for key in self.api_keys):
            raise OptionError(f"An API key has at least {SHORTEST_KEY} ASCII characters.")
        if not 0 <= self.port < 1 << 16:
            raise OptionError(f"{self.port} is no port.")
        if not 1 << 10 <= self.max_message_bytes < 1 << 31:
            raise OptionError(f"max_message_bytes must be 1 KiB to 2 GiB, not {self.max_message_bytes}.")
        if min(self.max_calls, self.max_streams, self.stream_window) < 1:
            raise OptionError("max_calls, max_streams and stream_window must be at least 1.")
        if min(self.keepalive_s, self.keepalive_timeout_s, self.least_ping_s) <= 0:
            raise OptionError("Times of keepalive must be positive.")
