"""``accelrt demo``: a trained model, images it has never seen, and every engine at hand."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from accelrt.cli.bench_compare import latency, milliseconds
from accelrt.cli.common import (
    FAILED,
    BackendsOption,
    JsonFlag,
    TracebackFlag,
    candidate_of,
    guarded,
    number_or_text,
    out,
    plain_table,
    print_json,
    where_it_runs,
    working,
)
from accelrt.errors import AccelrtError, AccelrtWarning
from accelrt.nature import Nature, mark_of

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from rich.text import Text

    from accelrt.artifact.artifact import Artifact
    from accelrt.runtime.session import Session

BATCH = 64
SINGLE_CALLS, BATCH_CALLS, TIME_S = 300, 50, 1.0
"""Calls of one image and of a batch that are timed; fewer where they take more than a second, as the reference's do."""
TOLERANCE = 1e-3
"""Largest difference between engines in a score; scores are about 10."""
DRAWN = 10


@dataclass(frozen=True, slots=True)
class Trial:
    """What one engine made of the images."""

    target: str
    artifact: Artifact
    version: str | None
    nature: Nature
    predicted: np.ndarray[Any, Any]
    scores: np.ndarray[Any, Any]
    single_ns: list[int]
    batch_ns: list[int]


@guarded
def demo(backend: BackendsOption = None, as_json: JsonFlag = False, traceback: TracebackFlag = False) -> None:
    """Classify handwritten digits on every usable engine, and compare accuracy, latency and placement.

    Exits with 1 if an engine fails, disagrees with the others, or gets another number of digits right than was
    recorded when the model was made.
    """
    from accelrt.data import digits_facts, held_out_digits

    images, labels = held_out_digits()
    failures: dict[str, str] = {}
    with working(as_json):
        trials = [_try(target, images) for target in backend] if backend else _try_all(images, failures)
    expected = digits_facts().correct
    problems = [f"{target}: {reason}" for target, reason in failures.items()]
    problems += _problems(trials, labels, expected)
    if as_json:
        print_json(_document(trials, labels, expected, problems))
    else:
        _show(trials, images, labels, expected, problems)
    if problems:
        raise typer.Exit(FAILED)


def _try_all(images: np.ndarray[Any, Any], failures: dict[str, str]) -> list[Trial]:
    """Run every usable engine of every backend; one that fails is noted and does not keep the others from running."""
    from accelrt.inventory import backends

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AccelrtWarning)
        found = backends()
    usable = [
        f"{info.name}/{e.name}"
        for info in found
        if info.devices
        for e in info.engines
        if e.takes_onnx and e.status.usable
    ]
    trials = []
    for target in usable:
        try:
            trials.append(_try(target, images))
        except AccelrtError as error:
            failures[target] = str(error)
    return trials


def _try(target: str, images: np.ndarray[Any, Any]) -> Trial:
    import accelrt
    from accelrt.data import digits_model

    artifact = accelrt.compile(digits_model(), target)
    engine = candidate_of(artifact).engine
    with accelrt.load(artifact) as session:
        scores = session.predict({"image": images})["scores"]
        single = _time(session, [images[i : i + 1] for i in range(len(images))], SINGLE_CALLS)
        batches = [images[i : i + BATCH] for i in range(0, len(images) - BATCH + 1, BATCH)]
        batch = _time(session, batches, BATCH_CALLS)
    return Trial(
        target, artifact, engine.status().version, engine.caps.nature, scores.argmax(axis=1), scores, single, batch
    )


def _time(session: Session, inputs: Sequence[np.ndarray[Any, Any]], calls: int) -> list[int]:
    """Time calls after one that is not counted."""
    session.predict(inputs[0])
    times: list[int] = []
    end = time.perf_counter() + TIME_S
    while len(times) < calls and (not times or time.perf_counter() < end):
        image = inputs[len(times) % len(inputs)]
        start = time.perf_counter_ns()
        session.predict(image)
        times.append(time.perf_counter_ns() - start)
    return times


def _problems(trials: Sequence[Trial], labels: np.ndarray[Any, Any], expected: int) -> list[str]:
    """Return what is not as it should be: another accuracy than recorded, engines that disagree."""
    problems = []
    for trial in trials:
        correct = _correct(trial, labels)
        if correct != expected:
            problems.append(f"{trial.target} gets {correct} of {len(labels)} digits right; recorded were {expected}.")
    for trial in trials[1:]:
        differing = int((trial.predicted != trials[0].predicted).sum())
        if differing:
            problems.append(f"{trial.target} and {trials[0].target} see {differing} digits differently.")
        if not (gap := _gap(trial, trials[0])) <= TOLERANCE:
            problems.append(f"Scores of {trial.target} and {trials[0].target} differ by up to {gap:.2g}.")
    if not trials:
        problems.append("No engine is usable here; `accelrt doctor` says why.")
    return problems


def _correct(trial: Trial, labels: np.ndarray[Any, Any]) -> int:
    return int((trial.predicted == labels).sum())


def _gap(trial: Trial, first: Trial) -> float:
    return float(abs(trial.scores - first.scores).max())


def _document(
    trials: Sequence[Trial], labels: np.ndarray[Any, Any], expected: int, problems: list[str]
) -> dict[str, Any]:
    return {
        "model": "digits",
        "images": len(labels),
        "recorded_correct": expected,
        "batch": BATCH,
        "agree": not problems,
        "problems": problems,
        "results": [
            {
                "target": trial.target,
                "version": trial.version,
                "nature": trial.nature,
                "correct": _correct(trial, labels),
                "accuracy": _correct(trial, labels) / len(labels),
                "max_difference": number_or_text(_gap(trial, trials[0])),
                "single": {"n": len(trial.single_ns), **latency(trial.single_ns)},
                "batch": {"n": len(trial.batch_ns), **latency(trial.batch_ns)},
                "nodes_by_engine": trial.artifact.placement.nodes_by_engine,
            }
            for trial in trials
        ],
    }


def _show(
    trials: Sequence[Trial],
    images: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any],
    expected: int,
    problems: Sequence[str],
) -> None:
    from rich.text import Text

    console = out()
    if trials:
        _draw(console, images, labels, trials[0])
        _show_table(console, trials, labels)
    for problem in problems:
        console.print(Text(problem, style="bold red"), soft_wrap=True)
    if not problems:
        engines = "The engine agrees" if len(trials) == 1 else f"All {len(trials)} engines agree"
        text = f"{engines}: {expected} of {len(labels)} digits right, as recorded when the model was made."
        console.print(Text(text, style="green"), soft_wrap=True)


def _show_table(console: Console, trials: Sequence[Trial], labels: np.ndarray[Any, Any]) -> None:
    from rich.text import Text

    table = plain_table()
    table.add_column("target", overflow="fold")
    for heading in ("right", "accuracy", "n", "p50", "p99", "n", "p50", "p99"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in trials:
        correct = _correct(trial, labels)
        table.add_row(
            trial.target + mark_of(trial.nature),
            f"{correct}/{len(labels)}",
            f"{correct / len(labels):.2%}",
            *_latency_cells(trial.single_ns),
            *_latency_cells(trial.batch_ns),
        )
    console.print(table)
    console.print(f"Latency is in milliseconds: of one image, then of a batch of {BATCH}.")
    for trial in trials:
        console.print(Text.assemble(f"{trial.target}: nodes: ", where_it_runs(trial.artifact)))


def _latency_cells(nanoseconds: list[int]) -> tuple[str, str, str]:
    percentiles = latency(nanoseconds)
    return str(len(nanoseconds)), milliseconds(percentiles["p50_ms"]), milliseconds(percentiles["p99_ms"])


def _draw(console: Console, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], trial: Trial) -> None:
    """Draw one image of each digit, then some that were mistaken; below each what it was taken for and what it is."""
    from rich.columns import Columns
    from rich.text import Text

    wrong = [int(index) for index in (trial.predicted != labels).nonzero()[0]]
    chosen = [int((labels == digit).nonzero()[0][0]) for digit in range(DRAWN)]
    chosen += [index for index in wrong if index not in chosen][:2]
    pictures = []
    for index in chosen:
        picture = draw_digit(images[index, 0], colour=console.color_system is not None)
        label = f"{trial.predicted[index]}/{labels[index]}".center(images.shape[3])
        style = "bold red" if index in wrong else "green"
        pictures.append(Text.assemble(picture, "\n", (label, style)))
    console.print(Columns(pictures, padding=(0, 1)))
    console.print(Text("below each digit: predicted/true", style="dim"))


def draw_digit(image: np.ndarray[Any, Any], *, colour: bool) -> Text:
    """Return an image of 0..1 as half-block characters, two rows of pixels in each line.

    In colour each half has its own grey; without, a half is drawn where the pixel is brighter than a half.
    """
    from rich.text import Text

    text = Text()
    for row in range(0, image.shape[0], 2):
        if row:
            text.append("\n")
        for upper, lower in zip(image[row], image[row + 1], strict=True):
            if colour:
                text.append("▀", style=f"{_grey(upper)} on {_grey(lower)}")
            else:
                text.append(" ▄▀█"[2 * int(upper > 0.5) + int(lower > 0.5)])
    return text


def _grey(value: float) -> str:
    level = round(255 * float(value))
    return f"#{level:02x}{level:02x}{level:02x}"
