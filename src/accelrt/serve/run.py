"""A whole server: the models, a front end for each protocol, and an end that loses no request."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, cast

from accelrt.errors import ServingError
from accelrt.serve.interface import Lending, Service
from accelrt.serve.settings import ServerSettings
from accelrt.serve.shared_memory import SharedMemoryRegistry
from accelrt.serve.telemetry import Telemetry, connect

logger = logging.getLogger("accelrt.serve")

EXTRA_HINT = "Install it with: pip install 'accelrt[serve]'"
_LEAST_DRAIN_S = 2.0
"""For unloading models, even if the front ends took all the time there was."""
SWITCH_S = 0.0005
"""How long a thread may keep Python's interpreter lock that another waits for. While models are loaded, the front end
waits so long each time it has let go of the lock; Python's own 5 ms would be most of what such a request takes."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunningService(Service, Protocol):
    """A service as this module starts and ends it."""

    async def start(self) -> None:
        """Load what is to be loaded at the start."""
        ...

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, answer those that were taken, and unload everything, in ``timeout_s`` at most."""
        ...


class FrontEnd(Protocol):
    """A front end that listens."""

    @property
    def port(self) -> int:
        """Where."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Accept nothing more, answer what is under way for ``grace_s`` seconds at most, and close."""
        ...


Starter = Callable[[Service, ServerSettings, SharedMemoryRegistry, Telemetry | None], Awaitable[FrontEnd]]


async def _start_http(
    service: Service, settings: ServerSettings, regions: SharedMemoryRegistry, telemetry: Telemetry | None
) -> FrontEnd:
    module = importlib.import_module("accelrt.serve.http.server")
    return cast("FrontEnd", await module.start(service, settings, regions=regions, telemetry=telemetry))


async def _start_grpc(
    service: Service, settings: ServerSettings, regions: SharedMemoryRegistry, telemetry: Telemetry | None
) -> FrontEnd:
    for needed in ("grpc", "google.protobuf"):  # so that what is missing is named, whatever the front end makes of it
        importlib.import_module(needed)
    module, tls = importlib.import_module("accelrt.serve.grpc"), settings.tls
    lending, longest = settings.lending, settings.limits.body_bytes
    if lending is not None:  # what fits a slice can be sent to it
        longest = max(longest, lending.size.memory_bytes + _BESIDE_A_PROGRAM)
    own = module.GrpcSettings(
        host=settings.host,
        port=settings.grpc_port,
        max_message_bytes=min(longest, _LARGEST_MESSAGE),
        shared_memory=settings.shared_memory and lending is None,
        local_socket=settings.local_socket,
        certificate=None if tls is None else tls.certificate,
        private_key=None if tls is None else tls.key,
        client_ca=None if tls is None else tls.client_ca,
        api_keys=settings.api_keys,
    )
    lender = cast("Lending", service) if lending is not None else None
    found = await module.start(service, own, regions=regions, lender=lender, telemetry=telemetry)
    return cast("FrontEnd", found)


async def _start_metrics(
    service: Service, settings: ServerSettings, regions: SharedMemoryRegistry, telemetry: Telemetry | None
) -> FrontEnd:
    module = importlib.import_module("accelrt.serve.metrics")
    return cast("FrontEnd", await module.start(service, settings))


# HTTP is first: it says whether the server lives while models are loaded.
_STARTERS: Mapping[str, Starter] = {"http": _start_http, "grpc": _start_grpc, "metrics": _start_metrics}
_LARGEST_MESSAGE = 2**31 - 1  # of gRPC
_BESIDE_A_PROGRAM = 1 << 16  # bytes of a message that loads it

Announce = Callable[[Mapping[str, int]], None]


def serve(
    settings: ServerSettings, announce: Announce, make_service: Callable[[ServerSettings], RunningService] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; the first lets what is under way be answered, a second one ends the process.

    Args:
        settings: What to serve, and how.
        announce: Called when all models are ready, with the ports by front end.
        make_service: Makes the service, by default the one over a model repository.

    Raises:
        AccelrtError: The server cannot start.
    """
    sys.setswitchinterval(SWITCH_S)
    make_loop = _loop_factory()
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(_serve(settings, announce, make_service or _model_service))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ModuleNotFoundError:
        return None  # asyncio's own loop does, at a lower rate
    return cast("Callable[[], asyncio.AbstractEventLoop]", uvloop.new_event_loop)


def _model_service(settings: ServerSettings) -> RunningService:
    if settings.lending is not None:
        from accelrt.serve.lending.lender import Lender

        return Lender(settings.lending, trust=settings.trust, drain_s=settings.drain_s)
    from accelrt.serve.models.service import ModelService
    from accelrt.serve.models.settings import ModelSettings, ServiceSettings

    return ModelService(
        ServiceSettings(
            (settings.repository,),
            control=settings.control_mode,
            load_models=settings.load,
            poll_s=settings.poll_s,
            trust=settings.trust,
            defaults=ModelSettings(
                backend=settings.backend,
                precision=settings.precision,
                isolation=settings.isolation,
                max_batch_size=settings.max_batch_size,
                max_queue_delay_us=settings.max_queue_delay_us,
                max_queue=settings.max_queue,
                latency_target_ms=settings.latency_target_ms,
            ),
            load_threads=settings.load_threads,
            max_resident_models=settings.max_resident_models,
            max_resident_bytes=settings.max_resident_bytes,
            drain_s=settings.drain_s,
        )
    )


async def _serve(
    settings: ServerSettings, announce: Announce, make_service: Callable[[ServerSettings], RunningService]
) -> None:
    stopped = _watch_signals()
    telemetry = None if settings.otlp_endpoint is None else connect(settings.otlp_endpoint)
    service = make_service(settings)
    # One for all front ends: what a client registers over HTTP it may use over gRPC.
    # Not where slices are lent: regions are the whole server's, and clients may not read each other's.
    offered = settings.shared_memory and settings.lending is None
    regions = SharedMemoryRegistry(enabled=offered, largest=settings.limits.body_bytes)
    front_ends: dict[str, FrontEnd] = {}
    try:
        # Before the models are loaded, so that an orchestrator sees a server that lives and is not ready.
        for name, start in _STARTERS.items():
            if getattr(settings, f"{name}_port") is not None:
                front_end = await _started(name, start, service, settings, regions, telemetry)
                if front_end is not None:
                    front_ends[name] = front_end
        if not front_ends:
            raise ServingError("The server has no front end: none was asked for, or none could be imported.")
        if await _first_of(service.start(), stopped):
            _report_failures(service, settings)
            # What is there by now stays: no collection has to look at it again.
            gc.collect()
            gc.freeze()
            announce({name: front_end.port for name, front_end in front_ends.items()})
            await stopped.wait()
            logger.info("stopping", extra={"grace_s": settings.drain_s})
    finally:
        await _end(service, front_ends, settings.drain_s)
        regions.unregister()
        if telemetry is not None:
            await telemetry.close()
    logger.info("stopped")


def _report_failures(service: Service, settings: ServerSettings) -> None:
    """Log the models that could not be loaded.

    Raises:
        ServingError: There are some, and the settings say that the server ends then.
    """
    failed = [entry for entry in service.index() if entry.state == "UNAVAILABLE" and entry.reason]
    for entry in failed:
        extra = {"model": entry.name, "version": entry.version, "reason": entry.reason}
        logger.error("a model could not be loaded", extra=extra)
    if failed and settings.exit_on_error:
        names = ", ".join(dict.fromkeys(entry.name for entry in failed))
        raise ServingError(f"Models could not be loaded: {names}. The first says: {failed[0].reason}")


def _watch_signals() -> asyncio.Event:
    stopped = asyncio.Event()

    def on_signal(number: int) -> None:
        if not stopped.is_set():
            stopped.set()
            return
        logger.warning("ended by a second signal; requests under way are lost")
        logging.shutdown()
        os._exit(128 + number)  # threads may be in the middle of a model, and would be waited for

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    return stopped


async def _started(
    name: str,
    start: Starter,
    service: Service,
    settings: ServerSettings,
    regions: SharedMemoryRegistry,
    telemetry: Telemetry | None,
) -> FrontEnd | None:
    """Start a front end; if what it needs is not installed, say so and go on without it, but not without HTTP."""
    try:
        return await start(service, settings, regions, telemetry)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
    if name == "http":
        raise ServingError(f"The HTTP front end needs {missing}, which is not installed.", hint=EXTRA_HINT)
    logger.warning("no %s front end: it needs %s, which is not installed. %s", name, missing, EXTRA_HINT)
    return None


async def _first_of(starting: Any, stopped: asyncio.Event) -> bool:
    """Wait for the models, and return True; or give them up when the server is to stop, and return False."""
    start, stop = asyncio.ensure_future(starting), asyncio.ensure_future(stopped.wait())
    try:
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            return False
        await start  # raises what it raised
        return True
    finally:
        for task in (start, stop):
            task.cancel()
        await asyncio.gather(start, stop, return_exceptions=True)


async def _end(service: RunningService, front_ends: Mapping[str, FrontEnd], grace_s: float) -> None:
    """Stop accepting, have everything answered, and unload; whatever fails, the rest is ended too.

    A model that hangs must not keep the process: what the front ends did not use of the time is left for the models.
    """
    deadline = time.monotonic() + grace_s
    steps = [front_end.stop(grace_s) for name, front_end in front_ends.items() if name != "metrics"]
    problems = await asyncio.gather(*steps, return_exceptions=True)
    left_s = max(_LEAST_DRAIN_S, deadline - time.monotonic())
    problems += await asyncio.gather(service.drain(left_s), return_exceptions=True)
    # Last, so that what happens until then is measured.
    metrics = [front_end.stop(0.0) for name, front_end in front_ends.items() if name == "metrics"]
    problems += await asyncio.gather(*metrics, return_exceptions=True)
    for problem in problems:
        if isinstance(problem, BaseException):
            logger.error("could not end in order: %s", problem, exc_info=problem)
