"""What all plots share: a figure without a window, colours, scales, titles."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from accelrt.errors import BenchmarkError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
"""Those of Okabe and Ito (2008), which people with a colour vision deficiency can tell apart."""

_LOG_FROM = 8.0
"""Values that differ by this factor are drawn on a logarithmic axis."""

STYLE = {
    "text.parse_math": False,  # names are shown as they are, dollars and all
    "svg.fonttype": "path",  # no font is needed where the picture is looked at
    "svg.hashsalt": "accelrt",  # the same figures give the same file
    "font.size": 9.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Set the style; the caller's own settings of matplotlib are as before afterwards.

    Raises:
        BenchmarkError: matplotlib is not installed, or cannot be loaded.
    """
    try:
        matplotlib = import_module("matplotlib")
    except ImportError as error:
        raise BenchmarkError(
            f"A plot needs matplotlib, which cannot be loaded: {error}.", hint="pip install 'accelrt[bench]'"
        ) from error
    with matplotlib.rc_context(STYLE):
        yield


def new_figure(title: str, subtitle: str) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes; never through pyplot, which would want a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=11, fontweight="bold", x=0.01, ha="left")
    axes = figure.add_subplot()
    axes.set_title("\n".join(textwrap.wrap(subtitle, 110)), fontsize=8.5, color="#444444", loc="left")
    return figure, axes


def scale(axis: Any, set_scale: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic where values span much, and write its numbers out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [value for value in values if value > 0]
    if positive and min(values) > 0 and max(positive) / min(positive) >= _LOG_FROM:
        set_scale("log")
        decades = max(positive) / min(positive)
        axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0) if decades < 500 else (1.0,)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
