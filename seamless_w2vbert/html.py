"""Text, tables and pictures -> one HTML page that needs nothing but itself.

Comes in: the parts of a report. Goes out: the page as text. It reads on a phone and on
paper, and asks no network for anything.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: #1b1f24;
  background: #fff; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e3e6ea; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; } table { font-size: 7pt; }
  th, td { padding: .1rem .25rem; white-space: normal; } }
"""


def page(title: str, body: str, style: str = "") -> str:
    """Return the page.

    :param body: HTML.
    :param style: CSS besides that of every page.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def table(
    headings: Iterable[str], rows: Iterable[Sequence[str]], marked: Sequence[int] = ()
) -> str:
    """Return a table that scrolls where it is too wide.

    :param marked: the rows that are of the class ``differs``.
    """
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(
        f"<tr{_DIFFERS if number in marked else ''}>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(rows)
    )

    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


_DIFFERS = ' class="differs"'


def image(picture: bytes, alt: str) -> str:
    """Return a PNG that stands in the page itself."""
    data = base64.b64encode(picture).decode("ascii")

    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def new_figure(width: float, height: float, dpi: int) -> Any:
    """Return a figure of Matplotlib's, with no window system and no state shared with
    the caller's.

    :raises ImportError: if Matplotlib (the ``report`` extra) is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)

    return figure


def to_png(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")

    return buffer.getvalue()
