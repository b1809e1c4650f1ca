"""Write a figure: as PNG, or as one HTML page that holds picture and table and fetches nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelrt.errors import BenchmarkError, OptionError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 150
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem}"
    "body{color:#222;background:#fff}"
    "svg{width:100%;height:auto}table{border-collapse:collapse;font-size:14px}"
    "th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    "p{color:#555}"
)


def check_name(path: Path) -> None:
    """Refuse a name that says neither PNG nor HTML.

    Raises:
        OptionError: It does not end in ``.png`` or ``.html``.
    """
    if path.suffix.lower() not in (".png", ".html"):
        raise OptionError(f"A plot cannot be written to {path}.", hint="Its name must end in .png or .html.")


def save(
    figure: Figure, path: Path, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]
) -> None:
    """Write a figure, as its name says; inside `accelrt.plots.figure.drawing`.

    Raises:
        OptionError: The name ends in neither ``.png`` nor ``.html``.
        BenchmarkError: The file cannot be written.
    """
    check_name(path)
    buffer = io.BytesIO()
    if path.suffix.lower() == ".png":
        figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH)
        content = buffer.getvalue()
    else:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        content = to_html(buffer.getvalue().decode(), title, columns, rows, notes).encode()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise BenchmarkError(f"The plot cannot be written to {path}: {error.strerror or error}.") from error


def to_html(svg: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return the page; every text in it is escaped, the picture is matplotlib's own."""
    # In HTML an svg element stands without the XML declaration and document type before it.
    picture = svg[svg.index("<svg") :]
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    remarks = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n{picture}\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>\n{remarks}\n</body></html>\n"
    )
