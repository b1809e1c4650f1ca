"""``accelrt run``: one call of a model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelrt.cli.common import (
    BackendOption,
    DimOption,
    InputOption,
    JsonFlag,
    SeedOption,
    TracebackFlag,
    TrustFlag,
    dimensions,
    guarded,
    open_or_compile,
    out,
    plain_table,
    print_json,
    working,
)
from accelrt.cli.values import random_inputs, read_inputs, to_json, write_npz
from accelrt.errors import InputError

if TYPE_CHECKING:
    from accelrt.artifact.artifact import Artifact
    from accelrt.graph.types import Signature, Value

SHOWN = 4
"""Values of an output shown to people."""


@guarded
def run(
    model: Annotated[Path, typer.Argument(help="A model, or a compiled artifact.", show_default=False)],
    backend: BackendOption = None,
    input_: InputOption = None,
    random: Annotated[
        bool, typer.Option("--random", help="Draw the inputs that are not given: floats normal, integers 0 or 1.")
    ] = False,
    seed: SeedOption = 0,
    trust: TrustFlag = False,
    dim: DimOption = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the outputs to this .npz file.")] = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Run a model once and show its outputs; with --json, their values.

    In JSON, NaN and infinities are the texts "NaN", "Infinity" and "-Infinity". Files are never unpickled.
    """
    import accelrt

    sizes = dimensions(dim)
    if sizes and not random:
        raise typer.BadParameter("It gives sizes of random inputs; add --random.", param_hint="--dim")
    with working(as_json):
        artifact = open_or_compile(model, backend, trust=trust)
        inputs = _inputs(artifact.signature, input_ or (), random, sizes, seed)
        with accelrt.load(artifact) as session:
            start = time.perf_counter()
            outputs = session.predict(inputs)
            milliseconds = (time.perf_counter() - start) * 1e3
        if output is not None:
            write_npz(output, outputs)
    if as_json:
        print_json(_to_json(artifact, outputs, milliseconds), indent=None)
    else:
        _show(artifact, inputs, outputs, milliseconds, output)


def _inputs(
    signature: Signature, texts: Sequence[str], random: bool, sizes: Mapping[str, int], seed: int
) -> dict[str, Value]:
    from accelrt.graph.types import OptionalType

    given = read_inputs(texts, signature)
    if random:
        return {**random_inputs(signature, sizes, seed), **given}
    missing = [p.name for p in signature.inputs if p.name not in given and not isinstance(p.type, OptionalType)]
    if missing:
        raise InputError(
            f"No value for the input {missing[0]!r}; the model takes {signature}.",
            hint=f"Give --input {missing[0]}=FILE, or --random.",
        )
    return given


def _to_json(artifact: Artifact, outputs: Mapping[str, Value], milliseconds: float) -> dict[str, Any]:
    return {
        "target": artifact.placement.target,
        "nodes_by_engine": artifact.placement.nodes_by_engine,
        "latency_ms": milliseconds,
        "outputs": {name: to_json(value) for name, value in outputs.items()},
    }


def _show(
    artifact: Artifact,
    inputs: Mapping[str, Value],
    outputs: Mapping[str, Value],
    milliseconds: float,
    output: Path | None,
) -> None:
    from rich.text import Text

    from accelrt.cli.common import where_it_runs

    table = plain_table()
    for heading in ("", "name", "type", "range", "mean"):
        table.add_column(heading, no_wrap=heading != "name")
    table.add_column("values", overflow="fold")
    for side, values in (("in", inputs), ("out", outputs)):
        for name, value in values.items():
            table.add_row(side, name, *_summary(value))
    console = out()
    console.print(table)
    console.print(Text.assemble("nodes: ", where_it_runs(artifact), f"; {milliseconds:.3f} ms, the first call"))
    if output is not None:
        console.print(f"outputs written to {output}", soft_wrap=True)


def _summary(value: Value) -> tuple[str, str, str, str]:
    """Return type, range, mean and first values of an input or output, as text."""
    import numpy as np

    from accelrt.cli.values import dtype_name, plain_array

    if value is None:
        return "empty optional", "", "", ""
    if isinstance(value, list):
        return f"list of {len(value)}", "", "", ""
    array = plain_array(np.asarray(value))
    type_ = f"{dtype_name(np.asarray(value))}{list(array.shape)}"
    first = ", ".join(_short(item) for item in array.reshape(-1)[:SHOWN].tolist())
    first += ", ..." if array.size > SHOWN else ""
    if not array.size or array.dtype.kind not in "iuf":
        return type_, "", "", first
    finite = array[np.isfinite(array)]
    if not finite.size:
        return type_, "nothing finite", "", first
    strange = array.size - finite.size
    note = f" and {strange} not finite" if strange else ""
    mean = float(finite.mean(dtype=np.float64))
    return type_, f"{_short(finite.min().item())} to {_short(finite.max().item())}{note}", _short(mean), first


def _short(item: object) -> str:
    return f"{item:.4g}" if isinstance(item, float) else repr(item)
