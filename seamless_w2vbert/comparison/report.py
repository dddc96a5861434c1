"""A :class:`Comparison` -> one HTML page that needs nothing but itself.

Comes in: a comparison. Goes out: the page as text: the sentence, the pictures, the
table.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import numpy as np

from seamless_w2vbert.comparison import Comparison, Example, StageResult
from seamless_w2vbert.constants import (
    FBANK_SHIFT,
    FBANK_STRIDE,
    NUM_MEL_BINS,
    SAMPLING_RATE,
)
from seamless_w2vbert.html import image, new_figure, page, table, to_png

_BLUE, _RED, _GREY = "#1f5fa8", "#b3261e", "#6b7280"

_STYLE = """
.verdict { border-left: .4rem solid; padding: .6rem 1rem; margin: 1rem 0; }
.passed { border-color: #1a7f37; background: #eaf6ec; }
.failed { border-color: #b3261e; background: #fdecea; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem;
  margin: 0; }
dt { color: #6b7280; } dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
figcaption { color: #6b7280; font-size: .875rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: #fff; }
tr.differs td { background: #fdecea; font-weight: 600; }
@media print { figure, .verdict { break-inside: avoid; } }
"""


def render(comparison: Comparison) -> str:
    """Return the page.

    :raises ImportError: if matplotlib (the ``report`` extra) is not installed.
    """
    state = "passed" if comparison.passed else "failed"
    title = f"{comparison.model} against {comparison.against}"

    figures = [
        _figure(
            "Difference per stage",
            "Largest difference relative to the signal, on a log scale: each side with "
            "its own input, and both with the same input. Short lines are tolerances.",
            _draw_stages,
            comparison.stages,
        )
    ]

    if comparison.example is not None:
        name = comparison.example.file
        figures += [
            _figure(
                "Filter banks",
                f"Standardised fbank of {name} on the first side, and the difference "
                "to the second.",
                _draw_fbanks,
                comparison.example,
            ),
            _figure(
                "Agreement over time",
                f"The waveform of {name}, and the cosine of the two outputs frame by "
                "frame.",
                _draw_cosine,
                comparison.example,
            ),
        ]

    facts = {
        "Files": ", ".join(comparison.files),
        "Model dtype": comparison.dtype,
        "Versions": ", ".join(f"{n} {v}" for n, v in comparison.versions.items()),
    }
    terms = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
        for key, value in facts.items()
    )

    return page(
        title,
        f'<p class="verdict {state}">{escape(comparison.sentence)}</p>\n'
        f"<dl>{terms}</dl>\n"
        f"{''.join(figures)}\n"
        "<h2>Every stage</h2>\n" + _stages(comparison.stages),
        _STYLE,
    )


# -- table ---------------------------------------------------------------------------

_HEADINGS = (
    "stage",
    "verdict",
    "largest",
    "mean",
    "cosine",
    "worst cosine",
    "same input: largest",
    "same input: mean",
    "largest at",
)


def _stages(stages: tuple[StageResult, ...]) -> str:
    return table(
        _HEADINGS,
        map(_cells, stages),
        marked=[n for n, stage in enumerate(stages) if not stage.passed],
    )


def _cells(stage: StageResult) -> tuple[str, ...]:
    own, same = stage.own, stage.same

    return (
        stage.stage,
        "ok" if stage.passed else "differs",
        f"{own.max_relative:.1e}",
        f"{own.mean_relative:.1e}",
        f"{own.cosine_mean:.6f}",
        f"{own.cosine_worst:.6f}",
        "" if same is None else f"{same.max_relative:.1e}",
        "" if same is None else f"{same.mean_relative:.1e}",
        own.where,
    )


# -- pictures ------------------------------------------------------------------------


def _figure(
    heading: str, caption: str, draw: Callable[[Any, Any], None], what: Any
) -> str:
    figure = new_figure(6.4, 3.8, dpi=180)
    draw(figure, what)

    return (
        f"<figure><h2>{escape(heading)}</h2>{image(to_png(figure), caption)}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _draw_stages(figure: Any, stages: tuple[StageResult, ...]) -> None:
    axes = figure.subplots()
    positions = np.arange(len(stages))
    floor = 1e-9

    own = [max(_bounded(stage.own.max_relative), floor) for stage in stages]
    axes.plot(positions, own, "o-", color=_BLUE, label="own input")
    axes.plot(
        positions,
        [stage.own_tolerance.max for stage in stages],
        "_",
        color=_BLUE,
        markersize=12,
    )

    same = [
        (n, _bounded(stage.same.max_relative), stage.same_tolerance.max)
        for n, stage in enumerate(stages)
        if stage.same is not None and stage.same_tolerance is not None
    ]
    if same:
        at, values, limits = zip(*same, strict=True)
        heights = [max(value, floor) for value in values]
        axes.plot(at, heights, "s--", color=_GREY, label="same input")
        axes.plot(at, limits, "_", color=_GREY, markersize=12)

    failed = [n for n, stage in enumerate(stages) if not stage.passed]
    axes.plot(
        failed,
        [own[n] for n in failed],
        "o",
        color=_RED,
        markersize=9,
        label="out of tolerance" if failed else None,
    )

    axes.set_yscale("log")
    axes.set_ylim(floor / 2, max(10.0, max(own) * 3))
    axes.set_xticks(
        positions,
        [stage.stage.removeprefix("layer ") for stage in stages],
        rotation=60 if len(stages) > 12 else 0,
    )
    axes.set_xlabel("stage (a number is a layer)")
    axes.set_ylabel("relative difference")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_fbanks(figure: Any, example: Example) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    seconds = len(example.fbank) * FBANK_SHIFT / SAMPLING_RATE
    shown = (
        (upper, example.fbank, "viridis", "fbank"),
        (lower, example.fbank_difference, "RdBu", "difference"),
    )

    for axes, values, colours, name in shown:
        array = np.nan_to_num(values.numpy()).T
        limit = float(np.abs(array).max()) if array.size else 0.0
        limits = {"vmin": -(limit or 1.0), "vmax": limit or 1.0}
        image = axes.imshow(
            array,
            aspect="auto",
            origin="lower",
            cmap=colours,
            extent=(0, seconds, 0, NUM_MEL_BINS),
            interpolation="nearest",
            **(limits if name == "difference" else {}),
        )
        axes.set_ylabel("mel bin")
        axes.set_title(name, loc="left", fontsize="medium")
        figure.colorbar(image, ax=axes)

    lower.set_xlabel("seconds")


def _draw_cosine(figure: Any, example: Example) -> None:
    upper, lower = figure.subplots(2, 1, sharex=True)
    samples = example.samples.numpy()
    upper.plot(
        np.arange(len(samples)) / SAMPLING_RATE, samples, color=_GREY, linewidth=0.5
    )
    upper.set_ylabel("waveform")

    shift = FBANK_STRIDE * FBANK_SHIFT / SAMPLING_RATE
    lower.plot(
        np.arange(len(example.cosine)) * shift, example.cosine.numpy(), color=_BLUE
    )
    lower.set_ylabel("cosine")
    lower.set_xlabel("seconds")
    lower.grid(alpha=0.3)
    lower.ticklabel_format(axis="y", useOffset=False)


def _bounded(value: float) -> float:
    return value if value < 1e6 else 1e6
