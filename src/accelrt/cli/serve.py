"""``accelrt serve``: models over HTTP and gRPC."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accelrt.cli.common import TracebackFlag, guarded

if TYPE_CHECKING:
    from accelrt.serve.settings import ServerSettings


_LENDING = "Lending slices of an accelerator"


def _port(help_: str) -> typer.models.OptionInfo:
    return typer.Option(help=f"{help_} 0 lets the system choose, -1 leaves it out.", min=-1, max=65535)  # type: ignore[no-any-return]


@guarded
def serve(
    repository: Annotated[
        Path | None,
        typer.Argument(
            help="A model repository, or one model; with --sagemaker else /opt/ml/model.", show_default=False
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen at; else 127.0.0.1, or 0.0.0.0 with --sagemaker.")
    ] = None,
    http_port: Annotated[int | None, _port("Port for HTTP; else 8000, or 8080 with --sagemaker.")] = None,
    grpc_port: Annotated[int | None, _port("Port for gRPC; else 8001, or none with --sagemaker.")] = None,
    metrics_port: Annotated[int | None, _port("Port for metrics; else 8002, or none with --sagemaker.")] = None,
    control_mode: Annotated[
        str,
        typer.Option(
            "--model-control-mode",
            help="Who loads models: none (all at the start), poll (as the repository changes), explicit (clients).",
        ),
    ] = "none",
    load: Annotated[
        list[str] | None, typer.Option("--load-model", help="Load this model at the start; explicit only; repeatable.")
    ] = None,
    poll: Annotated[
        float, typer.Option("--repository-poll-secs", help="Seconds between two looks at the repository.", min=0.05)
    ] = 15.0,
    backend: Annotated[
        str | None,
        typer.Option("--backend", "-b", help="Target for models whose configuration names none.", metavar="TARGET"),
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Let programs in artifacts run code.")] = False,
    precision: Annotated[
        str | None,
        typer.Option("--precision", "-p", help="Precision for models that name none."),
    ] = None,
    isolation: Annotated[
        str | None,
        typer.Option(
            "--isolation",
            help="A process for each model: auto (whose programs are code), none, process; where a model does not say.",
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-batch-size", help="Rows of a shared run, where a model does not say.", min=1),
    ] = None,
    queue_delay: Annotated[
        int | None,
        typer.Option(
            "--max-queue-delay-us",
            help="How long a request waits for others to share its run, where a model does not say.",
            min=0,
        ),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option("--max-queue", help="Requests that wait for a model; more get 503; else 1024.", min=1),
    ] = None,
    latency_target: Annotated[
        float | None,
        typer.Option(
            "--latency-target-ms",
            help="What a request may take in all; runs are kept small enough for it.",
            min=0.001,
        ),
    ] = None,
    load_threads: Annotated[int, typer.Option("--load-threads", help="Models loaded at once.", min=1)] = 2,
    max_models: Annotated[
        int | None, typer.Option("--max-resident-models", help="Models loaded at a time; others wait.", min=1)
    ] = None,
    max_memory: Annotated[
        int | None, typer.Option("--max-resident-mib", help="Memory that loaded models may hold, MiB.", min=1)
    ] = None,
    api_keys: Annotated[
        Path | None,
        typer.Option("--api-keys", help="File of API keys, one a line; ACCELRT_API_KEYS in the environment adds more."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine although there is no API key.")
    ] = False,
    tls_certificate: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option("--tls-client-ca", help="Clients must show a certificate of this authority.")
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body-mib", help="Largest body of a request, MiB.", min=1)] = 256,
    max_connections: Annotated[int, typer.Option("--max-connections", help="Connections open at once.", min=1)] = 4096,
    request_timeout: Annotated[
        float, typer.Option("--request-timeout-secs", help="From a request's last byte to its answer.", min=0.001)
    ] = 300.0,
    drain: Annotated[
        float, typer.Option("--exit-timeout-secs", help="How long requests may take after SIGTERM.", min=0.0)
    ] = 30.0,
    shared_memory: Annotated[
        bool,
        typer.Option("--shared-memory/--no-shared-memory", help="Let clients of this machine register shared memory."),
    ] = True,
    local_socket: Annotated[
        bool,
        typer.Option("--local-socket/--no-local-socket", help="Let clients of this machine call over a Unix socket."),
    ] = True,
    exit_on_error: Annotated[
        bool, typer.Option("--exit-on-error", help="End if a model cannot be loaded at the start.")
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option("--otlp-endpoint", help="Send traces to this collector, OTLP over HTTP.", metavar="URL"),
    ] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="Log a line for each request.")] = False,
    log_format: Annotated[str, typer.Option("--log-format", help="json or text.")] = "json",
    sagemaker: Annotated[
        bool, typer.Option("--sagemaker", help="Speak SageMaker's container contract: /ping and /invocations on 8080.")
    ] = False,
    default_model: Annotated[str, typer.Option("--default-model", help="The model that /invocations is for.")] = "",
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator",
            help="Lend slices of this target to clients of the backend eia, in place of serving a repository.",
            metavar="TARGET",
            rich_help_panel=_LENDING,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", help="Of each slice: eia1.medium, .large, .xlarge or eia2. of these.", rich_help_panel=_LENDING
        ),
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory-mib", help="Memory of each slice, in place of the size's.", min=1, rich_help_panel=_LENDING
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            help="Calls of one client at a time, in place of the size's.",
            min=1,
            rich_help_panel=_LENDING,
        ),
    ] = None,
    slices: Annotated[
        int | None,
        typer.Option(
            "--slices",
            help="Clients at a time; else as many as the device's memory has room for.",
            min=1,
            rich_help_panel=_LENDING,
        ),
    ] = None,
    lease_secs: Annotated[
        float,
        typer.Option(
            "--lease-secs", help="How long a slice is kept for a client that is silent.", rich_help_panel=_LENDING
        ),
    ] = 60.0,
    turns: Annotated[
        int | None,
        typer.Option(
            "--turns",
            help="Calls of all clients at a time; else those of two slices.",
            min=1,
            rich_help_panel=_LENDING,
        ),
    ] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="A process for each program.", rich_help_panel=_LENDING)
    ] = False,
    traceback: TracebackFlag = False,
) -> None:
    """Serve models over the Open Inference Protocol V2, as clients of Triton and KServe speak it.

    Prints a line for each front end when models are loaded. SIGTERM and Ctrl-C let what is under way be answered
    before the server ends; a second one ends it at once. Without an API key it listens to this machine only.

    With --accelerator it lends slices of an accelerator over gRPC: each client, told by its API key or by the lease it
    asks for, has its quota of memory and its share of the turns for the programs it uploads.
    """
    from accelrt.precision.plan import precision_named
    from accelrt.serve.lending.sizes import LendingSettings, size_of
    from accelrt.serve.logs import logging_to_stderr
    from accelrt.serve.run import serve as run
    from accelrt.serve.settings import (
        CONTROL_MODES,
        GRPC_PORT,
        HTTP_PORT,
        ISOLATIONS,
        METRICS_PORT,
        SAGEMAKER_MODELS,
        SAGEMAKER_WORD,
        Limits,
        ServerSettings,
        TlsFiles,
        read_api_keys,
        sagemaker_port,
    )

    if log_format not in ("json", "text"):
        raise typer.BadParameter("It is json or text.", param_hint="--log-format")
    if control_mode not in CONTROL_MODES:
        raise typer.BadParameter(f"It is one of {', '.join(CONTROL_MODES)}.", param_hint="--model-control-mode")
    if isolation is not None and isolation not in ISOLATIONS:
        raise typer.BadParameter(f"It is one of {', '.join(ISOLATIONS)}.", param_hint="--isolation")
    if precision is not None:
        precision_named(precision)
    if (tls_certificate is None) != (tls_key is None):
        raise typer.BadParameter("A certificate and its key go together.", param_hint="--tls-cert")
    if sagemaker and (repository is None or (repository == SAGEMAKER_WORD and not repository.exists())):
        repository = SAGEMAKER_MODELS
    lending = None
    if accelerator is None:
        given = {"--size": size, "--memory-mib": memory, "--concurrency": concurrency, "--slices": slices}
        if named := [
            name for name, value in {**given, "--turns": turns, "--isolate": isolate or None}.items() if value
        ]:
            raise typer.BadParameter("It is about slices of an accelerator; name one.", param_hint=named[0])
    else:
        if repository is not None:
            raise typer.BadParameter("What is lent is an accelerator; clients bring models.", param_hint="REPOSITORY")
        lending = LendingSettings(
            accelerator,
            size_of(size, memory, concurrency),
            slices=slices,
            lease_s=lease_secs,
            turns=turns,
            isolate=isolate,
        )
        repository, http_port = Path(), -1 if http_port is None else http_port
    if repository is None:
        raise typer.BadParameter("Name a model repository, or a model.", param_hint="REPOSITORY")
    settings = ServerSettings(
        repository,
        control_mode=control_mode,
        load=tuple(load or ()),
        poll_s=poll,
        backend=backend,
        trust=trust,
        precision=precision,
        isolation=isolation,
        max_batch_size=max_batch,
        max_queue_delay_us=queue_delay,
        max_queue=max_queue,
        latency_target_ms=latency_target,
        load_threads=load_threads,
        max_resident_models=max_models,
        max_resident_bytes=None if max_memory is None else max_memory * 2**20,
        host=host or ("0.0.0.0" if sagemaker else "127.0.0.1"),
        http_port=_wanted(http_port, sagemaker_port() if sagemaker else HTTP_PORT),
        grpc_port=_wanted(grpc_port, None if sagemaker else GRPC_PORT),
        metrics_port=_wanted(metrics_port, None if sagemaker else METRICS_PORT),
        api_keys=read_api_keys(api_keys),
        # SageMaker reaches its container from outside, and lets nobody else.
        insecure=insecure or sagemaker,
        tls=TlsFiles(tls_certificate, tls_key, tls_client_ca) if tls_certificate and tls_key else None,
        limits=Limits(body_bytes=max_body * 2**20, connections=max_connections, request_s=request_timeout),
        shared_memory=shared_memory,
        local_socket=local_socket,
        otlp_endpoint=otlp_endpoint,
        exit_on_error=exit_on_error,
        drain_s=drain,
        log_requests=log_requests,
        sagemaker=sagemaker,
        default_model=default_model,
        lending=lending,
    )
    with logging_to_stderr("json" if log_format == "json" else "text"):
        run(settings, lambda ports: _announce(settings, ports))


def _wanted(port: int | None, default: int | None) -> int | None:
    if port is None:
        return default
    return None if port < 0 else port


def _announce(settings: ServerSettings, ports: Mapping[str, int]) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    secure = "s" if settings.tls is not None else ""
    for name, port in ports.items():
        scheme = f"{'grpc' if name == 'grpc' else 'http'}{secure if name != 'metrics' else ''}"
        print(f"{name}: {scheme}://{host}:{port}", flush=True)
    if not settings.api_keys:
        reach = "anyone who can reach the port" if settings.insecure else "this machine only"
        print(f"open to {reach}: there is no API key", file=sys.stderr, flush=True)
