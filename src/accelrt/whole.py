"""Compile a model whole, by the name of an engine that takes it so, or because it does not convert to ONNX.

An engine that takes segments of ONNX too gets a model whole where it is named and the model is in its framework's own
form: the vendor's tools know their framework's operators better than they know ONNX's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelrt import options as option_module
from accelrt.artifact.artifact import Artifact
from accelrt.errors import CompileError, ConversionError, OptionError, SourceError
from accelrt.policy import Fallback, announce
from accelrt.registry import CPU, REGISTRY, Candidate, status_of, takes_whole
from accelrt.target import Target

if TYPE_CHECKING:
    from accelrt.artifact.making import Check, Progress
    from accelrt.backend import Precision
    from accelrt.sources import SourceRequest, WholeSource

__all__ = ["WholeCompile", "compile_whole", "takes_whole", "whole_candidates", "whole_if_it_can"]


@dataclass(frozen=True, slots=True)
class WholeCompile:
    """A call of `accelrt.compile` that may end in a model run whole; fields are its arguments, checked.

    ``request`` holds the source's options. ``verify`` is None or what `accelrt.compile` was given. ``of_graphs`` is
    ``batch``, ``cores`` or ``tune`` where that was asked for, which is of graphs alone, else None.
    """

    model: Any
    target: Target
    request: SourceRequest
    options: Mapping[str, Any] | None
    precision: Precision | None
    fallback: Fallback
    verify: Any = None
    cache: bool = True
    progress: Progress | None = None
    of_graphs: str | None = None


def compile_whole(call: WholeCompile, failure: ConversionError | None = None) -> Artifact:
    """Compile a model whole.

    Args:
        call: What to compile.
        failure: Why the model does not convert; None where the target names an engine that takes whole sources.

    Raises:
        ConversionError: ``failure``, if by the policy or the target nothing else may run the model, or nothing else
            can; says what was tried.
        SourceError: The model cannot be had whole.
        CompileError: The engine that was asked for by name refuses it.
        OptionError: ``batch``, ``cores`` or ``tune`` was asked for.
    """
    from accelrt.sources import whole_source

    if failure is None and call.of_graphs is not None:
        raise _of_graphs_alone(call, "The target names an engine of whole models")
    source = whole_source(call.model, call.request)
    if failure is None:
        return _by_name(call, source)
    if source is None or call.target.engine is not None or call.fallback == "error":
        raise failure
    if call.of_graphs is not None:
        raise _of_graphs_alone(call, failure.message.rstrip(".")) from failure
    return _instead(call, source, failure)


def _of_graphs_alone(call: WholeCompile, why: str) -> OptionError:
    return OptionError(
        f"{why}, and a model that runs whole takes no {call.of_graphs!r}.",
        hint=f"Leave {call.of_graphs} out, or compile a model that converts to ONNX, for an engine that takes it.",
    )


def whole_if_it_can(call: WholeCompile) -> Artifact | None:
    """Compile a model whole for an engine that takes segments of ONNX as well; None if those are to be compiled.

    They are where the target names no engine, the engine has no use for the model's form, or what was asked for is of
    ONNX: an ``opset``, ``int8``, a cut that is measured. Where the engine does not take the model whole after all, the
    policy decides.

    Raises:
        SourceError, CompileError: By ``fallback="error"``.
    """
    if (
        call.target.engine is None
        or call.precision == "int8"
        or call.request.options.opset is not None
        or call.of_graphs
    ):
        return None
    candidate = REGISTRY.candidates(call.target)[0]
    if set(candidate.engine.formats) <= {"onnx"}:
        return None
    from accelrt.sources import whole_source

    source = whole_source(call.model, call.request)
    if source is None or not set(candidate.engine.formats) & set(source.formats):
        return None
    try:
        options = _options_for(candidate, call.options)
        return _build(call, source, candidate, options, "its engine was asked for by name, and takes it so.")
    except (SourceError, CompileError) as error:
        if call.fallback == "error":
            raise
        announce(call.fallback, f"{candidate.name} gets segments of the model, not the whole: {error.message}")
        return None


def whole_candidates(target: Target, source: WholeSource) -> list[tuple[Candidate, str | None]]:
    """Return the engines that take a source whole, those of the target's backend first, then the CPU's.

    With each goes why it is not usable here, None if it is. Emulated engines are asked for by name only.
    """
    found: list[tuple[Candidate, str | None]] = []
    for name in dict.fromkeys((target.backend, CPU)):
        backend = REGISTRY.backend(name)
        for engine in backend.engines:
            named = name == target.backend and engine.name == target.engine
            if not set(engine.formats) & set(source.formats):
                continue
            if named or engine.caps.nature != "emulated":
                status = status_of(engine)
                problem = None if status.usable else status.reason or "it is not usable here"
                found.append((Candidate(backend, engine), problem))
    return found


def _by_name(call: WholeCompile, source: WholeSource | None) -> Artifact:
    candidate = REGISTRY.candidates(call.target)[0]
    from accelrt.sources import open_source

    takes = ", ".join(candidate.engine.formats)
    if source is None or not set(candidate.engine.formats) & set(source.formats):
        # What nobody knows has a better error of its own; what opens is ONNX.
        found = open_source(call.model, call.request).format if source is None else ", ".join(source.formats)
        raise SourceError(
            f"{candidate.name} takes sources whole, as {takes}; this one is {found}.",
            hint=f"Choose another target, e.g. {CPU!r}, or pass the model in its framework's own form.",
            backend=candidate.backend.name,
        )
    if call.request.options.opset is not None:
        raise OptionError(f"The option `opset` is for ONNX; on {candidate.name} the model runs whole.")
    resolved = option_module.resolve(call.options, (candidate,))
    return _build(call, source, candidate, resolved.engines[0], "it was asked for by name.")


def _instead(call: WholeCompile, source: WholeSource, failure: ConversionError) -> Artifact:
    """Run a model that does not convert on the first engine that takes it whole."""
    from accelrt.verification import as_verification

    if as_verification(call.verify) is not None:
        raise _nothing_to_hold_against(failure) from failure
    attempts: list[str] = []
    for candidate, problem in whole_candidates(call.target, source):
        if problem is not None:
            attempts.append(f"{candidate.name}: {problem}")
            continue
        try:
            artifact = _build(
                call,
                source,
                candidate,
                _options_for(candidate, call.options),
                f"it cannot be converted to ONNX: {failure.message}",
            )
        except (SourceError, CompileError) as error:
            attempts.append(f"{candidate.name}: {error.message.rstrip('.')}")
            continue
        announce(call.fallback, f"The model ran whole on {candidate.name}, because {failure.message}")
        return artifact
    tried = f" Nor can it run whole: {'; '.join(attempts)}." if attempts else ""
    raise ConversionError(failure.message + tried, hint=failure.hint) from failure


def _options_for(candidate: Candidate, given: Mapping[str, Any] | None) -> Any:
    """Return the options that an engine knows; those meant for engines that take ONNX have been checked already."""
    name, known = candidate.engine.name, {field.name for field in fields(candidate.engine.options)}
    kept = {key: value for key, value in (given or {}).items() if key.removeprefix(f"{name}.") in known}
    return option_module.resolve(kept, (candidate,)).engines[0]


def _build(call: WholeCompile, source: WholeSource, candidate: Candidate, options: Any, reason: str) -> Artifact:
    from accelrt.artifact.whole import WholeRequest, build_whole

    engine = candidate.engine.with_options(options)
    candidate = replace(candidate, engine=engine)
    check = _check(call)
    with tempfile.TemporaryDirectory(prefix="accelrt-whole-") as folder:
        if call.progress is not None:
            call.progress("reading the model", 0, 1)
        model = source.write(Path(folder), engine.formats)
        request = WholeRequest(
            str(call.target),
            candidate,
            options,
            source.framework,
            reason,
            call.precision or engine.caps.default_precision,
            call.precision,
        )
        return build_whole(model, request, cache=call.cache, progress=call.progress, check=check)


def _check(call: WholeCompile) -> Check | None:
    """Return the check that holds outputs against the converted model, if one was asked for.

    Raises:
        OptionError: The model does not convert, so that there is nothing to hold it against.
    """
    from accelrt.sources import open_source
    from accelrt.verification import Verifier, as_verification

    if (wanted := as_verification(call.verify)) is None:
        return None
    if wanted.localise:
        raise OptionError("localise=True looks into the nodes of a graph, and the model runs whole.")
    try:
        graph = open_source(call.model, call.request).graph
    except ConversionError as error:
        raise _nothing_to_hold_against(error) from error
    return Verifier(graph, wanted, cache=call.cache).check()


def _nothing_to_hold_against(failure: ConversionError) -> OptionError:
    return OptionError(
        f"verify holds the outputs against the model as ONNX, and it does not convert: {failure.message}",
        hint="Leave verify out.",
    )
