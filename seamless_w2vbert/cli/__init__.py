"""The ``seamless-w2vbert`` command: one thin module per subcommand.

Comes in: command-line arguments. Goes out: an exit code: 0 for done, 1 for work that
could not be done, 2 for wrong usage. Errors are one line on stderr, never a traceback.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from seamless_w2vbert import __version__
from seamless_w2vbert.cli import compare, doctor, embed
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError

app = typer.Typer(
    name="seamless-w2vbert",
    help="W2v-BERT 2.0, the speech encoder of the Seamless models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print it."
    ),
) -> None:
    pass


app.command("embed")(embed.embed)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"seamless-w2vbert: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; the entry point of the package."""
    warnings.showwarning = _show_warning

    try:
        app()
    except ArgumentError as ex:
        _fail(ex, 2)
    except SeamlessW2vBertError as ex:
        _fail(ex, 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing left to say
        sys.exit(0)


def _fail(message: object, code: int) -> None:
    print(f"seamless-w2vbert: {message}", file=sys.stderr)
    sys.exit(code)
