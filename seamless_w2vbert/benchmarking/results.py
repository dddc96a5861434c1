"""What came of a benchmark: medians, ratios and rates, as plain values.

Comes in: the seconds of every run. Goes out: :class:`Benchmark`, which knows every
ratio and turns into JSON. It computes nothing but quotients of medians, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal, TypeAlias

from seamless_w2vbert.errors import ArgumentError

State: TypeAlias = Literal["ok", "missing", "out of memory", "too slow", "failed"]

PACKAGE, EARLY_STOP, LIMIT = "package", "early-stop", "limit"

SIDES: Mapping[str, str] = {
    PACKAGE: "seamless_w2vbert",
    EARLY_STOP: "seamless_w2vbert, early stop",
    "transformers": "Transformers",
    "seamless": "seamless_communication",
    "fairseq2": "fairseq2",
    "ctranslate2": "CTranslate2",
    LIMIT: "linear-algebra limit",
}
"""Every side that can be asked for, and what the table calls it."""

DEFAULT_SIDES = (
    PACKAGE,
    EARLY_STOP,
    "transformers",
    "seamless",
    "ctranslate2",
    LIMIT,
)

TRUSTED_COSINE = 0.99
"""A side whose mean cosine to the reference is lower is marked as different."""

_CASE = re.compile(r"^\s*(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*s?\s*$")

_MIN_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One input: a batch of recordings of one length, so that nothing is padding."""

    batch: int
    """How many recordings."""

    seconds: float
    """The length of each."""

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read ``4x10`` (four recordings of ten seconds) or ``20`` (one of twenty).

        :raises ArgumentError: if it is neither.
        """
        match = _CASE.match(text)
        batch = int(match[1] or 1) if match else 0
        seconds = float(match[2]) if match else 0.0

        if batch < 1 or seconds < _MIN_SECONDS:
            raise ArgumentError(
                f"The input {text!r} is no batch and length; expected seconds from "
                f"{_MIN_SECONDS} on, or a count and seconds, such as 20 or 4x10."
            )

        return cls(batch, seconds)

    @property
    def label(self) -> str:
        """As it is written on the command line: ``4x10``."""
        return f"{self.batch}x{self.seconds:g}"

    @property
    def audio_seconds(self) -> float:
        """The audio in the whole batch."""
        return self.batch * self.seconds


@dataclass(frozen=True)
class Measurement:
    """One side on one input."""

    side: str
    """One of :data:`SIDES`."""

    dtype: str
    """What it computes in; ``int8`` for CTranslate2's quantised weights."""

    group: str
    """The dtype of the package's side that it ran in turn with."""

    case: Case

    seconds: tuple[float, ...] = ()
    """Every timed run, in order. Empty where there was none."""

    state: State = "ok"

    reason: str = ""
    """Why there is no time, or fewer runs than asked for."""

    is_cold: bool = False
    """The only run that fitted was the warm-up."""

    cosine: float | None = None
    """To the package's float32 output on the same input, mean over frames."""

    cosine_worst: float | None = None
    """Of the worst frame."""

    peak_bytes: int | None = None
    """The most memory that its warm-up took above the loaded model, which has run on a
    second of audio before."""

    weights_bytes: int | None = None
    """What loading and warming up took."""

    detail: Mapping[str, Any] = field(default_factory=dict)
    """For the limit: which product was the fastest, and how."""

    @property
    def median(self) -> float | None:
        """The median of its runs in seconds."""
        return median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """The slowest run less the fastest, over the median."""
        if not self.seconds:
            return None
        return (max(self.seconds) - min(self.seconds)) / median(self.seconds)

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of audio in a second."""
        return None if self.median is None else self.case.audio_seconds / self.median

    @property
    def differs(self) -> bool:
        """Whether its output is another than the reference's."""
        # Written so that NaN counts as different.
        return self.cosine is not None and not self.cosine >= TRUSTED_COSINE


@dataclass(frozen=True)
class Throughput:
    """How fast a corpus goes through one step or several."""

    name: str

    audio_seconds: float
    """The audio in the corpus."""

    seconds: tuple[float, ...]
    """Every timed run."""

    @property
    def hours_per_hour(self) -> float:
        """Hours of audio in an hour, from the median run."""
        return self.audio_seconds / median(self.seconds)


@dataclass(frozen=True)
class CorpusRates:
    """What came of running a corpus of mixed lengths."""

    dtype: str
    files: int
    audio_seconds: float
    padded_share: float
    """Padded frames over computed frames in the stream's batches of this corpus."""

    padded_share_of_hour: float
    """The same for an hour of recordings of the same distribution."""

    rates: tuple[Throughput, ...]
    """By step; ``encoder`` is the encoder alone on the stream's own batches."""

    def fraction_of_encoder(self, name: str) -> float | None:
        """What part of the encoder's own rate a step keeps."""
        by_name = {rate.name: rate for rate in self.rates}
        if name not in by_name or "encoder" not in by_name:
            return None
        return by_name[name].hours_per_hour / by_name["encoder"].hours_per_hour

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "files": self.files,
            "audio_seconds": self.audio_seconds,
            "padded_share": self.padded_share,
            "padded_share_of_hour": self.padded_share_of_hour,
            "rates": [
                {
                    "name": rate.name,
                    "seconds": list(rate.seconds),
                    "hours_per_hour": rate.hours_per_hour,
                    "fraction_of_encoder": self.fraction_of_encoder(rate.name),
                }
                for rate in self.rates
            ],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CorpusRates:
        audio_seconds = values["audio_seconds"]
        rates = tuple(
            Throughput(rate["name"], audio_seconds, tuple(rate["seconds"]))
            for rate in values["rates"]
        )
        return cls(
            values["dtype"],
            values["files"],
            audio_seconds,
            values["padded_share"],
            values["padded_share_of_hour"],
            rates,
        )


@dataclass(frozen=True)
class Benchmark:
    """Everything that was measured, on which machine and with what."""

    model: str
    num_layers: int
    early_layer: int
    """Where the early stop stops: the output of block ``early_layer``."""

    repeats: int
    max_seconds: float
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: Mapping[str, str]
    """What has to be known of a side to read its figures."""

    measurements: tuple[Measurement, ...]
    corpus: tuple[CorpusRates, ...] = ()
    left_out: tuple[str, ...] = ()
    """What else was asked for and could not be measured, and why."""

    def find(self, side: str, group: str, case: Case) -> Iterator[Measurement]:
        """Yield the measurements of a side on an input, in one group."""
        for one in self.measurements:
            if (one.side, one.group, one.case) == (side, group, case):
                yield one

    def ratio(self, one: Measurement) -> float | None:
        """How many times as long as the package it takes: the quotient of the medians
        of runs that took turns."""
        return self._quotient(one, PACKAGE)

    def fraction_of_limit(self, one: Measurement) -> float | None:
        """The limit's time over its own; None where there is none in its dtype."""
        if one.dtype != one.group:
            return None
        return self._quotient(one, LIMIT, inverse=True)

    def fraction_of_whole(self, one: Measurement) -> float | None:
        """For an early stop: its time over that of all layers."""
        return self._quotient(one, PACKAGE) if one.side == EARLY_STOP else None

    def _quotient(
        self, one: Measurement, side: str, inverse: bool = False
    ) -> float | None:
        other = next(self.find(side, one.group, one.case), None)
        if other is None or other.median is None or one.median is None:
            return None
        return other.median / one.median if inverse else one.median / other.median

    @property
    def skipped(self) -> list[str]:
        """A line for each thing that did not run as asked for, and why."""
        lines: dict[str, list[str]] = {}

        for one in self.measurements:
            if one.reason:
                what = f"{SIDES[one.side]}, {one.dtype}: {one.state}: {one.reason}"
                if one.state == "ok":
                    what = f"{SIDES[one.side]}, {one.dtype}: {one.reason}"
                lines.setdefault(what, []).append(one.case.label)

        return [
            *(f"{', '.join(labels)}: {what}" for what, labels in lines.items()),
            *self.left_out,
        ]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "model": self.model,
            "num_layers": self.num_layers,
            "early_layer": self.early_layer,
            "repeats": self.repeats,
            "max_seconds": self.max_seconds,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "notes": dict(self.notes),
            "measurements": [self._measurement_json(one) for one in self.measurements],
            "corpus": [rates.to_json() for rates in self.corpus],
            "left_out": list(self.left_out),
        }

    def _measurement_json(self, one: Measurement) -> dict[str, Any]:
        return {
            "side": one.side,
            "name": SIDES[one.side],
            "dtype": one.dtype,
            "group": one.group,
            "input": one.case.label,
            "batch": one.case.batch,
            "seconds_each": one.case.seconds,
            "state": one.state,
            "reason": one.reason,
            "cold": one.is_cold,
            "seconds": list(one.seconds),
            "median": one.median,
            "spread": one.spread,
            "times_real_time": one.real_time_factor,
            "ratio_to_package": self.ratio(one),
            "fraction_of_limit": self.fraction_of_limit(one),
            "fraction_of_whole": self.fraction_of_whole(one),
            "cosine": one.cosine,
            "cosine_worst": one.cosine_worst,
            "peak_bytes": one.peak_bytes,
            "weights_bytes": one.weights_bytes,
            **({"detail": dict(one.detail)} if one.detail else {}),
        }
