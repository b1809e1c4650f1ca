"""A client's end: calls of one endpoint over one HTTP/2 connection, and what happens when it is lost.

Every method of the protocol that is called here may be repeated: a model is a function of its inputs, and loading one
under the name of its content twice leaves the same model. So a call whose connection was lost is made once more, on a
new connection, within the time that is left to it; the first one's answer cannot come any more then.

Inference at a server on this machine goes over its Unix socket where it has one (`accelrt.protocol.local_socket`). If
that is lost, the call is made once more as any other, and the socket is looked for again a little later.

An endpoint that cannot be reached is left alone for a while, longer each time; calls in between fail at once, so that
whoever made them can do without it. One call at a time tries it again.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelrt.errors import AccelrtError, DeviceError, OptionError, RequestTimeout
from accelrt.protocol.address import Address
from accelrt.protocol.faults import KIND, RETRY_AFTER, error_of
from accelrt.protocol.leases import TOKEN
from accelrt.protocol.local_socket import LocalSocket, socket_named
from accelrt.protocol.wire import Buffer

INFER = "/inference.GRPCInferenceService/ModelInfer"

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 5.0
_LOOKING_S, _LOOK_AGAIN_S = 1.0, 5.0


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How an endpoint is reached.

    Attributes:
        connect_timeout_s: How long making a connection may take.
        keepalive_s: After this many seconds without a sign of life during a call the server is asked for one.
        keepalive_timeout_s: How long that may take; then the connection is given up.
        ca: PEM file of the authorities that may vouch for the server; None for the system's.
        certificate, private_key: PEM files that this client shows (mutual TLS).
        api_key: Sent with each call as ``authorization: Bearer``.
    """

    connect_timeout_s: float = 2.0
    keepalive_s: float = 10.0
    keepalive_timeout_s: float = 5.0
    ca: Path | None = None
    certificate: Path | None = None
    private_key: Path | None = None
    api_key: str | None = None

    def __post_init__(self) -> None:
        # gRPC's core ends the process where one of the two is missing.
        if (self.certificate is None) != (self.private_key is None):
            raise OptionError("A client's certificate and its private key go together; one of them is missing.")

    @classmethod
    def of_environment(cls, environ: Mapping[str, str]) -> ClientSettings:
        """Return settings as the environment says: ACCELRT_EIA_API_KEY, _CA, _CERTIFICATE and _KEY.

        Raises:
            OptionError: A certificate without its key, or the other way round.
        """
        ca, certificate, key = (environ.get(f"ACCELRT_EIA_{name}") for name in ("CA", "CERTIFICATE", "KEY"))
        return cls(
            ca=Path(ca) if ca else None,
            certificate=Path(certificate) if certificate else None,
            private_key=Path(key) if key else None,
            api_key=environ.get("ACCELRT_EIA_API_KEY") or None,
        )

    def __repr__(self) -> str:
        return (
            f"ClientSettings(ca={self.ca}, certificate={self.certificate}, api_key={'***' if self.api_key else None})"
        )


class _Link:
    """A channel, closed when it was given up and its last call has ended."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.users, self.given_up = 0, False
        self._calls: dict[str, Any] = {}

    def method(self, path: str) -> Any:
        call = self._calls.get(path)
        if call is None:
            call = self._calls[path] = self.channel.unary_unary(path)
        return call


class Endpoint:
    """One server. Thread-safe; connects when first used, and again when the connection was lost.

    ``epoch`` grows with each connection: what a server was told on an earlier one it may have forgotten.

    Args:
        address: Of the server.
        settings: How it is reached.
        token: Sent with each call, for servers that lend slices (`accelrt.protocol.leases`); None for none.
    """

    def __init__(self, address: Address, settings: ClientSettings | None = None, *, token: str | None = None) -> None:
        self.address, self._settings = address, settings or ClientSettings()
        self.epoch = 0
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._failures = 0
        self._failing_since: float | None = None
        self._try_again = 0.0
        self._closed = False
        key = self._settings.api_key
        metadata = [("authorization", f"Bearer {key}")] if key else []
        if token is not None:
            metadata.append((TOKEN, token))
        self._metadata = tuple(metadata) or None
        self._local: LocalSocket | None = None
        self._look_at = 0.0

    def infer(self, data: bytes, timeout_s: float, *, local_socket: bool = True) -> Buffer:
        """Call ``ModelInfer``; as `call`, and what it raises.

        Args:
            data: The request.
            timeout_s: How long all of it may take.
            local_socket: Whether it may go over the server's Unix socket.
        """
        if not local_socket or (local := self._near()) is None:
            return self.call(INFER, data, timeout_s)
        self._may_try()
        deadline = time.monotonic() + timeout_s
        try:
            reply = local.call(data, timeout_s)
        except TimeoutError as error:
            self._failed()
            raise RequestTimeout(f"{self.address.endpoint} has not answered within {timeout_s:.3g} s.") from error
        except OSError:
            with self._lock:
                if self._local is local:
                    self._local, self._look_at = None, time.monotonic() + _LOOK_AGAIN_S
            local.close()
            return self.call(INFER, data, max(0.001, deadline - time.monotonic()))
        except AccelrtError:
            self._answered()
            raise
        self._answered()
        return reply

    def call(self, path: str, data: bytes, timeout_s: float, *, patient: bool = False) -> bytes:
        """Call a method with the bytes of its request and return those of its reply.

        Args:
            path: The method's, as `accelrt.protocol.messages.METHODS` has it.
            data: The request.
            timeout_s: How long all of it may take, connecting and trying again included.
            patient: Wait while the server is left alone, in place of failing at once.

        Raises:
            DeviceError: The server cannot be reached, or could not be a moment ago.
            RequestTimeout: No answer in time.
            ServingError: What the server answered instead: `accelrt.protocol.faults.error_of`.
        """
        import grpc

        deadline = time.monotonic() + timeout_s
        if patient:
            time.sleep(max(0.0, min(self._try_again, deadline) - time.monotonic()))
        self._may_try()
        lost: Any = None
        for _ in range(2):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            link = self._take()
            try:
                reply: bytes = link.method(path)(data, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                self._give_back(link)
                trailing = dict(error.trailing_metadata() or ())
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and KIND not in trailing:
                    # The server may be hung: others should not wait as long to find that out.
                    self._failed()
                    raise self._error(error, trailing) from None
                if error.code() is not grpc.StatusCode.UNAVAILABLE or KIND in trailing:
                    self._answered()
                    raise self._error(error, trailing) from None
                lost = error
                self._abandon(link)
                continue
            except ValueError as error:  # gRPC's way to say that the channel is closed
                self._give_back(link)
                raise DeviceError(f"{self.address.endpoint} was closed.") from error
            self._give_back(link)
            self._answered()
            return reply
        if lost is None or self._is_live(deadline):
            self._answered()
            raise error_of("UNAVAILABLE" if lost else "DEADLINE_EXCEEDED", lost.details() if lost else "")
        self._failed()
        raise DeviceError(
            f"{self.address.endpoint} cannot be reached: {' '.join(str(lost.details()).split())[:300]}.",
            hint="Is the server running?",
        ) from lost

    def ask(self, method: str, timeout_s: float, *, patient: bool = False, **fields: Any) -> Any:
        """Call a method that carries no tensors, by its name, with the fields of its request; raises what `call` does.

        Raises:
            DeviceError: Also where the reply is no message of the protocol.
        """
        from google.protobuf.message import DecodeError

        from accelrt.protocol.messages import METHODS

        known = METHODS[method]
        reply = self.call(known.path, known.request(**fields).SerializeToString(), timeout_s, patient=patient)
        try:
            return known.response.FromString(reply)
        except DecodeError as error:
            raise DeviceError(f"{self.address.endpoint} answered {method} with something else.") from error

    def failing_s(self) -> float:
        """Return for how many seconds it has not been reached, 0 if it was when last tried."""
        since = self._failing_since
        return 0.0 if since is None else time.monotonic() - since

    def close(self) -> None:
        """Close the connection; no call may follow."""
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
            local, self._local = self._local, None
        if link is not None:
            link.channel.close()
        if local is not None:
            local.close()

    # The connection

    def _near(self) -> LocalSocket | None:
        """Return the server's Unix socket; look for it now and then, if it is not known."""
        if self._local is not None or time.monotonic() < self._look_at:
            return self._local
        with self._lock:
            if self._closed or time.monotonic() < self._look_at:
                return self._local
            self._look_at = time.monotonic() + _LOOK_AGAIN_S  # the others do without while this one looks
        if self.address.secure or not self.address.local:
            self._look_at = math.inf
            return None
        with contextlib.suppress(AccelrtError, OSError):
            name = socket_named(self.ask("ServerMetadata", _LOOKING_S).extensions)
            if name is None:
                self._look_at = math.inf  # until there is another connection, which may be to another server
            else:
                found = LocalSocket(name, self._metadata or ())
                found.connect()
                self._local = found
        return self._local

    def _take(self) -> _Link:
        with self._lock:
            if self._closed:
                raise DeviceError(f"{self.address.endpoint} was closed.")
            if self._link is None:
                self._link = _Link(_channel(self.address, self._settings))
                self.epoch += 1
                self._look_at = min(self._look_at, time.monotonic() + _LOOK_AGAIN_S)
            self._link.users += 1
            return self._link

    def _give_back(self, link: _Link) -> None:
        with self._lock:
            link.users -= 1
            done = link.given_up and link.users == 0
        if done:
            link.channel.close()

    def _abandon(self, link: _Link) -> None:
        """Make the next call connect anew. Calls that still run on the old connection end as they may."""
        with self._lock:
            if self._link is link:
                self._link = None
            link.given_up = True
            done = link.users == 0
        if done:
            link.channel.close()

    def _is_live(self, deadline: float) -> bool:
        """Tell a server that says UNAVAILABLE of a model from one that is not there."""
        import grpc

        link = self._take()
        try:
            left = min(self._settings.connect_timeout_s, max(0.05, deadline - time.monotonic()))
            link.method("/inference.GRPCInferenceService/ServerLive")(b"", timeout=left, metadata=self._metadata)
            return True
        except grpc.RpcError:
            return False
        finally:
            self._give_back(link)

    # Whether to try at all

    def _may_try(self) -> None:
        if self._failing_since is None:
            return
        with self._lock:
            now = time.monotonic()
            if self._failing_since is None:
                return
            if now < self._try_again:
                raise DeviceError(
                    f"{self.address.endpoint} has not been reached for {now - self._failing_since:.1f} s.",
                    hint=f"It is tried again in {self._try_again - now:.1f} s.",
                )
            self._try_again = now + self._settings.connect_timeout_s  # the others wait for what this one finds

    def _failed(self) -> None:
        with self._lock:
            now = time.monotonic()
            if self._failing_since is None:
                self._failing_since, self._failures = now, 0
            pause = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(self._failures, 10))
            self._failures += 1
            self._try_again = now + pause * random.uniform(0.8, 1.2)

    def _answered(self) -> None:
        if self._failing_since is not None:
            with self._lock:
                self._failing_since, self._failures, self._try_again = None, 0, 0.0

    def _error(self, error: Any, trailing: dict[str, Any]) -> AccelrtError:
        kind = trailing.get(KIND)
        found = error_of(error.code().name, error.details() or "", kind if isinstance(kind, str) else None)
        with contextlib.suppress(TypeError, ValueError):
            found.retry_after_s = int(trailing[RETRY_AFTER]) / 1000 if RETRY_AFTER in trailing else None  # type: ignore[attr-defined]
        return found


def _channel(address: Address, settings: ClientSettings) -> Any:
    import grpc

    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # A pool of its own: in the shared one a new channel inherits the old one's pause before it connects.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", int(settings.connect_timeout_s * 1000)),  # this is its time to connect, too
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.keepalive_time_ms", int(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(settings.keepalive_timeout_s * 1000)),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),  # trying again is done here, where it is known to be safe
    ]
    if not address.secure:
        return grpc.insecure_channel(address.target, options)
    credentials = grpc.ssl_channel_credentials(
        *(_pem(p) for p in (settings.ca, settings.private_key, settings.certificate))
    )
    return grpc.secure_channel(address.target, credentials, options)


def _pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}.") from error
    if b"-----BEGIN" not in data:
        raise OptionError(f"{path} is no PEM file.")
    return data
