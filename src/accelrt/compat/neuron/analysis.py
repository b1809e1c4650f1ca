"""What of a model runs on the engine that was asked for, for the vendor's functions that tell it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelrt.compat.neuron.compiling import share_on_target

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact


@dataclass(frozen=True, slots=True)
class Refused:
    """A node that the engine asked for does not run: its operator, its name, where it runs and why."""

    kind: str
    name: str
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Analysis:
    """Operators by whether the engine asked for runs them; a model that runs whole counts as supported."""

    share: float
    supported: Mapping[str, int]
    refused: tuple[Refused, ...]

    @property
    def counts(self) -> Mapping[str, int]:
        """All operators."""
        return Counter(self.supported) + Counter(one.kind for one in self.refused)


def analysed(artifact: Artifact) -> Analysis:
    """Read an artifact's placement."""
    place = artifact.placement
    reasons = {one.node: one.reason for one in place.refusals}
    supported: Counter[str] = Counter()
    refused = []
    for segment in place.segments:
        for node in segment.nodes:
            if segment.engine == place.primary:
                supported[node.kind] += 1
            else:
                reason = reasons.get(node.name, "its neighbours run there")
                refused.append(Refused(node.kind, node.name, segment.engine, reason))
    return Analysis(share_on_target(artifact), supported, tuple(refused))
