"""One version from its plan to something that answers: compiled, checked, loaded where it belongs, warmed up."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from accelrt.errors import AccelrtError
from accelrt.graph.types import Value
from accelrt.runtime.inputs import Binder
from accelrt.runtime.runner import Outputs
from accelrt.serve.interface import ServedModel
from accelrt.serve.models.describing import config_of, metadata_of, policy_of
from accelrt.serve.models.loading import (
    Facts,
    Predictor,
    admission,
    compiled,
    compiled_for_one_thread,
    facts_with,
    hold_against,
    open_predictor,
    program_bytes,
    reshaping,
    rows_of,
    wants_process,
    warmup_calls,
)
from accelrt.serve.models.process import IsolatedPredictor
from accelrt.serve.models.records import Plan
from accelrt.serve.models.served import DirectGate, LiveModel, Loads, bytes_of
from accelrt.serve.models.statistics import VersionStatistics
from accelrt.serve.models.wishes import placement_note

logger = logging.getLogger("accelrt")

_LONG_WARMUP_S = 1.0
"""After a call of so long one knows enough of a model that nobody said how to warm up."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A version that is ready, and what is worth remembering of it."""

    live: LiveModel
    isolated: IsolatedPredictor | None
    proof: tuple[bool, str]
    note: str


def open_version(
    name: str,
    version: str,
    plan: Plan,
    statistics: VersionStatistics,
    *,
    trust: bool,
    direct_us: float,
    loads: Loads,
    proof: tuple[bool, str] | None,
    versions: Sequence[str],
    again: Callable[[str, str], Awaitable[ServedModel]],
    changed: Callable[[str | None], None],
) -> Opened:
    """Load a version.

    Args:
        loads: What is being loaded, as for `DirectGate`.
        proof: Whether its rows are independent, if that is known from an earlier load.
        versions: Those that its metadata names.
        again: As for `LiveModel`.
        changed: As for `IsolatedPredictor`.

    Raises:
        AccelrtError: It cannot be compiled or loaded, does not fit its configuration, or fails the calls of its
            ``model_warmup``.
    """
    settings, config = plan.settings, plan.config
    artifact = compiled(plan.path, settings, trust=trust, uploaded=plan.uploads is not None)
    signature, reshapes = hold_against(config, artifact.signature)
    if proof is None:
        proof = rows_of(artifact, settings, config)
    isolated: IsolatedPredictor | None = None
    predictor: Predictor
    facts: Facts
    if wants_process(artifact, settings):
        replicas = config.replicas if config is not None else None
        predictor = isolated = IsolatedPredictor(artifact, settings, replicas, name, changed)
        facts = isolated.facts()
    else:
        predictor, facts = open_predictor(artifact, settings, config)
    try:
        facts = facts_with(facts, signature, proof, program_bytes(artifact))
        predict = reshaping(predictor.predict, reshapes)
        # A call to another process could hold up an event loop for as long as that hangs.
        gate = DirectGate(0 if isolated is not None else direct_us, loads)
        if settings.warmup:
            fastest_ns = _warm_up(predict, facts, plan, gate, name)
            if fastest_ns is not None and 2 * fastest_ns <= gate.limit_ns:
                predictor = _on_one_thread(predictor, facts, plan, trust=trust)
                predict = reshaping(predictor.predict, reshapes)
                _warm_up(predict, facts, plan, gate, name)
        policy = policy_of(settings, config, proof[0])
        metadata = metadata_of(name, versions, facts)
        notes = {"accelrt.batching": proof[1], **placement_note(artifact)}
        note = ""
        if (not proof[0] and (settings.max_batch_size or 1) > 1) or (
            config is not None and config.batching and not proof[0]
        ):
            note = f"requests do not share runs: {proof[1]}"
        if config is not None and config.ignored:
            notes["accelrt.ignored"] = ", ".join(config.ignored)
            note = "; ".join(
                filter(None, (note, f"of the configuration these have no effect: {notes['accelrt.ignored']}"))
            )
        if note:
            logger.warning("Model %s version %s: %s.", name, version, note)
        told = config_of(metadata, facts, config, policy, settings, notes)
        check = admission(config, signature, artifact.signature)
        live = LiveModel(
            name, version, predictor, predict, facts, metadata, told, policy, statistics, gate, again, check
        )
    except BaseException:
        predictor.close()
        raise
    return Opened(live, isolated, proof, note)


def _warm_up(
    predict: Callable[[Mapping[str, Value]], Outputs], facts: Facts, plan: Plan, gate: DirectGate, name: str
) -> int | None:
    """Make the first calls, which are slow with many runtimes, and learn from them what a call takes.

    Returns:
        Nanoseconds of the fastest; None if there was none.
    """
    asked_for = plan.config is not None and bool(plan.config.warmup)
    best, size = None, 0
    try:
        for feeds, count in warmup_calls(facts.signature, plan.config):
            bound = Binder(facts.signature).bind((feeds,))
            for _ in range(count):
                start = time.monotonic_ns()
                predict(bound)
                spent = time.monotonic_ns() - start
                if best is None or spent < best:
                    best, size = spent, bytes_of(bound)
                if not asked_for and spent > _LONG_WARMUP_S * 1e9:
                    break
    except AccelrtError as error:
        if asked_for:
            raise
        logger.info("Model %s could not be warmed up with zeros: %s", name, error)
    if best is not None:
        gate.open_after(size, best)
    return best


def _on_one_thread(predictor: Predictor, facts: Facts, plan: Plan, *, trust: bool) -> Predictor:
    """Return a predictor on one thread in the place of one whose calls are short, if there can be one."""
    settings = plan.settings
    try:
        artifact = compiled_for_one_thread(plan.path, settings, facts, trust=trust, uploaded=plan.uploads is not None)
        if artifact is None:
            return predictor
        alone, _ = open_predictor(artifact, settings, plan.config)
    except AccelrtError as error:
        logger.info("A model was not loaded on one thread, and stays as it is: %s", error)
        return predictor
    predictor.close()
    return alone
