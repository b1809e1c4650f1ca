"""What a client may wish of how its model is computed, and what it is told of what became of that."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from accelrt.errors import AccelrtError, RequestError
from accelrt.precision.plan import precision_named
from accelrt.protocol.leases import PLACEMENT, PRECISION
from accelrt.serve.models.config import ModelConfig
from accelrt.serve.models.settings import ModelSettings

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact


def with_wishes(settings: ModelSettings, config: ModelConfig | None) -> ModelSettings:
    """Return a model's settings with what its configuration's parameters ask for: `PRECISION`.

    Raises:
        RequestError: There is no such precision.
    """
    wish = None if config is None else config.parameters.get(PRECISION)
    if wish is None:
        return settings
    try:
        return replace(settings, precision=precision_named(wish))
    except AccelrtError as error:
        raise RequestError(f"The parameter {PRECISION} cannot be met: {error.message}") from error


def placement_note(artifact: Artifact) -> Mapping[str, str]:
    """Return the parameter `PLACEMENT`: how many nodes run on which engine in which precision, as JSON.

    Empty for an artifact that says nothing of its nodes.
    """
    try:
        segments = artifact.placement.segments
    except AccelrtError:
        return {}
    counts: Counter[tuple[str, str]] = Counter()
    for segment in segments:
        counts[segment.engine, segment.precision] += len(segment.nodes)
    told = [{"engine": engine, "precision": precision, "nodes": count} for (engine, precision), count in counts.items()]
    return {PLACEMENT: json.dumps(told)}
