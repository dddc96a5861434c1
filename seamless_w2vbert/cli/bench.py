"""``seamless-w2vbert bench``: how fast, side by side with its peers, and of what limit.

Comes in: inputs and sides. Goes out: a table, JSON with everything, a page or picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seamless_w2vbert.cli import options
from seamless_w2vbert.cli.tables import make_console
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError

if TYPE_CHECKING:
    from seamless_w2vbert.benchmarking import Benchmark


def bench(
    model: Annotated[
        str,
        typer.Option(
            help="random-600m (the architecture of W2v-BERT 2.0 with random weights, "
            "offline), or a model as for embed."
        ),
    ] = "random-600m",
    num_layers: Annotated[
        int | None, typer.Option(help="Keep only the first layers of the model.")
    ] = None,
    inputs: Annotated[
        str,
        typer.Option(
            help="Batches, NxSECONDS (4x10: four recordings of ten seconds), or "
            "SECONDS alone for one recording; comma-separated."
        ),
    ] = "1x5,1x20,4x10,1x60",
    dtype: Annotated[
        str, typer.Option(help="What to compute in, comma-separated.")
    ] = "float32,bfloat16",
    sides: Annotated[
        str,
        typer.Option(
            help="package, early-stop (17 of 24 layers), transformers, seamless, "
            "fairseq2 (its stock modules), ctranslate2, limit; comma-separated."
        ),
    ] = "package,early-stop,transformers,seamless,ctranslate2,limit",
    repeats: Annotated[int, typer.Option(help="Timed runs, after a first one.")] = 5,
    threads: Annotated[
        int | None, typer.Option(help="Of each side; all cores if left out.")
    ] = None,
    device: options.Device = "cpu",
    max_seconds: Annotated[
        float,
        typer.Option(
            help="The most seconds for all runs of a side on one input; what does not "
            "fit is left out, and said."
        ),
    ] = 300.0,
    corpus_seconds: Annotated[
        float,
        typer.Option(help="Seconds of audio to run the stream over; 0 for none."),
    ] = 300.0,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Write everything as JSON; - prints it instead."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write FILE.html or FILE.png (extra: report)."),
    ] = None,
) -> None:
    """Measure speed and memory side by side: this package, Transformers,
    seamless_communication, CTranslate2, and what linear algebra alone would take.

    Each side runs in a process of its own, and all take turns in every repeat. Before
    anything is timed, its output is compared with the package's in float32.
    """
    if report is not None:
        from seamless_w2vbert.benchmarking.report import check_path

        check_path(report)

    to_stdout = str(json_path) == "-"
    if json_path is not None and not to_stdout:
        _check_json(json_path)

    from seamless_w2vbert.benchmarking import Case

    cases = [Case.parse(text) for text in _split("--inputs", inputs)]

    from seamless_w2vbert.benchmarking import benchmark

    result = benchmark(
        model,
        num_layers=num_layers,
        cases=cases,
        dtypes=_split("--dtype", dtype),
        sides=_split("--sides", sides),
        repeats=repeats,
        threads=threads,
        device=options.parse_device(device),
        max_seconds=max_seconds,
        corpus_seconds=corpus_seconds,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = json.dumps(result.to_json(), indent=2)

    # What took long to measure is not lost to a file that cannot be written, nor to a
    # reader of our output that has gone.
    try:
        if json_path is not None and not to_stdout:
            _write(json_path, text + "\n")
        if report is not None:
            from seamless_w2vbert.benchmarking.report import write

            write(result, report)
    finally:
        if to_stdout:
            print(text)
        else:
            _print(result)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as ex:
        raise SeamlessW2vBertError(
            f"{path}: cannot be written: {ex.strerror or ex}."
        ) from None


def _split(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]

    if not parts:
        raise ArgumentError(f"{option} names nothing.")

    return parts


def _check_json(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ArgumentError(f"--json {path}: is no file in a folder that exists.")


def _print(result: Benchmark) -> None:
    from rich import box
    from rich.table import Table

    from seamless_w2vbert.benchmarking import report

    console = make_console()

    for line in report.machine_lines(result):
        console.print(line)

    # Numbers are never cut short: where there is no room, columns go.
    shown = [n for n, (_, width) in enumerate(report.COLUMNS) if console.width >= width]
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for number in shown:
        heading, _ = report.COLUMNS[number]
        is_text = heading in ("input", "side", "dtype", "")
        table.add_column(
            heading,
            justify="left" if is_text else "right",
            no_wrap=heading != "side",
            overflow="fold",
        )

    for row in report.rows(result):
        if row[1] == report.FIRST_SIDE:
            table.add_section()
        table.add_row(*(row[number] for number in shown))

    console.print(table)

    if result.corpus:
        rates = Table(box=box.SIMPLE)
        for number, heading in enumerate(report.CORPUS_COLUMNS):
            rates.add_column(heading, justify="left" if number < 2 else "right")
        for row in report.corpus_rows(result):
            rates.add_row(*row)
        console.print(rates)

    for line in (*report.corpus_lines(result), *report.note_lines(result)):
        console.print(line)
