"""What clients are told of a model: its metadata, and its configuration in Triton's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelrt.graph.types import Port, TensorType
from accelrt.protocol.datatypes import DATATYPES
from accelrt.serve.interface import ModelMetadata, ModelSnapshot, TensorMetadata
from accelrt.serve.models.config import DynamicBatching, ModelConfig, QueuePolicy
from accelrt.serve.models.loading import Facts, most_rows
from accelrt.serve.models.records import Slot
from accelrt.serve.models.scheduler import SchedulerPolicy
from accelrt.serve.models.served import LiveModel
from accelrt.serve.models.settings import DEFAULT_MAX_QUEUE, ModelSettings


def policy_of(settings: ModelSettings, config: ModelConfig | None, proved: bool) -> SchedulerPolicy:
    """Return how a model's queue works: its settings first, then Triton's configuration."""
    batching = (config.batching if config is not None else None) or DynamicBatching()
    queue = batching.policy
    if settings.timeout_ms is not None:
        queue = QueuePolicy(
            int(settings.timeout_ms * 1000), queue.delay, queue.allow_timeout_override, queue.max_queue_size
        )
    delay_us = batching.max_queue_delay_us if settings.max_queue_delay_us is None else settings.max_queue_delay_us
    rows = most_rows(settings, config) if proved else 1
    return SchedulerPolicy(
        max_rows=rows,
        delay_s=delay_us / 1e6,
        preferred=tuple(size for size in batching.preferred_batch_sizes if size <= rows),
        target_s=None if settings.latency_target_ms is None else settings.latency_target_ms / 1e3,
        levels=batching.priority_levels,
        default_level=batching.default_priority_level,
        max_queue=settings.max_queue or queue.max_queue_size or DEFAULT_MAX_QUEUE,
        queue=queue,
    )


def metadata_of(name: str, versions: Sequence[str], facts: Facts) -> ModelMetadata:
    """Return what the protocol tells about a model."""
    return ModelMetadata(
        name,
        tuple(versions),
        facts.platform,
        tuple(map(_tensor, facts.signature.inputs)),
        tuple(map(_tensor, facts.signature.outputs)),
    )


def _tensor(port: Port) -> TensorMetadata:
    if not isinstance(port.type, TensorType):
        return TensorMetadata(port.name, type(port.type).__name__.removesuffix("Type").upper(), (-1,))
    shape = port.type.shape
    dims = (-1,) if shape is None else tuple(dim if isinstance(dim, int) else -1 for dim in shape)
    return TensorMetadata(port.name, datatype_of(port.type.dtype), dims)


def datatype_of(dtype: str) -> str:
    """Return the protocol's datatype; a type that it lacks is named in capitals."""
    return DATATYPES.get(dtype, dtype.upper())


def config_of(
    metadata: ModelMetadata,
    facts: Facts,
    config: ModelConfig | None,
    policy: SchedulerPolicy,
    settings: ModelSettings,
    notes: Mapping[str, str],
) -> dict[str, Any]:
    """Return a model's configuration as JSON in the words of Triton's ``ModelConfig``.

    ``max_batch_size`` is 0 where rows are not proved independent, and then ``dims`` are whole shapes.
    """
    given = config or ModelConfig()
    rows = given.max_batch_size if given.max_batch_size is not None else policy.max_rows if facts.rows_proved else 0
    reshapes = {tensor.name: tensor.reshape for tensor in (*given.inputs, *given.outputs) if tensor.reshape is not None}

    def tensors(side: Sequence[TensorMetadata]) -> list[dict[str, Any]]:
        rowed = []
        for each in side:
            datatype = "STRING" if each.datatype == "BYTES" else each.datatype
            one: dict[str, Any] = {
                "name": each.name,
                "data_type": f"TYPE_{datatype}",
                "dims": list(each.shape[1:] if rows else each.shape),
            }
            if each.name in reshapes:
                one["reshape"] = {"shape": list(reshapes[each.name])}
            rowed.append(one)
        return rowed

    told: dict[str, Any] = {
        "name": metadata.name,
        "platform": given.platform or metadata.platform,
        "backend": given.backend or "accelrt",
        "version_policy": _versions(given),
        "max_batch_size": rows,
        "input": tensors(metadata.inputs),
        "output": tensors(metadata.outputs),
        "instance_group": [
            {
                "name": metadata.name,
                "kind": "KIND_CPU" if all(each.startswith("cpu") for each in facts.engines) else "KIND_AUTO",
                "count": settings.replicas or given.replicas or 1,
            }
        ],
        "default_model_filename": given.default_model_filename,
        "parameters": {key: {"string_value": value} for key, value in {**given.parameters, **notes}.items()},
    }
    if policy.max_rows > 1 or given.batching is not None:
        told["dynamic_batching"] = {
            "preferred_batch_size": list(policy.preferred),
            "max_queue_delay_microseconds": round(policy.delay_s * 1e6),
            "priority_levels": policy.levels,
            "default_priority_level": policy.default_level,
            "default_queue_policy": {
                "timeout_action": "DELAY" if policy.queue.delay else "REJECT",
                "default_timeout_microseconds": policy.queue.timeout_us,
                "allow_timeout_override": policy.queue.allow_timeout_override,
                "max_queue_size": policy.max_queue,
            },
        }
    return told


def _versions(config: ModelConfig) -> dict[str, Any]:
    policy = config.version_policy
    if policy.kind == "all":
        return {"all": {}}
    if policy.kind == "specific":
        return {"specific": {"versions": list(policy.versions)}}
    return {"latest": {"num_versions": policy.count}}


def snapshot_of(slot: Slot, live: LiveModel | None) -> ModelSnapshot:
    """Return the state of a version, of which ``live`` answers now."""
    latency = slot.statistics.summary()
    facts = None if live is None else live.facts
    return ModelSnapshot(
        name=slot.name,
        version=slot.version,
        state=slot.state,
        reason=slot.reason,
        engines=() if facts is None else facts.engines,
        devices=() if facts is None else facts.devices,
        rate=slot.statistics.rate(),
        p50_ms=latency.p50_ms,
        p99_ms=latency.p99_ms,
        waiting=slot.waiters + (0 if live is None else live.queue.waiting),
        resident_bytes=0 if facts is None else facts.resident_bytes,
        program_bytes=0 if facts is None else facts.program_bytes,
        placement={} if facts is None else facts.placement,
        batching="" if facts is None else facts.rows_reason,
        pinned=slot.plan.settings.pinned,
        pid=None if slot.predictor is None else slot.predictor.pid,
        restarts=0 if slot.predictor is None else slot.predictor.restarts,
        loads=slot.loads,
    )
