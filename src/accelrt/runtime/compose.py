"""Sessions made of sessions: one for each batch size, one for each stage of a pipeline, or both."""

from __future__ import annotations

from collections.abc import Callable

from accelrt.artifact.artifact import Artifact
from accelrt.artifact.parts import stages, variant
from accelrt.policy import Fallback
from accelrt.registry import REGISTRY, find_engine
from accelrt.runtime.buckets import BucketRunner, OverlappingBucketRunner
from accelrt.runtime.pipeline import Pipeline, chain
from accelrt.runtime.runner import Runner
from accelrt.runtime.session import Session


def is_composed(artifact: Artifact) -> bool:
    """Whether an artifact is for several batch sizes, or a pipeline."""
    return bool(artifact.manifest.batch_sizes or artifact.manifest.stages)


def composed_session(artifact: Artifact, load_part: Callable[[Artifact], Session], fallback: Fallback) -> Session:
    """Load the parts of an artifact and make one session of them.

    Args:
        artifact: For which `is_composed` holds.
        load_part: Loads a part, which is an artifact that `is_composed` does not hold for.
        fallback: As for `accelrt.load`; each part acts on it.

    Raises:
        AccelrtError: Whatever loading a part raises; what was loaded is closed before.
    """
    parts: list[Session] = []

    def loaded(part: Artifact) -> Session:
        parts.append(load_part(part))
        return parts[-1]

    try:
        # All are loaded before a pipeline begins its threads, so that a failure leaves none of them.
        make = _variants(artifact, loaded) if artifact.manifest.batch_sizes else _pipeline(artifact, loaded)
    except BaseException:
        for part in parts:
            part.close()
        raise
    runner = make()
    segments = artifact.manifest.segments
    engines = [find_engine(REGISTRY.backend(segment.backend), segment.engine) for segment in segments]
    workers = max((engine.caps.parallelism for engine in engines), default=1)
    return Session(
        artifact.signature,
        (),
        fallback=fallback,
        workers=max(workers, artifact.manifest.stages),
        keep=artifact,
        runner=runner,
        parts=parts,
    )


def _variants(artifact: Artifact, load_part: Callable[[Artifact], Session]) -> Callable[[], Runner]:
    variants = {size: variant(artifact, size) for size in artifact.manifest.batch_sizes}
    if artifact.manifest.stages:
        pipelines = {size: _pipeline(part, load_part) for size, part in variants.items()}
        return lambda: OverlappingBucketRunner({size: make() for size, make in pipelines.items()})
    runners = {size: _Part(load_part(part)) for size, part in variants.items()}
    return lambda: BucketRunner(runners)


def _pipeline(artifact: Artifact, load_part: Callable[[Artifact], Session]) -> Callable[[], Pipeline]:
    sessions = [load_part(part) for part in stages(artifact)]
    runners = [(_Part(session), session.signature.input_names, session.signature.output_names) for session in sessions]
    return lambda: chain(runners, artifact.signature.output_names)


class _Part:
    """A session as a runner: what it reads comes from the model's other parts, or was checked before."""

    def __init__(self, session: Session) -> None:
        self.run = session.run
        self.close = session.close
