"""``accelrt compile``: a model in, an artifact out."""

from __future__ import annotations

import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelrt.cli.common import (
    BackendOption,
    CompileProgress,
    JsonFlag,
    TracebackFlag,
    elapsed,
    engine_options,
    guarded,
    out,
    print_json,
    where_it_runs,
    working,
)
from accelrt.cli.values import read_arrays, read_file

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact


class Fallback(StrEnum):
    """The policies of `accelrt.policy`, spelt out so that ``--help`` shows them and typer checks them."""

    warn = "warn"
    allow = "allow"
    error = "error"


class PrecisionName(StrEnum):
    """The precisions, spelt out likewise."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


class ObjectiveName(StrEnum):
    """What ``auto`` makes best, spelt out likewise."""

    latency = "latency"
    throughput = "throughput"
    memory = "memory"


@guarded
def compile_(
    model: Annotated[
        Path,
        typer.Argument(
            help="ONNX, PyTorch's .pt2 or TorchScript, a TensorFlow SavedModel, .keras or frozen .pb.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The artifact to write, by custom *.accel.", show_default=False)
    ],
    backend: BackendOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", help="An option of an engine, the source or the partitioner; repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    fallback: Annotated[
        Fallback, typer.Option("--fallback", help="What to do where nodes do not run on the engine asked for.")
    ] = Fallback.warn,
    precision: Annotated[
        PrecisionName | None,
        typer.Option("--precision", "-p", help="What the engine asked for computes in; else its default."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", help="Batch sizes to specialise to; a session then takes any.", metavar="1,8"),
    ] = None,
    cores: Annotated[
        int | None, typer.Option("--cores", help="Cut into so many stages of a pipeline, one core each.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold the numbers against the reference; `accelrt verify` says more.")
    ] = False,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", help="A typical call, for int8: .npz, .json, or .npy; repeatable."),
    ] = None,
    objective: Annotated[
        ObjectiveName | None, typer.Option("--objective", help="With -b auto: what is to be best; else latency.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0.0, help="With -b auto: relative L2 error that outputs may have; else 1e-3."),
    ] = None,
    latency_budget: Annotated[
        float | None,
        typer.Option("--latency-budget-ms", help="With -b auto: most milliseconds of a call at the percentile."),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option("--percentile", help="With -b auto: the percentile of latency; else 99.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure the cut here, and return segments that lose to the CPU.")
    ] = False,
    cache: Annotated[bool, typer.Option("--cache/--no-cache", help="Use the compile cache.")] = True,
    sources: Annotated[
        bool, typer.Option("--sources/--no-sources", help="Keep the source graph, so that it can be compiled again.")
    ] = True,
    input_name: Annotated[
        list[str] | None, typer.Option("--input-name", help="A name for an input, in order; repeatable.")
    ] = None,
    output_name: Annotated[
        list[str] | None, typer.Option("--output-name", help="A name for an output, in order; repeatable.")
    ] = None,
    example: Annotated[
        Path | None, typer.Option("--example", help="Example inputs by name (.npz); TorchScript needs them.")
    ] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Compile a model and write the artifact."""
    import accelrt

    _check_output(model, output)
    options = engine_options(option)
    start = time.perf_counter()
    with working(as_json), CompileProgress() as progress:
        artifact = accelrt.compile(
            model,
            backend,
            example_inputs=None if example is None else read_arrays(example),
            fallback=fallback.value,
            input_names=input_name or None,
            output_names=output_name or None,
            options=options,
            precision=None if precision is None else precision.value,
            calibration=[_call(path) for path in calibrate] if calibrate else None,
            verify=verify or None,
            objective=None if objective is None else objective.value,
            tolerance=tolerance,
            latency_budget=None if latency_budget is None else latency_budget / 1e3,
            percentile=percentile,
            tune=tune,
            batch=None if batch is None else _sizes(batch),
            cores=cores,
            cache=cache,
            progress=progress,
        )
        artifact.save(output, sources=sources)
    seconds = elapsed(start)
    if as_json:
        print_json(_to_json(artifact, output, sources, seconds))
    else:
        _show(artifact, output, seconds)


def _call(path: Path) -> Any:
    """Return the inputs of one call: by name, or the only one."""
    content = read_file(path)
    return content if isinstance(content, dict) else (content,)


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,8.", param_hint="--batch") from None


def _check_output(model: Path, output: Path) -> None:
    """Find out before the work, not after it, that the artifact has nowhere to go.

    Raises:
        typer.BadParameter: It would replace the model, or its folder does not exist.
    """
    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"The folder {output.parent} does not exist.", param_hint="--output")
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder.", param_hint="--output")
    if output.exists() and model.exists() and output.samefile(model):
        raise typer.BadParameter("The artifact would replace the model.", param_hint="--output")


def _to_json(artifact: Artifact, output: Path, sources: bool, seconds: float) -> dict[str, Any]:
    placement = artifact.placement
    return {
        "path": str(output),
        "bytes": output.stat().st_size,
        "sources": sources,
        "seconds": seconds,
        "target": placement.target,
        "primary": placement.primary,
        "segments": len(placement.segments),
        "nodes_by_engine": placement.nodes_by_engine,
        "fallen_back": placement.fallen_back,
        "candidates": None if artifact.candidates is None else artifact.candidates.to_json(),
        "tuning": None if placement.tuning is None else asdict(placement.tuning),
        "signature": artifact.signature.to_json(),
    }


def _show(artifact: Artifact, output: Path, seconds: float) -> None:
    from rich.text import Text

    from accelrt.partition.report import human_bytes

    console = out()
    count = len(artifact.placement.segments)
    console.print(f"{output}: {human_bytes(output.stat().st_size)}, compiled in {seconds:.1f} s", soft_wrap=True)
    console.print(str(artifact.signature), soft_wrap=True)
    plural = "" if count == 1 else "s"
    console.print(Text.assemble("nodes: ", where_it_runs(artifact), f"; {count} segment{plural}"), soft_wrap=True)
    if artifact.candidates is not None:
        console.print(artifact.candidates.render())
    if artifact.placement.tuning is not None:
        console.print(str(artifact.placement.tuning), soft_wrap=True)
    if artifact.placement.fallen_back:
        console.print(f"`accelrt explain {output}` says why.", soft_wrap=True)
