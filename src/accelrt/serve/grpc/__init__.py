"""The gRPC front end: ``inference.GRPCInferenceService``, as Open Inference Protocol and Triton clients speak it.

Needs the extra ``serve``. `start` is the way in; importing this package imports neither gRPC nor protobuf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelrt.serve.grpc.settings import GrpcSettings

if TYPE_CHECKING:
    from accelrt.serve.grpc.server import Handle
    from accelrt.serve.interface import Lending, Service
    from accelrt.serve.shared_memory import SharedMemoryRegistry
    from accelrt.serve.telemetry import Telemetry

__all__ = ["GrpcSettings", "start"]


async def start(
    service: Service,
    settings: GrpcSettings | None = None,
    *,
    regions: SharedMemoryRegistry | None = None,
    lender: Lending | None = None,
    telemetry: Telemetry | None = None,
) -> Handle:
    """Serve a service's models in the running event loop, and return a handle with ``port`` and ``stop``.

    Args:
        service: The models.
        settings: Where and how; by default a free port on the loopback interface.
        regions: Shared memory, if it is shared with another front end.
        lender: Where each client has models of its own, tells them apart; calls then go to what it returns.
        telemetry: Where traces go; None for nowhere.

    Raises:
        BackendUnavailable: gRPC or protobuf is not installed.
        OptionError: A setting cannot be: a file that cannot be read, a key that is too short.
        ServingError: The address cannot be listened on.
    """
    from accelrt.errors import BackendUnavailable

    try:
        from accelrt.serve.grpc.server import serve
    except ImportError as error:
        raise BackendUnavailable(
            f"The gRPC front end needs a package that is missing: {error}.", hint="pip install 'accelrt[serve]'"
        ) from error
    return await serve(service, settings or GrpcSettings(), regions, lender, telemetry)
