"""``accelrt verify``: hold a model's numbers on an engine against the reference."""

from __future__ import annotations

import time
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelrt.cli.common import (
    FAILED,
    BackendOption,
    DimOption,
    InputOption,
    JsonFlag,
    SeedOption,
    TracebackFlag,
    TrustFlag,
    dimensions,
    elapsed,
    guarded,
    open_or_compile,
    out,
    print_json,
    where_it_runs,
    working,
)
from accelrt.cli.compile import PrecisionName
from accelrt.cli.values import random_inputs, read_file, read_inputs
from accelrt.errors import InputError

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.precision.report import VerificationReport
    from accelrt.verification import Verification


class ReferenceName(StrEnum):
    """What the numbers are held against."""

    fp32 = "fp32"
    float64 = "float64"


@guarded
def verify(
    model: Annotated[Path, typer.Argument(help="A model, or a compiled artifact.", show_default=False)],
    backend: BackendOption = None,
    precision: Annotated[
        PrecisionName | None, typer.Option("--precision", "-p", help="What the engine computes in; else its default.")
    ] = None,
    input_: InputOption = None,
    random: Annotated[
        bool, typer.Option("--random", help="Draw the inputs that are not given; all are drawn if none is given.")
    ] = False,
    seed: SeedOption = 0,
    trust: TrustFlag = False,
    dim: DimOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Relative L2 error that is tolerated; else 1e-3 for fp32, 1e-2 fp16, 2e-2 bf16, 1e-1 int8.",
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="The right class of each row (.npy), to report accuracy.")
    ] = None,
    reference: Annotated[
        ReferenceName, typer.Option("--reference", help="fp32 on onnxruntime, or float64 on ONNX's evaluator (slow).")
    ] = ReferenceName.fp32,
    localise: Annotated[
        bool, typer.Option("--localise", help="On failure find the first segment and node that goes wrong.")
    ] = False,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Compare a model's outputs with the reference's; exit with 1 if they are out of tolerance."""
    from accelrt.verification import verify_artifact

    sizes = dimensions(dim)
    start = time.perf_counter()
    with working(as_json):
        # Where nodes run is part of what is shown, so a warning that sums it up would only repeat it.
        artifact = open_or_compile(
            model, backend, fallback="allow", precision=None if precision is None else precision.value, trust=trust
        )
        request = _request(artifact, input_ or (), random, sizes, seed, labels)
        request = replace(
            request,
            tolerance=tolerance,
            reference="float64" if reference is ReferenceName.float64 else "fp32",
            localise=localise,
        )
        report = verify_artifact(artifact, request)
    seconds = elapsed(start)
    if as_json:
        print_json(_to_json(artifact, report, seconds))
    else:
        _show(artifact, report, seconds)
    if not report.passed:
        raise typer.Exit(FAILED)


def _request(
    artifact: Artifact, texts: Any, random: bool, sizes: dict[str, int], seed: int, labels: Path | None
) -> Verification:
    from accelrt.verification import Verification

    given = read_inputs(texts, artifact.signature)
    if (not given and not sizes and labels is None) or not artifact.signature.inputs:
        return Verification(seed=seed)
    drawn = not given or random
    if labels is not None and drawn:
        raise InputError("Labels need the inputs that they belong to.", hint="Give them with --input.")
    inputs = {**random_inputs(artifact.signature, sizes, seed), **given} if drawn else given
    return Verification(inputs=inputs, labels=None if labels is None else read_file(labels), seed=seed)


def _to_json(artifact: Artifact, report: VerificationReport, seconds: float) -> dict[str, Any]:
    return {
        "target": artifact.placement.target,
        "precisions": sorted({segment.precision for segment in artifact.placement.segments}),
        "nodes_by_engine": artifact.placement.nodes_by_engine,
        "seconds": seconds,
        **report.to_json(),
    }


def _show(artifact: Artifact, report: VerificationReport, seconds: float) -> None:
    from rich.text import Text

    console = out()
    console.print(report.render())
    precisions = ", ".join(sorted({segment.precision for segment in artifact.placement.segments}))
    console.print(Text.assemble("nodes: ", where_it_runs(artifact), f"; computed in {precisions}; {seconds:.1f} s"))
