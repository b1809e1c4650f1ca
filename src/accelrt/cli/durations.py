"""Times on the command line."""

from __future__ import annotations

import math
import re

import typer

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}


def parse_duration(text: str, option: str) -> float:
    """Return seconds: ``50ms``, ``0.1s``, ``800us``. A number without a unit could be either, and is refused.

    Raises:
        typer.BadParameter: It is of another form, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(s|ms|us|µs)\s*", text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise typer.BadParameter(f"{text!r} is no time; write 50ms, 0.1s or 800us.", param_hint=option)
    return seconds
