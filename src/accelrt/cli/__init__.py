"""The command line ``accelrt``: one module a verb.

Exit codes:

====  ======================================================================================
0     fine
1     what was asked about is not usable, or a check failed
2     wrong usage: an unknown option, a missing argument, a value that cannot be read
3     accelrt refused or failed: message and hint on stderr; ``--traceback`` shows where
130   interrupted (Ctrl-C)
141   whoever read the output has gone (``accelrt ... | head``)
====  ======================================================================================

With ``--json``, stdout holds exactly one JSON document and nothing else; messages and progress go to stderr. Numbers
that JSON has no word for are the texts ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, complex ones pairs
``[real, imaginary]``. With exit code 3 the document is ``{"error": {"type": ..., "message": ..., "hint": ...}}``; after
wrong usage or an interrupt there is none, but for ``accelrt sweep``, whose document then holds what was measured.

Importing this package imports neither numpy nor an engine: ``accelrt --help`` must be quick. The verbs import what they
need when they run.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import accelrt
from accelrt.cli import bench, compile, cores, demo, doctor, eia, explain, run, serve, sweep, verify
from accelrt.cli.common import INTERRUPTED, discard_stdout, flush_stdout

EPILOG = (
    "Exit codes: 0 fine; 1 what was asked about is not usable, or a check failed; 2 wrong usage; 3 accelrt refused or "
    "failed (message and hint on stderr, --traceback or ACCELRT_TRACEBACK=1 shows where); 130 interrupted; 141 the "
    "reader of the output has gone. "
    "With --json, stdout holds exactly one JSON document; messages and progress go to stderr."
)

app = typer.Typer(
    name="accelrt",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"accelrt {accelrt.__version__}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def _app(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """One model in, any accelerator under it: compile, explain, run and measure."""


app.command("doctor")(doctor.doctor)
app.command("cores")(cores.cores)
app.command("compile")(compile.compile_)
app.command("explain")(explain.explain)
app.command("run")(run.run)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("sweep")(sweep.sweep)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.add_typer(eia.app, name="eia")


def main() -> None:
    """Run the command line; the entry point of the console script."""
    try:
        app(prog_name="accelrt")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        # Text still in the buffer would raise when the interpreter shuts down, where nothing can catch it.
        try:
            flush_stdout()
        except BrokenPipeError:
            discard_stdout()
