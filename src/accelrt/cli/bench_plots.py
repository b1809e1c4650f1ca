"""``accelrt bench --plot`` and ``--candidates``: what was measured as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelrt.cli.common import err, out, plain_table, print_json
from accelrt.errors import OptionError


def plot_document(document: Mapping[str, Any], path: Path, as_json: bool) -> None:
    """Draw latency over throughput of a bench document.

    Raises:
        BenchmarkError: matplotlib is not installed, or the file cannot be written.
    """
    from accelrt.plots import curves, page
    from accelrt.plots.figure import drawing

    chart = curves.chart_of(document)
    reasons = [
        f"{result['target']}: {reason}"
        for result in document["results"]
        for reason in result.get("run", {}).get("reasons", ())
    ]
    notes = [chart.subtitle, *reasons, f"accelrt {document['accelrt']}"]
    with drawing():
        page.save(curves.draw(chart), path, chart.title, curves.COLUMNS, curves.rows(chart), notes)
    _say(path, as_json)


def show_candidates(model: Path, path: Path | None, as_json: bool) -> None:
    """Show the candidates that an artifact was chosen from, and draw them if asked.

    Raises:
        OptionError: It is no artifact, or one that was not compiled with ``backend="auto"``.
        BenchmarkError: matplotlib is not installed, or the file cannot be written.
    """
    from accelrt.plots import candidates

    table = _table_of(model)
    rows = candidates.rows(table)
    if path is not None:
        from accelrt.inventory import devices
        from accelrt.plots import page
        from accelrt.plots.figure import drawing

        machine = next((device.description for device in devices() if device.name == "cpu:0"), "this machine")
        title = f"{model.name}, candidates on {machine}"
        with drawing():
            page.save(candidates.draw(table, title), path, title, candidates.COLUMNS, rows, [])
    if as_json:
        print_json(table)
        return
    shown = plain_table()
    for number, heading in enumerate(candidates.COLUMNS):
        text = heading in ("candidate", "status", "reason")
        shown.add_column(heading, justify="left" if text else "right", overflow="fold", no_wrap=number == 0)
    for row in rows:
        shown.add_row(*row)
    out().print(shown)
    if path is not None:
        _say(path, as_json)


def _table_of(model: Path) -> Mapping[str, Any]:
    from accelrt.artifact.artifact import is_artifact, open_artifact

    if not is_artifact(model):
        raise OptionError(
            f"{model} is no artifact, so it has no candidates.", hint="Compile it with backend auto first."
        )
    found: Any = getattr(open_artifact(model), "candidates", None)
    if found is None:
        raise OptionError(
            f'{model} was not compiled with backend="auto", so nothing was measured to choose from.',
            hint=f"accelrt compile MODEL -b auto -o {model}",
        )
    table: Mapping[str, Any] = found.to_json()
    return table


def _say(path: Path, as_json: bool) -> None:
    (err() if as_json else out()).print(f"Plot: {path}", soft_wrap=True)
