"""Settings of a server, shared by its front ends and by what is behind them. Frozen: a server has one set for life."""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from accelrt.errors import OptionError
from accelrt.serve.lending.sizes import LendingSettings

ControlMode = Literal["none", "poll", "explicit"]
"""Who loads models: ``none`` all at the start, ``poll`` as the repository changes, ``explicit`` clients."""

Isolation = Literal["auto", "none", "process"]
"""Whether a model has a process of its own; ``auto`` for those whose programs are code."""

ISOLATIONS: tuple[Isolation, ...] = get_args(Isolation)
CONTROL_MODES: tuple[ControlMode, ...] = get_args(ControlMode)

HTTP_PORT, GRPC_PORT, METRICS_PORT = 8000, 8001, 8002
"""The ports that clients of the protocol expect, because Triton has them."""

SAGEMAKER_PORT = 8080
SAGEMAKER_MODELS = Path("/opt/ml/model")
"""Where SageMaker's container contract wants a server, and where it puts the model."""

SAGEMAKER_WORD = Path("serve")
"""The argument with which SageMaker starts a container, after whatever its entry point says already."""

KEYS_VARIABLE = "ACCELRT_API_KEYS"
"""Environment variable of API keys, separated by commas or white space."""

SHORTEST_KEY = 16


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes of one client; more is refused with an error, not with a crash.

    Attributes:
        body_bytes: Of a request's body, after decompression too.
        receiving_bytes: Of bodies that are coming in, of all connections together; looked at twice a second.
        json_bytes: Of JSON or CSV in a body: numbers in text take many times their size when they are read.
        header_bytes: Of a request line and headers together.
        headers: How many headers.
        json_depth: Lists and objects within each other.
        tensors: Inputs, and outputs asked for, of one request.
        connections: Open at once.
        header_s: From a connection's first byte of a request to the end of its headers.
        body_s: From there to the end of the body, and a second more for each 64 KiB that came.
        idle_s: A connection between requests.
        write_s: A client that reads nothing of what it asked for.
        request_s: From the end of a request to its answer.
    """

    body_bytes: int = 256 * 2**20
    receiving_bytes: int = 4 * 2**30
    json_bytes: int = 64 * 2**20
    header_bytes: int = 32 * 2**10
    headers: int = 100
    json_depth: int = 64
    tensors: int = 256
    connections: int = 4096
    header_s: float = 10.0
    body_s: float = 120.0
    idle_s: float = 75.0
    write_s: float = 60.0
    request_s: float = 300.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise OptionError(f"The limit {name} must be positive, not {getattr(self, name)!r}.")


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate chain and its private key, PEM; with ``client_ca`` clients must show a certificate of it."""

    certificate: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """What a server was asked to do.

    Attributes:
        repository: A model repository, or one model (an artifact, an ONNX file, ...).
        control_mode: Who loads models.
        load: Names of models to load at the start with ``explicit``; ``*`` for all.
        poll_s: Between two looks at the repository with ``poll``.
        backend: Target for models whose configuration names none; None for ``ACCELRT_BACKEND``, else the CPU.
        trust: Whether programs in artifacts may run code.
        precision, isolation, max_batch_size, max_queue_delay_us, max_queue, latency_target_ms: For models whose own
            settings do not say, see `accelrt.serve.models.settings.ModelSettings`.
        load_threads: How many models are loaded at once.
        max_resident_models: How many models are loaded at a time; None for all.
        max_resident_bytes: How much they may hold; None for no limit.
        host: Address to listen at.
        http_port, grpc_port, metrics_port: 0 lets the system choose; None leaves that front end out.
        api_keys: Any of which a client must show; none if empty.
        insecure: Listen beyond this machine although there is no key.
        tls: Certificate and key; None for plain text.
        limits: What is taken of a client.
        otlp_endpoint: URL of the collector that traces are sent to; None for no traces.
        shared_memory: Whether clients of this machine may register system shared memory.
        local_socket: Whether they may call over a Unix socket in place of gRPC (`accelrt.protocol.local_socket`); there
            is none with TLS.
        exit_on_error: End if a model cannot be loaded at the start; else the server goes on and is not ready.
        drain_s: How long requests under way may take after the server was asked to stop.
        log_requests: Log a line for each request.
        sagemaker: Speak SageMaker's container contract as well.
        default_model: The model that ``/invocations`` is for; empty for the only one.
        lending: Lend slices of an accelerator, in place of serving a repository; over gRPC only.
    """

    repository: Path
    control_mode: ControlMode = "none"
    load: tuple[str, ...] = ()
    poll_s: float = 15.0
    backend: str | None = None
    trust: bool = False
    precision: str | None = None
    isolation: Isolation | None = None
    max_batch_size: int | None = None
    max_queue_delay_us: int | None = None
    max_queue: int | None = None
    latency_target_ms: float | None = None
    load_threads: int = 2
    max_resident_models: int | None = None
    max_resident_bytes: int | None = None
    host: str = "127.0.0.1"
    http_port: int | None = HTTP_PORT
    grpc_port: int | None = GRPC_PORT
    metrics_port: int | None = METRICS_PORT
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    tls: TlsFiles | None = None
    limits: Limits = field(default_factory=Limits)
    shared_memory: bool = True
    local_socket: bool = True
    otlp_endpoint: str | None = None
    exit_on_error: bool = False
    drain_s: float = 30.0
    log_requests: bool = False
    sagemaker: bool = False
    default_model: str = ""
    lending: LendingSettings | None = None

    def __post_init__(self) -> None:
        if self.control_mode not in CONTROL_MODES:
            raise OptionError(
                f"There is no model control mode {self.control_mode!r}.", hint=f"There are {', '.join(CONTROL_MODES)}."
            )
        for name in ("http_port", "grpc_port", "metrics_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise OptionError(f"{name} must lie between 0 and 65535, not {port}.")
        if self.lending is not None and (self.http_port is not None or self.sagemaker):
            raise OptionError(
                "Slices of an accelerator are lent over gRPC; HTTP would not know whose models to call.",
                hint="Leave out --http-port and --sagemaker.",
            )
        if not self.api_keys and not self.insecure and not is_loopback(self.host):
            raise OptionError(
                f"Without an API key the server listens to this machine only, not at {self.host}.",
                hint=f"Give --api-keys FILE or {KEYS_VARIABLE}, or --insecure if something else guards the port.",
            )


def sagemaker_port(environment: Mapping[str, str] = os.environ) -> int:
    """Return the port that SageMaker wants a container to listen at: 8080, or what it says in the environment."""
    given = environment.get("SAGEMAKER_BIND_TO_PORT", "")
    return int(given) if given.isdecimal() else SAGEMAKER_PORT


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from this machine only; a name counts if it is ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_api_keys(file: Path | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the API keys of a file, one a line, and of the environment; lines that begin with ``#`` are comments.

    Raises:
        OptionError: The file cannot be read, may be written by other users, or holds no key; or a key is too short.
    """
    keys = list(environment.get(KEYS_VARIABLE, "").replace(",", " ").split())
    if file is not None:
        keys += _keys_of(file)
    if any(len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() for key in keys):
        raise OptionError(
            f"An API key needs {SHORTEST_KEY} characters of ASCII at least.",
            hint='Make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    return tuple(dict.fromkeys(keys))


def _keys_of(file: Path) -> Iterable[str]:
    try:
        mode, text = file.stat().st_mode, file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"The file of API keys {file} cannot be read: {error}.") from error
    # Only writing: secrets that a cluster mounts may be read by every user of their own container.
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OptionError(f"The file of API keys {file} may be written by other users.", hint=f"chmod 600 {file}")
    keys = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if not keys:
        raise OptionError(f"The file of API keys {file} holds no key.")
    return keys


def tls_context(tls: TlsFiles | None) -> Any:
    """Return an `ssl.SSLContext` for a server, None without TLS.

    Raises:
        OptionError: The files cannot be read, or do not fit each other.
    """
    if tls is None:
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Never asks for a passphrase: a server has nobody to ask.
        context.load_cert_chain(tls.certificate, tls.key, password="")
        if tls.client_ca is not None:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise OptionError(
            f"The TLS files cannot be used: {error}.", hint="They are PEM, and the key is plain."
        ) from error
    return context
