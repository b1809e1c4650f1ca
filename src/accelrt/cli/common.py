"""What the verbs share: consoles, progress, errors as exit codes, JSON, models and options from the command line."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import sys
import threading
import time
import traceback as traceback_module
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeAlias

import typer

from accelrt.errors import AccelrtError, AccelrtWarning, OptionError
from accelrt.nature import mark_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table
    from rich.text import Text

    from accelrt.artifact.artifact import Artifact
    from accelrt.backend import Precision
    from accelrt.registry import Candidate

FAILED, REFUSED, INTERRUPTED, READER_GONE = 1, 3, 130, 141
"""Exit codes besides 0 and typer's 2; `accelrt.cli` says what each means."""

PROGRESS_AFTER_S = 1.0
PIPE_WIDTH = 120
"""Columns where the output is no terminal and ``COLUMNS`` is not set."""

P = ParamSpec("P")

JsonFlag: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else.")]
TracebackFlag: TypeAlias = Annotated[
    bool, typer.Option("--traceback", help="Show where an error came from, as ACCELRT_TRACEBACK=1 does.")
]
BackendOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        help="BACKEND, BACKEND/ENGINE or BACKEND:DEVICES; else that of ACCELRT_BACKEND, else cpu.",
        metavar="TARGET",
    ),
]
BackendsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--backend", "-b", help="BACKEND, BACKEND/ENGINE or BACKEND:DEVICES; repeatable.", metavar="TARGET"),
]
InputOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", help="NAME=FILE, or FILE (.npy, .npz, .json); repeatable.", metavar="NAME=FILE"),
]
DimOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--dim", help="The size of a symbolic dimension of random inputs, else 1: batch=8.", metavar="NAME=N"),
]
TrustFlag: TypeAlias = Annotated[
    bool,
    typer.Option("--trust", help="Let programs in an artifact run code, as PyTorch's and TensorFlow's do."),
]
SeedOption: TypeAlias = Annotated[int, typer.Option("--seed", help="Seed of random inputs.", min=0)]


def out() -> Console:
    """Return a console on stdout."""
    return _console(stderr=False)


def err() -> Console:
    """Return a console on stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class PlainConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would end the program here, with an exit code of its own

    # Names of nodes and reasons hold brackets and colons: nothing in them is markup.
    console = PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


def plain_table() -> Table:
    """Return a table without lines, so that it fits a terminal of 80 columns."""
    from rich.table import Table

    return Table(box=None, padding=(0, 2, 0, 0), header_style="bold")


def guarded(verb: Callable[P, None]) -> Callable[P, None]:
    """Turn what a verb raises into messages and exit codes.

    A verb's parameters ``as_json`` and ``traceback`` say how errors are shown.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with _messages_on_stderr():
                verb(*args, **kwargs)
            flush_stdout()
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            discard_stdout()
            raise typer.Exit(READER_GONE) from None
        except AccelrtError as error:
            if kwargs.get("traceback") or os.environ.get("ACCELRT_TRACEBACK", "0") not in ("", "0"):
                traceback_module.print_exc()
            _show_error(error)
            if kwargs.get("as_json"):
                print_json({"error": {"type": type(error).__name__, "message": error.message, "hint": error.hint}})
            raise typer.Exit(REFUSED) from None

    return run


def flush_stdout() -> None:
    """Write what is buffered; a stdout that was closed before the program started is None."""
    if sys.stdout is not None:
        sys.stdout.flush()


def discard_stdout() -> None:
    """Point stdout at nothing, so that the interpreter can flush it on its way out."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_error(error: AccelrtError) -> None:
    from rich.text import Text

    console = err()
    console.print(Text.assemble(("error: ", "bold red"), error.message), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("hint: ", "bold"), error.hint), soft_wrap=True)


class _StderrHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # Looked up anew each time: while a progress bar is shown, stderr is rich's.
        print(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


@contextlib.contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Show what accelrt logs or warns of as plain lines on stderr."""
    logger, handler = logging.getLogger("accelrt"), _StderrHandler(logging.WARNING)
    logger.addHandler(handler)
    show = warnings.showwarning

    def show_plainly(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, AccelrtWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    warnings.showwarning = show_plainly
    try:
        yield
    finally:
        warnings.showwarning = show
        logger.removeHandler(handler)


@contextlib.contextmanager
def working(as_json: bool) -> Iterator[None]:
    """Keep stdout clear for a JSON document: what libraries and their children print meanwhile goes to stderr."""
    if not as_json:
        yield
        return
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None and sys.stderr is not None:
            saved = os.dup(1)
            stack.callback(os.close, saved)
            os.dup2(2, 1)
            stack.callback(os.dup2, saved, 1)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def print_json(document: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Print the one document of a ``--json`` run."""
    print(json.dumps(document, indent=indent, allow_nan=False, ensure_ascii=False))


def number_or_text(value: float) -> float | str:
    """Return a number as JSON can say it: NaN and infinities become text."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


class CompileProgress:
    """The ``progress`` of a compile, drawn on stderr if that is a terminal and the work takes more than a second."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._state: tuple[str, int, int] = ("", 0, 1)

    def __call__(self, step: str, done: int, total: int) -> None:
        """Say what is being done."""
        with self._lock:
            self._state = (step, done, total)
            self._draw()

    def __enter__(self) -> CompileProgress:
        if sys.stderr.isatty():
            # A timer, because a single long step calls back only when it is over.
            self._timer = threading.Timer(PROGRESS_AFTER_S, self._show)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _show(self) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        with self._lock:
            if self._timer is None:  # the work was over first
                return
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=err(), transient=True)
            self._task = self._bar.add_task("", total=None)
            self._draw()
            self._bar.start()

    def _draw(self) -> None:
        if self._bar is not None and self._task is not None:
            step, done, total = self._state
            # A step that cannot be counted has a pulsing bar.
            self._bar.update(self._task, description=step, completed=done, total=total if total > 1 else None)


def open_or_compile(
    model: Path,
    backend: str | None,
    options: Mapping[str, Any] | None = None,
    *,
    fallback: str = "warn",
    precision: Precision | None = None,
    trust: bool = False,
) -> Artifact:
    """Return the artifact at a path, or compile the model at it.

    Raises:
        OptionError: A target or options for an artifact, which is compiled already.
        Whatever `accelrt.compile` raises.
    """
    import accelrt
    from accelrt.artifact.artifact import is_artifact, open_artifact

    if not is_artifact(model):
        with CompileProgress() as progress:
            return accelrt.compile(
                model, backend, options=options, fallback=fallback, precision=precision, progress=progress
            )
    if backend is not None or options or precision is not None:
        raise OptionError(
            f"{model} is compiled already; it takes neither a target nor options nor a precision.",
            hint="Leave them out, or compile the model it came from.",
        )
    return open_artifact(model, trust=trust)


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    """Split ``NAME=VALUE`` texts.

    Raises:
        typer.BadParameter: One is of another form, or names something twice.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE.", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice.", param_hint=option)
        found[name] = value
    return found


def engine_options(texts: Sequence[str] | None) -> dict[str, Any]:
    """Read ``NAME=VALUE`` options: a value that is JSON is taken as such, any other as text.

    Raises:
        typer.BadParameter: One is of another form.
    """
    return {name: _json_or_text(value) for name, value in pairs(texts, "--option").items()}


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def dimensions(texts: Sequence[str] | None) -> dict[str, int]:
    """Read ``NAME=N`` sizes of symbolic dimensions.

    Raises:
        typer.BadParameter: One is of another form, or no size.
    """
    sizes = {}
    for name, value in pairs(texts, "--dim").items():
        if not value.isascii() or not value.isdecimal() or int(value) < 1:
            raise typer.BadParameter(f"{name}={value} gives no size; 1 is the least.", param_hint="--dim")
        sizes[name] = int(value)
    return sizes


def where_it_runs(artifact: Artifact) -> Text:
    """Return in one line how many nodes run on which engine; other engines than the one asked for stand out."""
    from rich.text import Text

    placement = artifact.placement
    if placement.whole is not None:
        return Text(f"all on {', '.join(segment.engine for segment in placement.segments)}, the model whole")
    natures = {segment.engine: segment.nature for segment in placement.segments}
    text = Text()
    for engine, count in placement.nodes_by_engine.items():
        text.append(", " if text else "")
        mark = mark_of(natures[engine])
        text.append(f"{count} on {engine}{mark}", style="" if engine == placement.primary else "yellow")
    return text if text else Text("nothing to compute")


def candidate_of(artifact: Artifact) -> Candidate:
    """Return the engine that an artifact was compiled for."""
    from accelrt.registry import REGISTRY, Candidate, find_engine

    backend_name, _, engine_name = artifact.placement.primary.partition("/")
    backend = REGISTRY.backend(backend_name)
    return Candidate(backend, find_engine(backend, engine_name))


def elapsed(start: float) -> float:
    """Return seconds since a `time.perf_counter`, to the millisecond."""
    return round(time.perf_counter() - start, 3)
