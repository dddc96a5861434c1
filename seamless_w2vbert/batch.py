"""fbanks -> :class:`FbankBatch`: padded sequences beside their true lengths.

Comes in: (frames, 80) tensors. Goes out: (N, S, 80), padded by fairseq2's ``Collater``
as Seamless pads. Also plans which utterances share a batch, so that little of it is
padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from seamless_w2vbert import stack
from seamless_w2vbert.constants import FBANK_STRIDE, NUM_MEL_BINS, PAD_VALUE
from seamless_w2vbert.errors import AudioError

BatchT = TypeVar("BatchT", bound="PaddedBatch")
T = TypeVar("T")

MAX_PADDING = 0.04
"""The share of a batch's frames that may be padding, once it is worth running."""

_WORTH_RUNNING = 1 / 8
"""From which part of the most frames on a batch is: below, more items help more than
their padding costs."""


@dataclass(frozen=True)
class PaddedBatch:
    """Sequences of different lengths in one tensor."""

    seqs: Tensor
    """*Shape:* (N, S, D)."""

    lengths: Tensor
    """The true length of each sequence. *Shape:* (N,), int64, on the CPU."""

    def to(
        self: BatchT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BatchT:
        """Move and cast the sequences; the lengths stay on the CPU."""
        seqs = self.seqs.to(device=device, dtype=dtype, non_blocking=True)
        return replace(self, seqs=seqs)

    def unpadded(self) -> list[Tensor]:
        """Return each sequence without its padding. *Shape:* (length, D)."""
        lengths = self.lengths.tolist()
        return [seq[:length] for seq, length in zip(self.seqs, lengths, strict=True)]

    def __len__(self) -> int:
        return int(self.seqs.size(0))


@dataclass(frozen=True)
class FbankBatch(PaddedBatch):
    """A batch of fbanks: (N, frames, 80), padded with 1."""


@dataclass(frozen=True)
class HiddenBatch(PaddedBatch):
    """The encoder frontend's output: (N, frames, model_dim), a frame every 20 ms."""


@cache
def _collater() -> Any:
    return stack.load().Collater(pad_value=PAD_VALUE)


def pad(fbanks: Sequence[Tensor]) -> FbankBatch:
    """Pad fbanks to a batch.

    As in Seamless (``Collater``); an odd last frame stays in the batch and is dropped
    by the encoder frontend, which stacks frames in pairs.

    :param fbanks: tensors of shape (frames, 80), at least two frames each.
    :raises AudioError: if there is none, or one has another shape or is not finite.
    """
    if not fbanks:
        raise AudioError("There is nothing to pad: the list of fbanks is empty.")

    for index, fbank in enumerate(fbanks):
        check_fbank(fbank, f"fbank {index}")

    data = _collater()(list(fbanks))

    return FbankBatch(
        data["seqs"], torch.as_tensor(data["seq_lens"], dtype=torch.int64)
    )


def check_fbank(fbank: Tensor, name: str) -> Tensor:
    """Return ``fbank`` if it can be embedded.

    :raises AudioError: if it is not (frames, 80), too short, or not finite.
    """
    if (
        not isinstance(fbank, Tensor)
        or fbank.ndim != 2
        or fbank.size(1) != NUM_MEL_BINS
    ):
        shape = getattr(fbank, "shape", None)
        what = type(fbank).__name__ if shape is None else f"of shape {tuple(shape)}"
        raise AudioError(f"{name}: is {what}; expected (frames, {NUM_MEL_BINS}).")

    if fbank.size(0) < FBANK_STRIDE:
        raise AudioError(
            f"{name}: has {fbank.size(0)} fbank frames; one encoder frame takes "
            f"{FBANK_STRIDE}."
        )

    if not bool(fbank.isfinite().all()):
        raise AudioError(f"{name}: has fbank values that are NaN or infinite.")

    return fbank


def split_windows(
    items: Iterable[tuple[T, int]], *, window: int, max_items: int
) -> Iterator[list[tuple[T, int]]]:
    """Read items of known length in windows to be sorted, each cut into batches.

    Never holds more than one window, so the source may be endless.

    :param items: (item, length in frames) pairs.
    :param window: the frames in a window.
    :param max_items: the most items that :func:`cut_batches` is to put in a batch.
    """
    pending: list[tuple[T, int]] = []
    frames = 0

    for item, length in items:
        pending.append((item, length))
        frames += length

        if frames >= window or len(pending) >= 64 * max_items:
            yield pending
            pending, frames = [], 0

    if pending:
        yield pending


def cut_batches(
    items: Iterable[tuple[T, int]], *, max_frames: int, max_items: int
) -> list[list[T]]:
    """Group items of known length into batches that waste little on padding: sort them
    by length, and cut where the padded batch would grow over ``max_frames``, or more
    than :data:`MAX_PADDING` of it would be padding.

    :param items: (item, length in frames) pairs.
    :param max_frames: the most frames in a batch, padding included; an item longer
        than that has a batch of its own.
    :param max_items: the most items in a batch.
    :returns: the batches, longest first.
    """
    batches: list[list[T]] = []
    width = filled = 0

    # Longest first: the first of a batch sets its width, and memory peaks early.
    for item, length in sorted(items, key=lambda pair: -pair[1]):
        frames = (len(batches[-1]) + 1) * width if batches else 0
        padding = frames - filled - length
        wasteful = (
            frames > _WORTH_RUNNING * max_frames and padding > MAX_PADDING * frames
        )

        if (
            not batches
            or wasteful
            or frames > max_frames
            or len(batches[-1]) == max_items
        ):
            batches.append([])
            width, filled = max(length, 1), 0

        batches[-1].append(item)
        filled += length

    return batches
