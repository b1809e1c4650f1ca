"""From the arguments of `accelrt.compile` to what ``auto`` is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from accelrt import options as option_module
from accelrt.artifact.artifact import Artifact
from accelrt.artifact.cache import Cache
from accelrt.artifact.candidates import CandidateTable
from accelrt.artifact.store import identity_of
from accelrt.errors import OptionError
from accelrt.precision.calibrate import is_quantised, quantise
from accelrt.runtime.inputs import bind_examples
from accelrt.sources import open_source
from accelrt.tune.auto import AutoRequest, choose, every_engine
from accelrt.tune.calibration import calibration_calls
from accelrt.tune.goal import Goal
from accelrt.tune.workbench import TuneOptions
from accelrt.verification import Verification, as_verification, digest_of

if TYPE_CHECKING:
    from accelrt.graph.types import Value
    from accelrt.sources import Source, SourceRequest
    from accelrt.tune.wishes import Wishes


def auto(
    model: Any, request: SourceRequest, options: Mapping[str, Any] | None, wishes: Wishes, shortcut: str | None
) -> Artifact:
    """Choose the best way to run a model, or find what was chosen; what is raised is said at `accelrt.compile`."""
    source, artifact = _auto(model, request, options, wishes)
    if shortcut is not None and not (source.format == "onnx" and source.graph.has_weights_outside):
        Cache().remember(shortcut, identity_of(artifact.manifest.dump()))
    return artifact


def _auto(
    model: Any, request: SourceRequest, options: Mapping[str, Any] | None, wishes: Wishes
) -> tuple[Source, Artifact]:
    goal = Goal(wishes.objective, wishes.latency_budget_s, wishes.percentile)
    profile = _profile(wishes.profile)
    limits, given = option_module.take(TuneOptions, options)
    resolved = option_module.resolve(given, every_engine())
    source_options = {field.name for field in fields(resolved.source)}
    if wishes.progress is not None:
        wishes.progress("reading the model", 0, 1)
    source = open_source(model, replace(request, options=resolved.source))
    graph = source.graph
    example = bind_examples(graph.signature, request.example_inputs, strict=source.format == "onnx")
    quantised = is_quantised(graph)
    if wishes.calibration is not None and quantised:
        raise OptionError("The model is quantised already, and takes no calibration.")
    calibrate, calibration = None, None
    if wishes.calibration is not None:
        calls, how = calibration_calls(graph, wishes.calibration)
        calibrate = partial(quantise, graph, calls, how, wishes.progress)
        calibration = f"{replace(how, inputs=())!r} {digest_of(calls)}"
    artifact = choose(
        graph,
        AutoRequest(
            goal,
            _verification(wishes, example),
            example,
            wishes.precision,
            {name: value for name, value in given.items() if name not in source_options},
            limits,
            wishes.fallback,
            source.format,
            calibrate,
            calibration,
            quantised,
            profile,
            source.whole,
        ),
        cache=wishes.cache,
        progress=wishes.progress,
    )
    return source, artifact


def _profile(given: CandidateTable | Artifact | None) -> CandidateTable | None:
    found = given.candidates if isinstance(given, Artifact) else given
    if found is None and given is not None:
        raise OptionError("The artifact given as a profile was not compiled with backend='auto', so it has no figures.")
    if found is not None and not isinstance(found, CandidateTable):
        raise OptionError(f"profile takes a CandidateTable or the artifact that holds one, not {found!r}.")
    return found


def _verification(wishes: Wishes, example: Mapping[str, Value] | None) -> Verification:
    if wishes.verify is False:
        raise OptionError("verify=False was given, and only a verified candidate can win.", hint="Leave verify out.")
    wanted = as_verification(wishes.verify)
    if wanted is None or wishes.verify is True:
        wanted = Verification(None if example is None else [example])
    if wishes.tolerance is None:
        return wanted
    if wanted.tolerance is not None:
        raise OptionError("A tolerance is given twice: as `tolerance`, and in `verify`.", hint="Give one of them.")
    return replace(wanted, tolerance=wishes.tolerance)
