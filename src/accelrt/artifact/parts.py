"""Parts of an artifact that load as artifacts of their own: what is specialised to one batch size, or one stage.

A part lies in the folder of the whole and keeps it there. So whatever loads an artifact, places it and recovers its
segments does the same for a part, and need not know of batch sizes and stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Entry
from accelrt.artifact.manifest import Manifest
from accelrt.errors import CorruptArtifact
from accelrt.graph.types import Port, Signature, TensorType

if TYPE_CHECKING:
    from accelrt.graph.model import Graph
    from accelrt.partition.report import Placement
    from accelrt.precision.report import VerificationReport


class Part(Artifact):
    """Some segments of an artifact.

    Args:
        whole: What it is a part of.
        chosen: The segments, by index.
        manifest: What the part holds: those segments, and its own signature.
        graph: Makes the source graph in which the nodes of the part are found by name.
    """

    def __init__(self, whole: Artifact, chosen: Sequence[int], manifest: Manifest, graph: Callable[[], Graph]) -> None:
        super().__init__(Entry(whole.folder, manifest, unfinished=True))
        # The whole is referred to, so that the folder stays.
        self._whole, self._chosen, self._graph = whole, tuple(chosen), graph

    @cached_property
    def placement(self) -> Placement:
        whole = self._whole.placement
        try:
            return replace(whole, segments=tuple(whole.segments[index] for index in self._chosen))
        except IndexError as error:
            raise CorruptArtifact("The placement of the artifact does not list all of its segments.") from error

    @cached_property
    def verification(self) -> VerificationReport | None:
        """None: figures are of the whole."""
        return None

    def source_graph(self) -> Graph:
        return self._graph()


def variant(artifact: Artifact, batch: int) -> Part:
    """Return what of an artifact is specialised to a batch size; its inputs and outputs have that first dimension."""
    segments = artifact.manifest.segments
    chosen = [index for index, segment in enumerate(segments) if segment.batch == batch]
    signature = artifact.manifest.signature
    bound = Signature(
        tuple(_with_rows(port, batch) for port in signature.inputs),
        tuple(_with_rows(port, batch) for port in signature.outputs),
    )

    def graph() -> Graph:
        from accelrt.graph.bind import bind_first_dimension

        return bind_first_dimension(artifact.source_graph(), batch)

    manifest = replace(
        artifact.manifest, signature=bound, segments=tuple(replace(segments[index], batch=None) for index in chosen)
    )
    return Part(artifact, chosen, manifest, graph)


def _with_rows(port: Port, rows: int) -> Port:
    if not isinstance(port.type, TensorType) or not port.type.shape:
        raise CorruptArtifact(f"The artifact is specialised to batch sizes, and {port.name!r} is {port.type}.")
    return Port(port.name, TensorType(port.type.dtype, (rows, *port.type.shape[1:])))


def stages(artifact: Artifact) -> list[Part]:
    """Return the stages of an artifact that is a pipeline, in order.

    The inputs of a stage are what it reads from outside, its outputs what later stages read and the model yields.
    """
    manifest = artifact.manifest
    wanted = set(manifest.signature.output_names)
    parts: list[Part] = []
    for stage in reversed(range(manifest.stages)):
        chosen = [index for index, segment in enumerate(manifest.segments) if segment.stage == stage]
        inside = [manifest.segments[index].signature for index in chosen]
        written = {port.name: port for signature in inside for port in signature.outputs}
        read = {port.name: port for signature in inside for port in signature.inputs if port.name not in written}
        outputs = tuple(port for name, port in written.items() if name in wanted)
        wanted.update(read)
        own = replace(
            manifest,
            signature=Signature(tuple(read.values()), outputs),
            segments=tuple(replace(manifest.segments[index], stage=None) for index in chosen),
        )
        parts.append(Part(artifact, chosen, own, artifact.source_graph))
    return parts[::-1]
