"""Copies of a model made of parts: one for each batch size, one for each stage of a pipeline, or both."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.parts import stages, variant
from accelrt.errors import DeviceLost, ExecutionError
from accelrt.graph.types import Signature, Value
from accelrt.runtime.buckets import BucketRunner, OverlappingBucketRunner
from accelrt.runtime.faults import Faults
from accelrt.runtime.pipeline import Pipeline, chain
from accelrt.runtime.replica import Replica
from accelrt.runtime.runner import Outputs, Runner
from accelrt.runtime.traffic import Link


def divide(artifact: Artifact) -> dict[int | None, list[Artifact]]:
    """Return the stages for each batch size; None stands for any, and a model that is no pipeline is one stage."""
    variants: dict[int | None, Artifact] = {size: variant(artifact, size) for size in artifact.manifest.batch_sizes}
    return {
        size: list(stages(part)) if part.manifest.stages else [part]
        for size, part in (variants or {None: artifact}).items()
    }


def assemble(
    signature: Signature,
    faults: Faults,
    parts: Mapping[int | None, Sequence[Replica]],
    devices: tuple[str, ...],
) -> Replica:
    """Make one copy of a model from its loaded parts; of a single part, that one.

    The threads of pipelines begin here, so that nothing is left of them if a part cannot be loaded.

    Args:
        signature: That of the model.
        faults: Those of the session.
        parts: As `divide` gives them.
        devices: Names of the devices of all parts together.
    """
    rows = list(parts.values())
    if len(rows) == 1 and len(rows[0]) == 1 and None in parts:
        return rows[0][0]
    every = [replica for row in rows for replica in row]
    if len(rows[0]) == 1:
        buckets = BucketRunner({size: _Part(row[0]) for size, row in parts.items() if size is not None})
        parallelism = max(replica.parallelism for replica in every)
        return Assembly(signature, faults, every, buckets, devices=devices, parallelism=parallelism)
    if None in parts:
        pipeline = _pipeline(rows[0], signature)
        return Assembly(signature, faults, every, pipeline, devices=devices, parallelism=pipeline.capacity)
    piped = OverlappingBucketRunner(
        {size: _pipeline(row, signature) for size, row in parts.items() if size is not None}
    )
    return Assembly(signature, faults, every, piped, devices=devices, parallelism=piped.capacity)


class Assembly(Replica):
    """A copy of a model whose calls go through parts of it; to whoever feeds it, a replica like any other.

    It is retired as a whole: when one part loses its device, calls leave all of them.

    Args:
        signature: That of the model.
        faults: Policy and counts, shared by the replicas of a session.
        parts: All of them, in the order of the segments.
        runner: Leads a call through the parts; closed with this.
        devices: Names of the devices of all parts.
        parallelism: Calls in flight that keep it busy.
    """

    def __init__(
        self,
        signature: Signature,
        faults: Faults,
        parts: Sequence[Replica],
        runner: Runner,
        *,
        devices: tuple[str, ...],
        parallelism: int,
    ) -> None:
        super().__init__(signature, (), faults, devices=devices, parallelism=parallelism)
        self._parts, self._runner = tuple(parts), runner
        # The threads of a pipeline refer to its parts. If those referred to the whole, a session that is dropped
        # without being closed would never be collected.
        whole = weakref.ref(self)
        for part in parts:
            part.retire = partial(_retire, whole)

    @property
    def engines(self) -> tuple[str, ...]:
        return tuple(engine for part in self._parts for engine in part.engines)

    @property
    def errors(self) -> int:
        return sum(part.errors for part in self._parts)

    @property
    def padding_rows(self) -> int:
        return self._runner.stats().padding if isinstance(self._runner, BucketRunner) else 0

    @property
    def links(self) -> tuple[Link, ...]:
        return tuple(dict.fromkeys(link for part in self._parts for link in part.links))

    def compute(self, feeds: Mapping[str, Value], *, stay: bool = False) -> Outputs:
        """Compute one call. Outputs are on the host whatever ``stay`` says: rows are cut and parts joined there."""
        return self._runner.run(feeds)

    def shortcut(self, drop: Callable[[], None]) -> Callable[[Mapping[str, Value]], Outputs] | None:
        """None: no single program answers a call."""
        return None

    def trace(self, feeds: Mapping[str, Value]) -> Iterator[tuple[dict[str, Value], Outputs]]:
        """Compute one call segment by segment, stage after stage.

        Raises:
            ExecutionError: It is for several batch sizes, so there is no one order of segments: trace the part for one
                of them, see `accelrt.artifact.parts.variant`.
        """
        if not isinstance(self._runner, Pipeline):
            raise ExecutionError("A session for several batch sizes cannot be traced as one.")
        values = dict(feeds)
        for part in self._parts:
            for given, outputs in part.trace({name: values[name] for name in part.signature.input_names}):
                values.update(outputs)
                yield given, outputs

    def retire_parts(self) -> None:
        """Have calls that come to a part leave it, once this copy is out of service."""
        for part in self._parts:
            part.retired = True

    def close(self) -> None:
        self._runner.close()
        self.retire = None


def _retire(whole: weakref.ref[Assembly], part: Replica, error: DeviceLost) -> bool:
    """Take the copy that a part belongs to out of service, if others carry on; tell whether it is out."""
    assembly = whole()
    if assembly is None or assembly.retire is None or not assembly.retire(assembly, error):
        return False
    assembly.retire_parts()
    return True


def _pipeline(replicas: Sequence[Replica], signature: Signature) -> Pipeline:
    runners = [(_Part(one), one.signature.input_names, one.signature.output_names) for one in replicas]
    return chain(runners, signature.output_names)


class _Part:
    """A replica as a part of another, which measures the whole."""

    def __init__(self, replica: Replica) -> None:
        self.run, self.close = replica.compute, replica.close
