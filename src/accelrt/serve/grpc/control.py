"""The methods that carry no tensors: health, metadata, configuration, statistics, the repository, shared memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from google.protobuf import json_format

from accelrt.errors import NotAllowed, RequestError
from accelrt.protocol.leases import PRECISION_EXTENSION
from accelrt.protocol.messages import METHODS, message
from accelrt.serve.grpc.access import is_local
from accelrt.serve.interface import Duration, Service
from accelrt.serve.shared_memory import SharedMemoryRegistry

SHARED_MEMORY = "system_shared_memory"
EXTENSIONS = (
    "schedule_policy",
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "statistics",
    SHARED_MEMORY,
    "parameters",
    PRECISION_EXTENSION,
)
"""What is served beyond the protocol itself, in Triton's words."""

ABSENT: Mapping[str, str] = {
    "CudaSharedMemoryStatus": "CUDA shared memory is not offered",
    "CudaSharedMemoryRegister": "CUDA shared memory is not offered; system shared memory is",
    "CudaSharedMemoryUnregister": "CUDA shared memory is not offered",
    "TraceSetting": "Tracing is not set by requests",
    "LogSettings": "Logging is not set by requests",
}
"""Methods of the protocol that this server does not have, and what it answers."""


def server_version() -> str:
    """Return accelrt's version."""
    try:
        return version("accelrt")
    except PackageNotFoundError:
        return "unknown"


class Control:
    """Answers everything but inference. Each method takes a request's message and the caller's peer."""

    def __init__(self, service: Service, regions: SharedMemoryRegistry, extensions: Sequence[str] = EXTENSIONS) -> None:
        self._service, self._regions, self._extensions = service, regions, extensions

    def methods(self) -> Mapping[str, Callable[[Any, str], Any]]:
        """Return what answers each method, by its name in the protocol."""
        return {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelConfig": self.model_config,
            "ModelStatistics": self.model_statistics,
            "RepositoryIndex": self.repository_index,
            "RepositoryModelLoad": self.load,
            "RepositoryModelUnload": self.unload,
            "SystemSharedMemoryStatus": self.shared_memory_status,
            "SystemSharedMemoryRegister": self.shared_memory_register,
            "SystemSharedMemoryUnregister": self.shared_memory_unregister,
        }

    async def server_live(self, request: Any, peer: str) -> Any:
        return _reply("ServerLive", live=self._service.live())

    async def server_ready(self, request: Any, peer: str) -> Any:
        return _reply("ServerReady", ready=self._service.ready())

    async def model_ready(self, request: Any, peer: str) -> Any:
        return _reply("ModelReady", ready=self._service.find(request.name, request.version) is not None)

    async def server_metadata(self, request: Any, peer: str) -> Any:
        return _reply("ServerMetadata", name="accelrt", version=server_version(), extensions=self._extensions)

    async def model_metadata(self, request: Any, peer: str) -> Any:
        found = (await self._service.model(request.name, request.version)).metadata
        tensor = message("ModelMetadataResponse.TensorMetadata")
        inputs, outputs = (
            [tensor(name=port.name, datatype=port.datatype, shape=port.shape) for port in ports]
            for ports in (found.inputs, found.outputs)
        )
        return _reply(
            "ModelMetadata",
            name=found.name,
            versions=found.versions,
            platform=found.platform,
            inputs=inputs,
            outputs=outputs,
        )

    async def model_config(self, request: Any, peer: str) -> Any:
        config = dict((await self._service.model(request.name, request.version)).config)
        reply = _reply("ModelConfig")
        # What a configuration holds beyond Triton's own is for JSON readers; the message has no place for it.
        json_format.ParseDict(config, reply.config, ignore_unknown_fields=True)
        return reply

    async def model_statistics(self, request: Any, peer: str) -> Any:
        batch = message("InferBatchStatistics")
        return _reply(
            "ModelStatistics",
            model_stats=[
                message("ModelStatistics")(
                    name=one.name,
                    version=one.version,
                    last_inference=one.last_inference_ms,
                    inference_count=one.inference_count,
                    execution_count=one.execution_count,
                    inference_stats=message("InferStatistics")(
                        success=_duration(one.success),
                        fail=_duration(one.fail),
                        queue=_duration(one.queue),
                        compute_input=_duration(one.compute_input),
                        compute_infer=_duration(one.compute_infer),
                        compute_output=_duration(one.compute_output),
                    ),
                    batch_stats=[
                        batch(
                            batch_size=size,
                            compute_input=_duration(before),
                            compute_infer=_duration(during),
                            compute_output=_duration(after),
                        )
                        for size, (before, during, after) in sorted(one.batches.items())
                    ],
                )
                for one in self._service.statistics(request.name, request.version)
            ],
        )

    async def repository_index(self, request: Any, peer: str) -> Any:
        _only_one_repository(request.repository_name)
        entry = message("RepositoryIndexResponse.ModelIndex")
        return _reply(
            "RepositoryIndex",
            models=[
                entry(name=one.name, version=one.version, state=one.state, reason=one.reason)
                for one in self._service.index(ready=request.ready)
            ],
        )

    async def load(self, request: Any, peer: str) -> Any:
        _only_one_repository(request.repository_name)
        await self._service.load(request.model_name, _parameters(request))
        return _reply("RepositoryModelLoad")

    async def unload(self, request: Any, peer: str) -> Any:
        _only_one_repository(request.repository_name)
        dependents = _parameters(request).get("unload_dependents", False)
        if not isinstance(dependents, bool):
            raise RequestError("The parameter unload_dependents must be a bool.")
        await self._service.unload(request.model_name, dependents=dependents)
        return _reply("RepositoryModelUnload")

    async def shared_memory_status(self, request: Any, peer: str) -> Any:
        reply = _reply("SystemSharedMemoryStatus")
        for name, region in self._local(peer).status(request.name).items():
            told = reply.regions[name]
            told.name, told.key, told.offset, told.byte_size = name, region.key, region.offset, region.byte_size
        return reply

    async def shared_memory_register(self, request: Any, peer: str) -> Any:
        self._local(peer).register(request.name, request.key, request.offset, request.byte_size)
        return _reply("SystemSharedMemoryRegister")

    async def shared_memory_unregister(self, request: Any, peer: str) -> Any:
        self._local(peer).unregister(request.name)
        return _reply("SystemSharedMemoryUnregister")

    def _local(self, peer: str) -> SharedMemoryRegistry:
        return local_regions(self._regions, peer)


def local_regions(regions: SharedMemoryRegistry, peer: str) -> SharedMemoryRegistry:
    """Return the regions, if the caller shares this machine's memory.

    Raises:
        NotAllowed: It does not.
    """
    if not is_local(peer):
        raise NotAllowed("Shared memory is for clients on the server's own machine.", hint="Send the tensors.")
    return regions


def _reply(method: str, **fields: Any) -> Any:
    return METHODS[method].response(**fields)


def _duration(one: Duration) -> Any:
    return message("StatisticDuration")(count=one.count, ns=one.ns)


def _parameters(request: Any) -> dict[str, str | bytes | int | bool]:
    chosen = {key: (value, value.WhichOneof("parameter_choice")) for key, value in request.parameters.items()}
    return {key: getattr(value, choice) for key, (value, choice) in chosen.items() if choice is not None}


def _only_one_repository(name: str) -> None:
    if name:
        raise RequestError(f"There is no repository {name[:80]!r}.", hint="Leave repository_name empty.")
