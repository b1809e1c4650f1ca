"""What the control routes say, as plain data: metadata, statistics, the repository's index."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import accelrt
from accelrt.serve.interface import Duration, IndexEntry, ModelMetadata, ModelStatistics, TensorMetadata
from accelrt.serve.shared_memory import Region


def server_metadata(extensions: Sequence[str]) -> dict[str, Any]:
    """Describe the server."""
    return {"name": "accelrt", "version": accelrt.__version__, "extensions": list(extensions)}


def model_metadata(metadata: ModelMetadata) -> dict[str, Any]:
    """Describe a model."""
    return {
        "name": metadata.name,
        "versions": list(metadata.versions),
        "platform": metadata.platform,
        "inputs": _tensors(metadata.inputs),
        "outputs": _tensors(metadata.outputs),
    }


def _tensors(tensors: Iterable[TensorMetadata]) -> list[dict[str, Any]]:
    return [{"name": item.name, "datatype": item.datatype, "shape": list(item.shape)} for item in tensors]


def regions(known: Iterable[Region]) -> list[dict[str, Any]]:
    """Describe regions of shared memory."""
    return [{"name": one.name, "key": one.key, "offset": one.offset, "byte_size": one.byte_size} for one in known]


def index(entries: Iterable[IndexEntry]) -> list[dict[str, str]]:
    """Describe the repository."""
    return [
        {"name": entry.name}
        | ({"version": entry.version} if entry.version else {})
        | {"state": entry.state, "reason": entry.reason}
        for entry in entries
    ]


def statistics(items: Sequence[ModelStatistics]) -> dict[str, Any]:
    """Describe what models did; there is no cache of answers, so its counts are none."""
    return {"model_stats": [_statistics(item) for item in items]}


def _statistics(item: ModelStatistics) -> dict[str, Any]:
    none = _duration(Duration())
    return {
        "name": item.name,
        "version": item.version,
        "last_inference": item.last_inference_ms,
        "inference_count": item.inference_count,
        "execution_count": item.execution_count,
        "inference_stats": {
            "success": _duration(item.success),
            "fail": _duration(item.fail),
            "queue": _duration(item.queue),
            "compute_input": _duration(item.compute_input),
            "compute_infer": _duration(item.compute_infer),
            "compute_output": _duration(item.compute_output),
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": _batches(item.batches),
        "memory_usage": [],
        "pending": item.pending,
        "rejected": item.rejected,
        "timed_out": item.timed_out,
    }


def _batches(batches: Mapping[int, tuple[Duration, Duration, Duration]]) -> list[dict[str, Any]]:
    names = ("compute_input", "compute_infer", "compute_output")
    return [
        {"batch_size": size} | {name: _duration(part) for name, part in zip(names, parts, strict=True)}
        for size, parts in sorted(batches.items())
    ]


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
