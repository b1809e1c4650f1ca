"""``accelrt explain``: which segment runs where, and why each refused node was refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from accelrt.cli.common import (
    BackendOption,
    JsonFlag,
    TracebackFlag,
    TrustFlag,
    guarded,
    open_or_compile,
    out,
    print_json,
    working,
)

SHOWN = 20
"""Kinds of refusals shown without ``--all``."""


@guarded
def explain(
    model: Annotated[Path, typer.Argument(help="A model, or a compiled artifact.", show_default=False)],
    backend: BackendOption = None,
    all_reasons: Annotated[
        bool, typer.Option("--all", help=f"Show every kind of refusal, not the first {SHOWN}.")
    ] = False,
    trust: TrustFlag = False,
    as_json: JsonFlag = False,
    traceback: TracebackFlag = False,
) -> None:
    """Show what runs where and why; a model is compiled for the target first."""
    with working(as_json):
        # The placement is what was asked for; a warning that sums it up would only repeat it.
        artifact = open_or_compile(model, backend, fallback="allow", trust=trust)
    if as_json:
        document = {"signature": artifact.signature.to_json(), **artifact.placement.to_json()}
        if artifact.verification is not None:
            document["verification"] = artifact.verification.to_json()
        if artifact.candidates is not None:
            document["candidates"] = artifact.candidates.to_json()
        print_json(document)
        return
    console = out()
    console.print(str(artifact.signature), soft_wrap=True)
    console.print(artifact.placement.render(reasons=sys.maxsize if all_reasons else SHOWN))
    if artifact.verification is not None:
        console.print(artifact.verification.render())
    if artifact.candidates is not None:
        console.print(artifact.candidates.render())
