"""Two tensors that should be equal -> how far apart, where, and whether that is much.

Comes in: pairs of (frames, D) tensors, file by file. Goes out: a :class:`Difference`
per stage, and whether it is within its :class:`Tolerance`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from seamless_w2vbert.errors import ArgumentError


@dataclass(frozen=True)
class Tolerance:
    """How large a difference may be, relative to the signal."""

    max: float
    """Of the largest difference, to the largest absolute value."""

    mean: float
    """Of the mean difference, to the mean absolute value: finds what is small but
    systematic, such as another epsilon."""

    def __mul__(self, factor: float) -> Tolerance:
        return Tolerance(self.max * factor, self.mean * factor)


@dataclass(frozen=True)
class Place:
    """Where a difference is largest."""

    file: str
    frame: int
    seconds: float
    dimension: int


@dataclass(frozen=True)
class Difference:
    """How far apart two sides are at one stage, over all files."""

    max_abs: float
    mean_abs: float
    max_relative: float
    mean_relative: float
    cosine_mean: float
    cosine_worst: float
    worst: Place | None
    frames: int
    shape_mismatch: str | None
    """Set where one side has more frames or dimensions than the other."""

    @property
    def where(self) -> str:
        """Where the two differ most, in words; empty where they do not."""
        if self.shape_mismatch is not None:
            return self.shape_mismatch
        if self.worst is None or self.max_abs == 0:
            return ""

        place = self.worst

        return (
            f"{place.file} frame {place.frame} ({place.seconds:.2f} s) "
            f"dim {place.dimension}"
        )

    def within(self, tolerance: Tolerance) -> bool:
        """Tell whether the difference is tolerable. NaN never is."""
        return (
            self.shape_mismatch is None
            and self.max_relative <= tolerance.max
            and self.mean_relative <= tolerance.mean
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what is not finite becomes None."""
        values = asdict(self)
        return {key: _finite(value) for key, value in values.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Adds up differences over files."""

    def __init__(self, frame_seconds: float) -> None:
        """:param frame_seconds: the time between two rows, for places."""
        self._frame_seconds = frame_seconds
        self._sum_abs = self._sum_signal = self._sum_cosine = 0.0
        self._max_abs = self._max_signal = 0.0
        self._worst_cosine = 1.0
        self._count = self._frames = 0
        self._worst: Place | None = None
        self._mismatch: str | None = None

    def add(self, expected: Tensor, actual: Tensor, file: str) -> Tensor:
        """Compare two (frames, D) or (frames,) tensors of one file.

        :returns: the cosine of each frame. *Shape:* (frames,)
        """
        expected, actual = _as_frames(expected), _as_frames(actual)

        if expected.shape != actual.shape and self._mismatch is None:
            self._mismatch = (
                f"{file}: {_shape(expected)} on one side, {_shape(actual)} on the other"
            )

        frames = min(len(expected), len(actual))
        width = min(expected.size(1), actual.size(1))
        expected, actual = expected[:frames, :width], actual[:frames, :width]

        if frames == 0 or width == 0:
            return expected.new_zeros(0)

        difference = (actual - expected).abs()
        # A side that is not finite differs without bound.
        difference = torch.nan_to_num(difference, nan=math.inf, posinf=math.inf)
        largest = float(difference.max())

        if largest > self._max_abs or self._worst is None:
            frame, dimension = divmod(int(difference.argmax()), width)
            seconds = frame * self._frame_seconds
            self._worst = Place(file, frame, round(seconds, 4), dimension)

        self._max_abs = max(self._max_abs, largest)
        self._sum_abs += float(difference.sum())
        self._max_signal = max(self._max_signal, float(expected.abs().max()))
        self._sum_signal += float(expected.abs().sum())

        # Of single numbers, as samples are, the cosine is a sign and says nothing.
        by_frame = (expected, actual) if width > 1 else (expected.T, actual.T)
        cosine = cosine_similarity(*by_frame, dim=1)
        same = (by_frame[0] == by_frame[1]).all(dim=1)
        cosine = cosine.clamp(-1, 1).masked_fill(same, 1.0)
        self._sum_cosine += float(cosine.sum())
        self._worst_cosine = min(self._worst_cosine, float(cosine.min()))
        self._count += difference.numel()
        self._frames += len(cosine)

        return cosine

    def result(self) -> Difference:
        """Return the difference over everything that was added."""
        count, frames = max(self._count, 1), max(self._frames, 1)
        # Of a signal that is zero everywhere only its equal is within tolerance.
        max_signal = self._max_signal or math.ulp(1.0)
        mean_signal = self._sum_signal / count or math.ulp(1.0)
        mean_abs = self._sum_abs / count

        return Difference(
            max_abs=self._max_abs,
            mean_abs=mean_abs,
            max_relative=self._max_abs / max_signal,
            mean_relative=mean_abs / mean_signal,
            cosine_mean=self._sum_cosine / frames,
            cosine_worst=self._worst_cosine,
            worst=self._worst,
            frames=self._frames,
            shape_mismatch=self._mismatch,
        )


def _as_frames(values: Tensor) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    return values.unsqueeze(1) if values.ndim == 1 else values


def _shape(values: Tensor) -> str:
    return f"{len(values)} frames of {values.size(1)}"


# -- tolerances ----------------------------------------------------------------------

# What remains between correct implementations, with a margin of three or more: the
# fbank's rounding (float32 here, float64 in Transformers) is nearly all of it. "same"
# is a stage fed with the other side's input, where rounding has not added up.

_FLOAT32 = {
    ("waveform", "own"): Tolerance(1e-5, 1e-6),
    ("fbank", "own"): Tolerance(2e-3, 3e-5),
    ("pad", "own"): Tolerance(2e-3, 3e-5),
    ("frontend", "own"): Tolerance(1e-3, 1e-4),
    ("layer", "own"): Tolerance(1e-3, 1e-4),
    ("final", "own"): Tolerance(1e-3, 1e-4),
    ("fbank", "same"): Tolerance(2e-3, 3e-5),
    ("pad", "same"): Tolerance(1e-6, 1e-7),
    ("frontend", "same"): Tolerance(1e-5, 1e-6),
    ("layer", "same"): Tolerance(1e-5, 5e-7),
    ("final", "same"): Tolerance(1e-5, 1e-6),
}

_FACTORS = {
    # A half-precision model rounds its inputs and each of its sums.
    torch.float16: {"own": 30.0, "same": 1_000.0},
    torch.bfloat16: {"own": 200.0, "same": 8_000.0},
}

_COMPUTED_IN_FLOAT32 = ("waveform", "fbank", "pad")


def default_tolerances(dtype: torch.dtype) -> dict[tuple[str, str], Tolerance]:
    """Return the tolerances for models of ``dtype``, by (kind of stage, input).

    The kinds are waveform, fbank, pad, frontend, layer and final; the input is
    ``"own"`` or ``"same"``.
    """
    factors = _FACTORS.get(dtype, {"own": 1.0, "same": 1.0})

    return {
        (kind, given): tolerance
        if kind in _COMPUTED_IN_FLOAT32
        else tolerance * factors[given]
        for (kind, given), tolerance in _FLOAT32.items()
    }


def set_tolerances(
    tolerances: Mapping[tuple[str, str], Tolerance], settings: list[str]
) -> dict[tuple[str, str], Tolerance]:
    """Apply settings of the command line: ``"10"`` multiplies all of them,
    ``"fbank=1e-3"`` or ``"layer=1e-3:1e-4"`` sets one (largest:mean).

    :raises ArgumentError: if a setting is neither.
    """
    changed = dict(tolerances)
    kinds = sorted({kind for kind, _ in tolerances})

    for setting in settings:
        kind, equals, value = setting.rpartition("=")
        try:
            numbers = [float(part) for part in value.split(":")]
        except ValueError:
            numbers = []

        valid = 1 <= len(numbers) <= 2 and all(n > 0 for n in numbers)

        if not valid or (equals and kind not in kinds) or (not equals and kind):
            raise ArgumentError(
                f"Tolerance {setting!r} is neither a factor such as 10 nor STAGE=MAX "
                f"or STAGE=MAX:MEAN, where STAGE is one of {', '.join(kinds)}."
            )

        for key in changed:
            if not equals:
                changed[key] = changed[key] * numbers[0]
            elif key[0] == kind:
                changed[key] = Tolerance(numbers[0], numbers[-1])

    return changed
