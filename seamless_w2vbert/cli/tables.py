"""Rows -> a table as wide as there is room for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 160
"""Where there is no terminal to fit: of a file or a pipe, all columns."""


def make_console() -> Console:
    """Return where to print, as wide as the terminal, ``COLUMNS`` or all columns."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)

    if not console.is_terminal and not os.environ.get("COLUMNS"):
        console.width = _WIDTH

    return console
