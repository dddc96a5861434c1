"""The ``seamless-w2vbert`` command: one thin module per subcommand.

Comes in: command-line arguments. Goes out: an exit code: 0 for done, 1 for work that
could not be done, 2 for wrong usage, 3 for a dump that has failures. Errors are one
line on stderr, never a traceback.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from typing import Any

import typer

from seamless_w2vbert import __version__
from seamless_w2vbert.cli import (
    bench,
    compare,
    convert,
    doctor,
    dump,
    embed,
    merge,
    options,
    verify,
)
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
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        help="Print the version and exit.",
    ),
) -> None:
    pass


app.command("embed")(embed.embed)
app.command("dump")(dump.dump)
app.command("verify")(verify.verify)
app.command("merge")(merge.merge)
app.command("compare")(compare.compare)
app.command("convert")(convert.convert)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)


# typer's own click: what it raises for wrong usage.
_UsageError: Any = typer.BadParameter.__base__


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    print(f"seamless-w2vbert: warning: {message}", file=sys.stderr)


def main() -> None:
    """Run the command line; the entry point of the package."""
    # Ctrl-C ends the process there and then, also while libraries are being imported.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.showwarning = _show_warning

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except _UsageError as ex:
        _fail(ex.format_message(), 2)
    except ArgumentError as ex:
        _fail(ex, 2)
    except SeamlessW2vBertError as ex:
        _fail(ex, 1)
    except BrokenPipeError:
        _leave(0)  # the reader of our output has gone: nothing left to say
    except OSError as ex:
        print(f"seamless-w2vbert: {ex.strerror or ex}", file=sys.stderr)
        _leave(1)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: object, code: int) -> None:
    print(f"seamless-w2vbert: {options.printable(str(message))}", file=sys.stderr)
    sys.exit(code)


def _leave(code: int) -> None:
    """Exit without flushing output that cannot be written."""
    sys.stderr.flush()
    os._exit(code)
