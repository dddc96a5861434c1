"""A :class:`Benchmark` -> a table in the terminal, and a page or picture.

Comes in: a benchmark. Goes out: rows of text, an HTML page that needs nothing but
itself, or a PNG: time and memory against the length of the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from seamless_w2vbert.benchmarking.results import (
    EARLY_STOP,
    LIMIT,
    PACKAGE,
    SIDES,
    Benchmark,
    Case,
    Measurement,
)
from seamless_w2vbert.benchmarking.worker import SHORT
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError
from seamless_w2vbert.html import image, new_figure, page, table, to_png

SUFFIXES = (".html", ".htm", ".png")

FIRST_SIDE = SIDES[PACKAGE]
"""With which the rows of an input begin."""

# Each column of the table, and the width of a terminal from which on it is shown.
COLUMNS = (
    ("input", 0),
    ("side", 0),
    ("dtype", 0),
    ("seconds", 0),
    ("spread", 130),
    ("x real time", 110),
    ("vs package", 0),
    ("of limit", 100),
    ("peak MB", 92),
    ("cosine", 0),
    ("", 0),
)


def rows(benchmark: Benchmark) -> Iterator[list[str]]:
    """Yield a cell for each of :data:`COLUMNS`, side by side per input."""
    ordered = sorted(
        benchmark.measurements,
        key=lambda one: (
            _position(one.group, [m.group for m in benchmark.measurements]),
            _position(one.case, [m.case for m in benchmark.measurements]),
        ),
    )
    for one in ordered:
        yield _row(benchmark, one)


def _position(value: Any, values: list[Any]) -> int:
    return values.index(value)


def _row(benchmark: Benchmark, one: Measurement) -> list[str]:
    name = SIDES[one.side]
    if one.side == EARLY_STOP:
        name = f"  to layer {benchmark.early_layer}"

    is_limit = one.side == LIMIT

    return [
        one.case.label,
        name,
        one.dtype,
        _text(one.median, ".3f"),
        _text(None if one.spread is None else 100 * one.spread, ".0f", " %"),
        _text(one.real_time_factor, ".2f"),
        "" if is_limit else _text(benchmark.ratio(one), ".2f", " x"),
        "" if is_limit else _percent(benchmark.fraction_of_limit(one)),
        _text(None if one.peak_bytes is None else one.peak_bytes / 1e6, ".0f"),
        _text(one.cosine, ".5f"),
        _remark(one),
    ]


def _remark(one: Measurement) -> str:
    if one.state != "ok":
        return one.state
    if one.differs:
        return "DIFFERS"
    if one.is_cold:
        return "cold"
    if one.reason:
        return "fewer runs"
    return ""


def _text(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _percent(value: float | None) -> str:
    return _text(None if value is None else 100 * value, ".0f", " %")


def corpus_rows(benchmark: Benchmark) -> Iterator[list[str]]:
    """Yield dtype, step, hours of audio per hour, fraction of the encoder's own."""
    for corpus in benchmark.corpus:
        for rate in corpus.rates:
            yield [
                corpus.dtype,
                rate.name,
                f"{rate.hours_per_hour:.1f}",
                _percent(corpus.fraction_of_encoder(rate.name)),
            ]


CORPUS_COLUMNS = ("dtype", "step", "hours of audio per hour", "of the encoder alone")


def corpus_lines(benchmark: Benchmark) -> Iterator[str]:
    """Yield a sentence on each corpus that was run."""
    for corpus in benchmark.corpus:
        yield (
            f"Stream, {corpus.dtype}: {corpus.files} files of 1 to 30 s, "
            f"{corpus.audio_seconds:.0f} s in all; {100 * corpus.padded_share:.1f} % "
            f"of the computed frames are padding, in an hour of such recordings "
            f"{100 * corpus.padded_share_of_hour:.1f} %. Decoding and fbank in one "
            "thread."
        )


def machine_lines(benchmark: Benchmark) -> Iterator[str]:
    """Yield what it was measured on and with."""
    machine = benchmark.machine
    gpu = f", {machine['gpu']}" if "gpu" in machine else ""
    yield (
        f"{machine['processor']} ({machine['instructions']}), {machine['cores']} "
        f"cores, {machine['memory_gb']} GB{gpu}; threads: {machine['threads']}, "
        f"device: {machine['device']}, the {machine['stack']!r} stack"
    )
    yield ", ".join(f"{name} {version}" for name, version in benchmark.versions.items())
    yield (
        f"{benchmark.model}, {benchmark.num_layers} layers; medians; "
        f"interleaved runs after one to warm up: {benchmark.repeats}; those under "
        f"{SHORT:g} s right after another"
    )


def note_lines(benchmark: Benchmark) -> Iterator[str]:
    """Yield what has to be known to read the figures, and what was left out."""
    yield (
        "vs package: the side's median over the package's in the same dtype (int8: "
        "over the package's beside it). peak MB: above the loaded model. cosine: to "
        "the package's float32 output."
    )
    for side, note in benchmark.notes.items():
        yield f"{SIDES[side]}: {note}"
    yield from benchmark.skipped


# -- pages and pictures --------------------------------------------------------------


def check_path(path: Path) -> None:
    """
    :raises ArgumentError: if no report can be written there.
    """
    if path.suffix not in SUFFIXES:
        raise ArgumentError(f"--report {path}: use .html or .png.")

    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"--report {path}: there is no folder {path.parent}.")

    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ArgumentError(
            "--report draws with matplotlib, which is not installed: "
            "`pip install '.[report]'`."
        )


def write(benchmark: Benchmark, path: Path) -> None:
    """Write the page or the picture, whichever the name asks for.

    :raises ArgumentError: if it asks for neither, or matplotlib is not installed.
    :raises SeamlessW2vBertError: if it cannot be written.
    """
    check_path(path)
    picture = draw(benchmark)

    try:
        if path.suffix == ".png":
            path.write_bytes(picture)
        else:
            path.write_text(render(benchmark, picture), encoding="utf-8")
    except OSError as ex:
        raise SeamlessW2vBertError(
            f"{path}: cannot be written: {ex.strerror or ex}."
        ) from None


_COLOURS = {
    "package": "#1f5fa8",
    "early-stop": "#7fb0e0",
    "transformers": "#b3261e",
    "seamless": "#7a4fa3",
    "fairseq2": "#a3784f",
    "ctranslate2": "#1a7f37",
    "limit": "#6b7280",
}
_LINES = {"float32": "-", "bfloat16": "--", "float16": "-.", "int8": ":"}


def draw(benchmark: Benchmark) -> bytes:
    """Return a PNG of time and peak memory against length: single recordings as lines,
    batches as points of their own at the length of one."""
    figure = new_figure(11, 5, dpi=150)
    left, right = figure.subplots(1, 2)

    times = [(one, one.median) for one in benchmark.measurements]
    peaks = [
        (one, None if one.peak_bytes is None else one.peak_bytes / 1e6)
        for one in benchmark.measurements
        if one.state == "ok"
    ]
    _draw_lines(left, times, "seconds")
    _draw_lines(right, peaks, "peak memory above the model, MB")

    handles, labels = left.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(
        f"{benchmark.model}, {benchmark.num_layers} layers, "
        f"{benchmark.machine['processor']}, threads: {benchmark.machine['threads']}",
        fontsize="medium",
    )

    return to_png(figure)


def _draw_lines(
    axes: Any, values: list[tuple[Measurement, float | None]], label: str
) -> None:
    shown = [(one, value) for one, value in values if value]
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    tops: dict[Case, float] = {}

    for one, value in shown:
        if one.case.batch == 1:
            points = lines.setdefault((one.side, one.dtype), [])
            points.append((one.case.seconds, value))
        else:
            axes.plot(one.case.seconds, value, "o", mfc="none", c=_COLOURS[one.side])
            tops[one.case] = max(value, tops.get(one.case, 0.0))

    for (side, dtype), points in lines.items():
        axes.plot(
            *zip(*sorted(points), strict=True),
            marker=".",
            color=_COLOURS[side],
            linestyle=_LINES[dtype],
            label=f"{SIDES[side]}, {dtype}",
        )

    for case, top in tops.items():
        axes.annotate(
            case.label,
            (case.seconds, top),
            ha="center",
            textcoords="offset points",
            xytext=(0, 6),
        )

    axes.set_xscale("log")
    axes.set_yscale("log")
    lengths = sorted({one.case.seconds for one, _ in shown})
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("length of the recording, seconds")
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    axes.grid(alpha=0.3)


_STYLE = """
p { margin: .25rem 0; color: #4b5563; overflow-wrap: anywhere; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
"""


def render(benchmark: Benchmark, picture: bytes) -> str:
    """Return the page, with the picture in it."""
    title = f"Speed of {benchmark.model}, {benchmark.num_layers} layers"
    columns = [heading for heading, _ in COLUMNS]

    corpus = ""
    if benchmark.corpus:
        corpus = (
            "<h2>A corpus</h2>"
            + _paragraphs(corpus_lines(benchmark))
            + table(CORPUS_COLUMNS, corpus_rows(benchmark))
        )

    return page(
        title,
        _paragraphs(machine_lines(benchmark))
        + image(picture, "Time and peak memory against length")
        + "<h2>Side by side</h2>"
        + table(columns, rows(benchmark))
        + _paragraphs(note_lines(benchmark))
        + corpus,
        _STYLE,
    )


def _paragraphs(lines: Iterator[str]) -> str:
    return "".join(f"<p>{escape(line)}</p>" for line in lines)
