"""``seamless-w2vbert compare``: are two implementations the same, and if not, where?

Comes in: audio files and two sides. Goes out: a table and a sentence, JSON or a page;
exit code 0 within tolerance, 1 not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seamless_w2vbert.cli import options
from seamless_w2vbert.cli.tables import make_console
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError

if TYPE_CHECKING:
    from seamless_w2vbert.comparison import Comparison, StageResult


def compare(
    audio: Annotated[
        list[str], typer.Argument(help="Audio files; - reads paths from stdin.")
    ],
    model: options.Model = options.DEFAULT_MODEL,
    against: Annotated[
        str,
        typer.Option(
            help="transformers (the same checkpoint), transformers:FOLDER, "
            "seamless:CARD_OR_FILE, a model as for --model, or stored embeddings: a "
            "dump, an .npz file or a folder of .npy files."
        ),
    ] = "transformers",
    device: options.Device = "cpu",
    dtype: options.DTypeOption = options.DType.float32,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            help="A factor for all tolerances, or STAGE=MAX or STAGE=MAX:MEAN, "
            "relative to the signal. May be repeated."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write a page, FILE.html (extra: report).")
    ] = None,
) -> None:
    """Compare two implementations stage by stage, and name the first that differs.

    Each stage is run twice: on each side's own input, and on the same input, which
    tells a difference that arises there from one that came in.
    """
    paths = options.read_paths(audio)

    import torch

    from seamless_w2vbert.comparison import compare as run
    from seamless_w2vbert.comparison.measure import default_tolerances, set_tolerances

    torch_dtype = getattr(torch, dtype.value)
    tolerances = set_tolerances(default_tolerances(torch_dtype), tolerance or [])

    if report is not None:
        _check_report(report)

    comparison = run(
        paths,
        model,
        against,
        dtype=torch_dtype,
        device=options.parse_device(device),
        tolerances=tolerances,
    )

    if as_json:
        print(json.dumps(comparison.to_json(), indent=2))
    else:
        _print_table(comparison)
        print(comparison.sentence)

    if report is not None:
        from seamless_w2vbert.comparison.report import render

        try:
            report.write_text(render(comparison), encoding="utf-8")
        except OSError as ex:
            raise SeamlessW2vBertError(
                f"{report}: cannot be written: {ex.strerror or ex}."
            ) from None

    if not comparison.passed:
        raise typer.Exit(1)


def _check_report(report: Path) -> None:
    if report.suffix not in (".html", ".htm"):
        raise ArgumentError(f"--report {report}: use .html.")

    if not report.absolute().parent.is_dir():
        raise ArgumentError(f"--report {report}: there is no folder {report.parent}.")

    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ArgumentError(
            "--report draws with matplotlib, which is not installed: "
            "`pip install '.[report]'`."
        )


def _print_table(comparison: Comparison) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{comparison.model}  |  {comparison.against}  |  {comparison.dtype}",
        caption="relative to the signal; same: both sides fed with the same input",
        box=box.SIMPLE,
        title_justify="left",
        caption_justify="left",
    )

    console = make_console()
    # Numbers are never cut short: where there is no room, columns go.
    shown = [n for n, (_, width) in enumerate(_COLUMNS) if console.width >= width]

    for number in shown:
        heading, _ = _COLUMNS[number]
        text = heading in ("stage", "where largest")
        table.add_column(
            heading,
            justify="left" if text else "right",
            no_wrap=heading != "where largest",
            overflow="fold",
        )

    for stage in comparison.stages:
        row = _row(stage)
        table.add_row(*(row[number] for number in shown))

    console.print(table)


# Each column, and the width of a terminal from which on it is shown.
_COLUMNS = (
    ("stage", 0),
    ("largest", 0),
    ("mean", 0),
    ("cosine", 100),
    ("worst", 100),
    ("same: largest", 0),
    ("mean", 0),
    ("where largest", 120),
    ("", 0),
)


def _row(stage: StageResult) -> list[str]:
    own, same = stage.own, stage.same

    return [
        stage.stage,
        f"{own.max_relative:.1e}",
        f"{own.mean_relative:.1e}",
        f"{own.cosine_mean:.6f}",
        f"{own.cosine_worst:.6f}",
        "" if same is None else f"{same.max_relative:.1e}",
        "" if same is None else f"{same.mean_relative:.1e}",
        own.where,
        "ok" if stage.passed else "DIFFERS",
    ]
