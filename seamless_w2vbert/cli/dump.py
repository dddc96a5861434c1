"""``seamless-w2vbert dump``: a corpus -> a dump of its embeddings.

Comes in: a source and a folder. Goes out: the dump, progress on stderr and a summary on
stdout; exit code 0, or 3 if some inputs failed, or 1 if it was stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seamless_w2vbert.cli import options
from seamless_w2vbert.errors import ArgumentError

if TYPE_CHECKING:
    from seamless_w2vbert.dumping.run import DumpPlan, DumpReport, Progress


class Format(str, Enum):
    parquet = "parquet"
    safetensors = "safetensors"
    npy = "npy"
    fairseq = "fairseq"


class Pool(str, Enum):
    mean = "mean"
    max = "max"
    mean_std = "mean+std"


class Engine(str, Enum):
    local = "local"
    ray = "ray"


def dump(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder or glob; a list of paths (.txt, - for stdin); a manifest "
            "(.tsv, .csv, .jsonl, .parquet, Kaldi's wav.scp, Lhotse's cuts); "
            "datasets:NAME[:CONFIG[:SPLIT]] or a dataset on disk. URLs too."
        ),
    ],
    out: Annotated[str, typer.Argument(help="The folder or URL of the dump.")],
    model: options.Model = options.DEFAULT_MODEL,
    layers: options.LayersOption = "-1",
    format: Annotated[Format, typer.Option(help="Of the files.")] = Format.parquet,
    dtype: Annotated[
        options.DType, typer.Option(help="Of the stored embeddings.")
    ] = options.DType.float32,
    pool: Annotated[
        Pool | None, typer.Option(help="One vector per utterance, over its frames.")
    ] = None,
    columns: Annotated[
        str, typer.Option(help="Columns to carry into the index, as text,speaker.")
    ] = "",
    normalize: Annotated[
        str | None,
        typer.Option(
            help="Subtract the mean and divide by the deviation of these statistics: "
            "another dump's, or a .pt or .npz file with mean and var."
        ),
    ] = None,
    chunk: Annotated[
        float | None,
        typer.Option(
            help="Embed recordings longer than this many seconds in chunks. Without, "
            "each is embedded as a whole, exactly."
        ),
    ] = None,
    overlap: Annotated[
        float,
        typer.Option(help="Seconds that chunks overlap by; trimmed at the seams."),
    ] = 0.0,
    device: options.Device = "cpu",
    compute_dtype: Annotated[
        options.DType, typer.Option(help="Of the model.")
    ] = options.DType.float32,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first bad input.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Embed shards with failures again."),
    ] = False,
    shard_index: Annotated[
        int, typer.Option(help="Which job of an array this is, from 0.")
    ] = 0,
    num_shards: Annotated[int, typer.Option(help="How many jobs there are.")] = 1,
    shard_size: Annotated[
        str, typer.Option(help="How large a file may get.")
    ] = "512MB",
    shard_seconds: Annotated[
        float,
        typer.Option(help="How much audio may be in a file, and lost by a kill."),
    ] = 3600.0,
    engine: Annotated[
        Engine, typer.Option(help="ray: on the actors of Ray Data (extra: ray).")
    ] = Engine.local,
    workers: Annotated[
        int | None, typer.Option(help="How many actors; all there is room for.")
    ] = None,
    max_frames: Annotated[
        int | None,
        typer.Option(help="The most fbank frames (10 ms) in a batch."),
    ] = None,
    audio_column: Annotated[
        str, typer.Option(help="The manifest's column of audio.")
    ] = "audio",
    id_column: Annotated[
        str, typer.Option(help="The manifest's column of ids.")
    ] = "id",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say how much it would be and how long it would take."
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="No progress and no summary.")
    ] = False,
) -> None:
    """Embed a corpus into files that other tools read.

    Run the same command again to go on after an interruption of any kind. Inputs that
    cannot be embedded are recorded in the index with their reason, and the exit code
    is then 3.
    """
    numbers = options.parse_layers(layers)
    num_bytes = options.parse_size("--shard-size", shard_size)

    import torch

    from seamless_w2vbert.dumping import run

    shared: dict[str, Any] = {
        "model": model,
        "layers": numbers,
        "dtype": dtype.value,
        "pool": pool.value if pool else None,
        "columns": [name for name in columns.split(",") if name],
        "device": options.parse_device(device),
        "compute_dtype": getattr(torch, compute_dtype.value),
        "shard_index": shard_index,
        "num_shards": num_shards,
        "chunk": chunk,
        "overlap": overlap,
        "max_frames": max_frames,
        "audio_column": audio_column,
        "id_column": id_column,
        "format": format.value,
        "normalize": normalize,
        "shard_size": num_bytes,
        "shard_seconds": shard_seconds,
    }

    if dry_run:
        _print_plan(run.plan(source, **shared), model)
        return

    if engine is Engine.ray:
        import importlib.util

        if importlib.util.find_spec("ray") is None:
            raise ArgumentError(
                "--engine ray needs Ray, which is not installed: "
                "`pip install '.[ray]'`."
            )

    stop = _stop_at_signals()

    with _Display(quiet) as display:
        report = run.dump(
            source,
            out,
            strict=strict,
            retry_failed=retry_failed,
            engine=engine.value,
            workers=workers,
            progress=display.update,
            stop=stop,
            **shared,
        )

    if not quiet:
        _print_report(report)

    if not report.complete:
        print(
            "seamless-w2vbert: stopped; run the same command again to go on",
            file=sys.stderr,
        )
        raise typer.Exit(1)

    if report.failed:
        print(
            f"seamless-w2vbert: {report.failed} of {report.utterances} utterances "
            f"failed; the index in {report.location}/index says why",
            file=sys.stderr,
        )
        raise typer.Exit(3)


def _stop_at_signals() -> threading.Event:
    """A first SIGTERM or Ctrl-C asks the dump to stop, a second ends the process."""
    stop = threading.Event()

    def handle(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        stop.set()
        print(
            f"seamless-w2vbert: {signal.Signals(number).name}: finishing the shard at "
            "hand; once more to stop now",
            file=sys.stderr,
        )

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)

    return stop


class _Display:
    """Progress on stderr: a bar on a terminal, else a line now and then."""

    _SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._last_line = time.monotonic()

    def __enter__(self) -> _Display:
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)

        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, progress: Progress) -> None:
        if self._quiet:
            return

        if self._bar is not None:
            self._bar.update(
                self._task,
                total=progress.total,
                completed=progress.done,
                description=describe(progress),
            )
        elif time.monotonic() - self._last_line >= self._SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(describe(progress), file=sys.stderr, flush=True)


def describe(progress: Progress) -> str:
    """Return one line on how far a dump has come."""
    of_all = "" if progress.total is None else f"/{progress.total}"
    speed = progress.new_audio_seconds / max(progress.elapsed, 1e-9)
    text = (
        f"{progress.done}{of_all} utterances, "
        f"{progress.audio_seconds / 3600:.2f} h of audio, {speed:.1f} x real time, "
        f"{progress.failed} failed"
    )

    if progress.total is not None and progress.new:
        left = (progress.total - progress.done) * progress.elapsed / progress.new
        text += f", {duration(left)} left"

    return text


def duration(seconds: float) -> str:
    """Write a time as 1:02:03."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _print_plan(plan: DumpPlan, model: str) -> None:
    untrained = " (untrained)" if model == "tiny-random" else ""
    print(f"model        {model}{untrained}, layers {list(plan.layers)}")
    print(f"utterances   {plan.utterances}")
    print(f"audio        {plan.hours:.2f} h")
    print(f"on disk      {size(plan.bytes)}, vectors of {plan.dim}")
    print(f"time         {duration(plan.seconds)}, from the first minute of audio")


def size(num_bytes: int) -> str:
    """Write a number of bytes as 1.2 GB."""
    value = float(num_bytes)

    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000

    return f"{value:.1f} TB"


def _print_report(report: DumpReport) -> None:
    speed = report.new_hours * 3600 / max(report.elapsed, 1e-9)
    print(
        f"{report.location}: {report.utterances} utterances: {report.embedded} "
        f"embedded ({report.hours:.2f} h), {report.failed} failed"
    )
    if report.new:
        print(
            f"this run: {report.new} utterances, {report.new_hours:.2f} h in "
            f"{duration(report.elapsed)}, {speed:.1f} x real time"
        )
