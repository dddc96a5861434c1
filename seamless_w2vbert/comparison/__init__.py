"""Two implementations, the same audio -> the first stage at which they part, and by
how much.

Comes in: audio files and two sides: models, Transformers' model, or stored embeddings.
Goes out: a :class:`Comparison`, as an object, JSON, a table or a page.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from seamless_w2vbert import stack
from seamless_w2vbert.comparison import sides
from seamless_w2vbert.comparison.measure import (
    Difference,
    Meter,
    Tolerance,
    default_tolerances,
)
from seamless_w2vbert.comparison.sides import (
    PackageSide,
    Side,
    StoredSide,
    TransformersSide,
)
from seamless_w2vbert.constants import FBANK_SHIFT, FBANK_STRIDE, SAMPLING_RATE
from seamless_w2vbert.dumping.reader import Dump
from seamless_w2vbert.errors import ArgumentError
from seamless_w2vbert.model import load_conformer_shaw_model
from seamless_w2vbert.pipeline import SpeechEncoderPipeline

__all__ = ["Comparison", "Difference", "StageResult", "Tolerance", "compare"]

SideInput: TypeAlias = (
    "str | os.PathLike[str] | SpeechEncoderPipeline | torch.nn.Module | "
    "Mapping[str, Any]"
)
"""Whatever :func:`compare` takes for a side."""

_SECONDS = {
    "waveform": 1 / SAMPLING_RATE,
    "fbank": FBANK_SHIFT / SAMPLING_RATE,
    "pad": FBANK_SHIFT / SAMPLING_RATE,
}
_FRAME_SECONDS = FBANK_STRIDE * FBANK_SHIFT / SAMPLING_RATE


@dataclass(frozen=True)
class StageResult:
    """The two sides at one stage."""

    stage: str
    """``waveform``, ``fbank``, ``pad``, ``frontend``, ``layer 1`` ... or ``final``."""

    own: Difference
    """Each side fed with what it had computed itself."""

    same: Difference | None
    """Both fed with the first side's input; None where there is none to feed."""

    own_tolerance: Tolerance
    same_tolerance: Tolerance | None

    @property
    def own_passed(self) -> bool:
        """Whether the two are within tolerance, all that came before included."""
        return self.own.within(self.own_tolerance)

    @property
    def same_passed(self) -> bool:
        """Whether this stage alone is within tolerance."""
        return (
            self.same is None
            or self.same_tolerance is None
            or self.same.within(self.same_tolerance)
        )

    @property
    def passed(self) -> bool:
        """Whether the stage is within both."""
        return self.own_passed and self.same_passed


@dataclass(frozen=True)
class Example:
    """What the page draws, of the file that differs most."""

    file: str
    samples: Tensor
    fbank: Tensor
    fbank_difference: Tensor
    cosine: Tensor
    """Of the encoder's output, frame by frame."""


@dataclass(frozen=True)
class Comparison:
    """What came of comparing two sides."""

    model: str
    against: str
    dtype: str
    files: tuple[str, ...]
    stages: tuple[StageResult, ...]
    versions: Mapping[str, str]
    example: Example | None = field(default=None, repr=False)

    @property
    def passed(self) -> bool:
        """Whether every stage is within tolerance."""
        return all(stage.passed for stage in self.stages)

    @property
    def first(self) -> StageResult | None:
        """The stage at fault: the first that leaves tolerance on the same input, else
        the first that leaves it at all."""
        for stage in self.stages:
            if not stage.same_passed or (stage.same is None and not stage.own_passed):
                return stage

        return next((stage for stage in self.stages if not stage.passed), None)

    @property
    def sentence(self) -> str:
        """What it comes to, in a sentence."""
        first = self.first

        if first is None:
            worst = max(self.stages, key=lambda stage: stage.own.max_relative)
            if worst.own.max_abs == 0:
                return "Within tolerance at every stage: the two are identical."
            return (
                f"Within tolerance at every stage; the largest difference is "
                f"{worst.own.max_relative:.1e} of the signal, at {worst.stage}."
            )

        difference = first.own if first.same is None else first.same
        what = (
            difference.shape_mismatch
            or f"{difference.max_relative:.1e} of the signal at most, "
            f"{difference.mean_relative:.1e} on average"
        )

        if first.same is None:
            return f"The first stage that leaves tolerance is {first.stage}: {what}."

        if not first.same_passed:
            return (
                f"The first stage that leaves tolerance is {first.stage}: fed with the "
                f"same input the two sides differ there by {what}, so that is where "
                "the difference arises."
            )

        return (
            f"The first stage that leaves tolerance is {first.stage}, although no "
            "stage does on the same input: rounding has added up."
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything but the pictures as plain values."""
        return {
            "model": self.model,
            "against": self.against,
            "dtype": self.dtype,
            "files": list(self.files),
            "versions": dict(self.versions),
            "passed": self.passed,
            "first": None if self.first is None else self.first.stage,
            "sentence": self.sentence,
            "stages": [
                {
                    "stage": stage.stage,
                    "passed": stage.passed,
                    "own": stage.own.to_json(),
                    "own_tolerance": vars(stage.own_tolerance),
                    "same": None if stage.same is None else stage.same.to_json(),
                    "same_tolerance": None
                    if stage.same_tolerance is None
                    else vars(stage.same_tolerance),
                }
                for stage in self.stages
            ],
        }


def compare(
    audio: Sequence[str | os.PathLike[str]],
    model: SideInput,
    against: SideInput = "transformers",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tolerances: Mapping[tuple[str, str], Tolerance] | None = None,
) -> Comparison:
    """Compare two sides stage by stage, each with its own input and with the same.

    :param audio: the files to run.
    :param model:
        A checkpoint or name for :func:`load_conformer_shaw_model`, a pipeline, a
        ``.npz`` file or folder of ``.npy`` files, or a mapping of ids to arrays.
    :param against:
        The same; or ``"transformers"`` for Transformers with the same checkpoint,
        ``"transformers:FOLDER"`` for Transformers with another, ``"seamless:NAME"`` for
        a card or file through seamless_communication's own loader; or a Transformers
        model.
    :param dtype: the dtype of models that are loaded here.
    :param tolerances: see :func:`measure.default_tolerances`.
    :raises SeamlessW2vBertError: if a side cannot be loaded or a file not be read.
    """
    if not audio:
        raise ArgumentError("There is no audio file to compare on.")

    left = _open(model, dtype, device)
    right = _open_against(against, left, model, dtype, device)
    limits = {**default_tolerances(dtype), **(tolerances or {})}
    files = tuple(os.fspath(path) for path in audio)

    if isinstance(left, StoredSide) or isinstance(right, StoredSide):
        run = _compare_stored(left, right, files, limits)
    else:
        _check_fit(left, right)
        run = _Comparing(left, right, limits)
        for file in files:
            run.add(file)

    return Comparison(
        model=left.name,
        against=right.name,
        dtype=str(dtype).removeprefix("torch."),
        files=files,
        stages=run.results(),
        versions=_versions(),
        example=run.example,
    )


# -- sides ---------------------------------------------------------------------------


def _open(
    model: Any, dtype: torch.dtype, device: torch.device | str
) -> PackageSide | StoredSide | TransformersSide:
    if isinstance(model, SpeechEncoderPipeline):
        return PackageSide(model, "seamless_w2vbert")

    if isinstance(model, Dump):
        return sides.DumpSide(model, repr(model))

    if isinstance(model, Mapping):
        return StoredSide(model, "stored embeddings")

    if isinstance(model, torch.nn.Module) and hasattr(model, "feature_projection"):
        extractor = sides._extractor(sides._import_transformers(), None)
        return TransformersSide(model, extractor, "Transformers")

    name = os.fspath(model)

    if (stored := sides.open_stored(name)) is not None:
        return stored

    if name.startswith("transformers:"):
        return sides.load_transformers(name.removeprefix("transformers:"), dtype)

    if name.startswith("seamless:"):
        return _open_seamless(name.removeprefix("seamless:"), dtype, device)

    module = load_conformer_shaw_model(name, device=device, dtype=dtype)
    return PackageSide(SpeechEncoderPipeline(module), f"seamless_w2vbert, {name}")


def _open_against(
    against: Any, left: Any, model: Any, dtype: torch.dtype, device: torch.device | str
) -> PackageSide | StoredSide | TransformersSide:
    if not (isinstance(against, str) and against == "transformers"):
        return _open(against, dtype, device)

    if not isinstance(left, PackageSide):
        raise ArgumentError(
            f"{left.name}: stored embeddings have no checkpoint for Transformers to "
            "load; say what to compare them with."
        )

    source = model if isinstance(model, (str, os.PathLike)) else None
    return sides.transformers_twin(left, source)


def _open_seamless(
    name: str, dtype: torch.dtype, device: torch.device | str
) -> PackageSide:
    module = stack.load().load_with_seamless(name, torch.device(device), dtype)
    return PackageSide(SpeechEncoderPipeline(module), f"seamless_communication, {name}")


def _check_fit(left: Any, right: Any) -> None:
    if left.num_layers != right.num_layers:
        raise ArgumentError(
            f"{left.name} has {left.num_layers} layers and {right.name} "
            f"{right.num_layers}: they are not the same model."
        )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("seamless_w2vbert", "fairseq2", "torch", "transformers", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue

    return found


# -- stages --------------------------------------------------------------------------


class _Comparing:
    """Adds up what two running implementations make of file after file."""

    def __init__(
        self, left: Side, right: Side, limits: Mapping[tuple[str, str], Tolerance]
    ) -> None:
        self._left, self._right, self._limits = left, right, limits
        self._meters: dict[tuple[str, str], Meter] = {}
        self._worst_cosine = float("inf")
        self.example: Example | None = None

    def _measure(
        self, stage: str, given: str, expected: Tensor, actual: Tensor, file: str
    ) -> Tensor:
        seconds = _SECONDS.get(stage, _FRAME_SECONDS)
        meter = self._meters.setdefault((stage, given), Meter(seconds))
        return meter.add(expected, actual, file)

    def add(self, file: str) -> None:
        left, right = self._left, self._right

        def both(
            stage: str, run: Callable[[Side, Any], Tensor], own: Any, other: Any
        ) -> tuple[Tensor, Tensor]:
            """Run a stage on each side's own input, then on the left side's."""
            expected, actual = run(left, own), run(right, other)
            self._measure(stage, "own", expected, actual, file)
            self._measure(stage, "same", expected, run(right, own), file)
            return expected, actual

        samples = left.waveform(file), right.waveform(file)
        self._measure("waveform", "own", *samples, file)

        fbanks = both(
            "fbank", lambda side, given: _even(side.fbank(given, file)), *samples
        )
        both("pad", _padded, *fbanks)
        both("frontend", lambda side, given: side.frontend(given), *fbanks)

        states, final = left.hidden_states(fbanks[0])
        other_states, other_final = right.hidden_states(fbanks[1])

        for number in range(1, left.num_layers + 1):
            stage = f"layer {number}"
            self._measure(stage, "own", states[number], other_states[number], file)
            # Fed alone on both sides, so that only this block can differ.
            fed = states[number - 1]
            expected, actual = left.layer(number, fed), right.layer(number, fed)
            self._measure(stage, "same", expected, actual, file)

        cosine = self._measure("final", "own", final, other_final, file)

        if final.shape == states[-1].shape:
            expected, actual = left.final(states[-1]), right.final(states[-1])
            self._measure("final", "same", expected, actual, file)

        self._keep(file, samples[0], *fbanks, cosine)

    def _keep(
        self, file: str, samples: Tensor, fbank: Tensor, other: Tensor, cosine: Tensor
    ) -> None:
        worst = float(cosine.min()) if len(cosine) else 1.0

        if worst < self._worst_cosine:
            frames = min(len(fbank), len(other))
            self._worst_cosine = worst
            self.example = Example(
                file, samples, fbank, other[:frames] - fbank[:frames], cosine
            )

    def results(self) -> tuple[StageResult, ...]:
        stages = list(dict.fromkeys(stage for stage, _ in self._meters))
        return tuple(self._result(stage) for stage in stages)

    def _result(self, stage: str) -> StageResult:
        kind = stage.split()[0]
        same = self._meters.get((stage, "same"))

        return StageResult(
            stage=stage,
            own=self._meters[stage, "own"].result(),
            same=None if same is None else same.result(),
            own_tolerance=self._limits[kind, "own"],
            same_tolerance=None if same is None else self._limits[kind, "same"],
        )


def _even(fbank: Tensor) -> Tensor:
    """Drop an odd last frame, which no encoder frame is made of."""
    return fbank[: len(fbank) - len(fbank) % FBANK_STRIDE]


def _padded(side: Side, fbank: Tensor) -> Tensor:
    """Pad a recording together with its first half, and lay the batch out in rows."""
    half = max(FBANK_STRIDE, len(fbank) // 4 * FBANK_STRIDE)
    return side.pad([fbank, fbank[:half]]).flatten(0, 1)


def _compare_stored(
    left: Any, right: Any, files: Sequence[str], limits: Mapping[Any, Tolerance]
) -> _Comparing:
    """Compare layers that are stored with what is stored or computed on the other
    side."""
    run = _Comparing(left, right, limits)

    for file in files:
        stored = [
            side.layers_of(file) if isinstance(side, StoredSide) else None
            for side in (left, right)
        ]
        wanted = next(layers for layers in stored if layers is not None)
        layers = [
            found if found is not None else _computed(side, file, set(wanted))
            for side, found in zip((left, right), stored, strict=True)
        ]
        common = [
            number for number in wanted if number in layers[0] and number in layers[1]
        ]

        if not common:
            raise ArgumentError(f"{file}: the two sides have no layer in common.")

        for number in sorted(common, key=lambda number: (number is None, number or 0)):
            stage = "final" if number is None else f"layer {number}"
            run._measure(stage, "own", layers[0][number], layers[1][number], file)

    return run


def _computed(
    side: Any, file: str, wanted: set[int | None]
) -> dict[int | None, Tensor]:
    states, final = side.hidden_states(side.fbank(side.waveform(file), file))
    found: dict[int | None, Tensor] = {**dict(enumerate(states)), None: final}

    return {number: seqs for number, seqs in found.items() if number in wanted}
