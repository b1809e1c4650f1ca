"""``accelrt sweep``: every combination of target, precision, batch, pipeline and replicas, compiled and measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from accelrt.cli.bench import Driver
from accelrt.cli.common import (
    FAILED,
    BackendsOption,
    DimOption,
    JsonFlag,
    SeedOption,
    TracebackFlag,
    dimensions,
    engine_options,
    err,
    guarded,
    out,
    plain_table,
    print_json,
    working,
)

if TYPE_CHECKING:
    from accelrt.scenarios.sweep_setups import SetupRow

EMULATED = (
    "Emulated targets compute on the CPU in the name of other hardware: their figures say nothing about its speed."
)


@guarded
def sweep(
    model: Annotated[Path, typer.Argument(help="A model; an artifact is compiled already.", show_default=False)],
    backend: BackendsOption = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="Batch sizes, each compiled for itself.", metavar="1,2,4,8")
    ] = None,
    cores: Annotated[
        str | None, typer.Option("--cores", help="Stages of a pipeline, one core each.", metavar="1,2,4")
    ] = None,
    replicas: Annotated[
        str | None, typer.Option("--replicas", help="Copies of the model, each on devices of its own.", metavar="1,2")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", "-p", help="Precisions; else the engine's.", metavar="fp32,bf16")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", "-s", help="Time for each of two scenarios of a combination.", min=0.001)
    ] = 2.0,
    driver: Annotated[
        Driver, typer.Option("--driver", help="MLPerf's LoadGen, our own, or LoadGen if it is installed.")
    ] = Driver.AUTO,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option that every target knows: instance=inf1.xlarge.", metavar="NAME=VALUE"),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw latency over throughput into this .png or .html file.", metavar="FILE"),
    ] = None,
    seed: SeedOption = 0,
    dim: DimOption = None,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Compile and measure a model in every combination of what is given, and show them as a table.

    Each combination is measured for itself: latency of one caller (single-stream), then throughput of the session's
    own threads (offline). One that cannot be compiled, loaded or run is a row with its reason. Ctrl-C ends the sweep,
    and what was measured until then is shown.

    Exits with 1 if no combination could be measured.
    """
    from accelrt.scenarios import Effort
    from accelrt.scenarios.drivers import resolve
    from accelrt.scenarios.sweep_setups import QUERIES, WARMUP, combinations, sweep_setups
    from accelrt.target import requested

    if plot is not None:
        from accelrt.plots.page import check_name

        check_name(plot)
    setups = combinations(
        backend or [str(requested(None))],
        precisions=[] if precision is None else [name.strip() for name in precision.split(",")],
        batches=_numbers(batch, "--batch"),
        cores=_numbers(cores, "--cores"),
        replicas=_numbers(replicas, "--replicas"),
    )
    options, sizes = engine_options(option), dimensions(dim)
    effort = Effort(seconds, QUERIES, WARMUP, seed)
    rows: list[SetupRow] = []
    interrupted = False
    with working(as_json):
        try:
            for row in sweep_setups(model, setups, effort, options=options, sizes=sizes, driver=driver.value):
                rows.append(row)
                _tell(row, len(rows), len(setups))
        except KeyboardInterrupt:
            interrupted = True
    document = _document(model, rows, effort, resolve(driver.value), len(setups), interrupted)
    _deliver(document, plot, as_json)
    if interrupted:
        raise KeyboardInterrupt
    if not any(row.measured for row in rows):
        raise typer.Exit(FAILED)


def _numbers(text: str | None, option: str) -> list[int]:
    try:
        return [] if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 1,2,4.", param_hint=option) from None


def _tell(row: SetupRow, number: int, total: int) -> None:
    """Report a combination when it is done: a sweep takes minutes."""
    from accelrt.cli.bench_compare import rate

    result = row.reason if row.rows_per_s is None else f"{rate(row.rows_per_s)} rows a second"
    err().print(f"{number}/{total} {row.setup}: {result}", soft_wrap=True)


def _document(
    model: Path, rows: list[SetupRow], effort: Any, driver: str, total: int, interrupted: bool
) -> dict[str, Any]:
    import accelrt

    plain = [row.to_json() for row in rows]
    return {
        "accelrt": accelrt.__version__,
        "model": str(model),
        "driver": driver,
        "seconds": effort.seconds,
        "seed": effort.seed,
        "combinations": total,
        "interrupted": interrupted,
        "devices": _devices(plain),
        "rows": plain,
        "note": EMULATED if any(row.nature == "emulated" for row in rows) else None,
    }


def _devices(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return the devices of the machine that had a part, by name; emulated ones are on those of the CPU."""
    from accelrt.cli.bench_compare import devices_of

    known = devices_of([row for row in rows if row["engine"] is not None])
    if any(row["nature"] == "emulated" for row in rows) or not known:
        from accelrt.registry import CPU, REGISTRY

        known = {**{device.name: device.description for device in REGISTRY.backend(CPU).devices()}, **known}
    return known


def _deliver(document: Mapping[str, Any], plot: Path | None, as_json: bool) -> None:
    """Draw what was measured, then print it: if drawing fails, there must be no second document."""
    from accelrt.plots import setups

    drawn = plot is not None and any(row["status"] == "measured" for row in document["rows"])
    if plot is not None and drawn:
        from accelrt.plots import page
        from accelrt.plots.figure import drawing

        notes = [document["note"] or "", f"accelrt {document['accelrt']}"]
        with drawing():
            title = setups.chart_of(document).title
            page.save(setups.draw(document), plot, title, setups.COLUMNS, setups.rows(document), notes)
    if as_json:
        print_json(document)
    else:
        _show(document)
    if plot is not None:
        said = f"Plot: {plot}" if drawn else "Nothing was measured, so there is no plot."
        (err() if as_json else out()).print(said, soft_wrap=True)


def _show(document: Mapping[str, Any]) -> None:
    from accelrt.plots import setups

    console = out()
    for name, description in document["devices"].items():
        console.print(f"{name}: {description}", soft_wrap=True)
    rows, footnotes = _with_footnotes(document)
    # Columns that nobody asked for say nothing.
    kept = [number for number, _ in enumerate(setups.COLUMNS) if any(row[number] for row in rows)]
    table = plain_table()
    for number in kept:
        left = number in (0, 1, len(setups.COLUMNS) - 1)
        table.add_column(
            setups.COLUMNS[number],
            justify="left" if left else "right",
            no_wrap=number != len(setups.COLUMNS) - 1,
            overflow="fold",
            min_width=11 if footnotes and number == len(setups.COLUMNS) - 1 else None,
        )
    for row in rows:
        table.add_row(*(row[number] for number in kept))
    if rows:
        console.print(table)
    for number, text in enumerate(footnotes, start=1):
        console.print(f"[{number}] {text}", soft_wrap=True)
    console.print(
        "Latency is that of one caller; rows a second are offline, all calls there from the start.", soft_wrap=True
    )
    if document["note"]:
        console.print(document["note"], soft_wrap=True)
    if document["interrupted"]:
        console.print(f"Stopped after {len(rows)} of {document['combinations']} combinations.", soft_wrap=True)


def _with_footnotes(document: Mapping[str, Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the rows, and the reasons of failures apart: they are long, and many rows share one."""
    from accelrt.plots import setups

    reasons: dict[str, int] = {}
    rows = []
    for row in document["rows"]:
        cells = setups.cells(row)
        if row["status"] == "failed":
            cells = (*cells[:-1], f"failed [{reasons.setdefault(row['reason'], len(reasons) + 1)}]")
        rows.append(cells)
    return rows, list(reasons)
