"""Waveform -> fbank: (frames, 80) log-mel filter banks, standardised per mel bin.

Comes in: a :class:`Waveform`. Goes out: a plain float32 tensor, a frame every 10 ms,
from fairseq2's ``WaveformToFbankConverter`` set as seamless_communication sets it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from seamless_w2vbert import stack
from seamless_w2vbert.audio import Waveform
from seamless_w2vbert.constants import (
    FBANK_SHIFT,
    FBANK_WINDOW,
    MIN_SAMPLES,
    NUM_MEL_BINS,
    SAMPLING_RATE,
    WAVEFORM_SCALE,
)
from seamless_w2vbert.errors import AudioError

_one_at_a_time = Lock()


def _converter() -> Any:
    with _one_at_a_time:  # else each of several threads would make, and prime, its own
        return _primed_converter()


@cache
def _primed_converter() -> Any:
    converter = stack.load().WaveformToFbankConverter(
        num_mel_bins=NUM_MEL_BINS,
        waveform_scale=WAVEFORM_SCALE,
        channel_last=True,
        standardize=True,
        dtype=torch.float32,
    )

    # fairseq2n computes frames in parallel, and its Fourier transform fills its tables
    # in on first use, unguarded. One frame first, and nobody meets half-filled ones.
    one_frame = torch.zeros(FBANK_WINDOW, 1)
    with _silent_stderr():  # torch warns of the variance of a single frame
        converter({"waveform": one_frame, "sample_rate": SAMPLING_RATE})

    return converter


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send what native code writes to stderr nowhere."""
    try:
        saved = os.dup(2)
    except OSError:  # the process was started without one
        yield
        return

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def fbank(waveform: Waveform) -> Tensor:
    """Compute the filter banks that W2v-BERT 2.0 was trained on.

    As in seamless_communication's ``Translator``: Kaldi's log-mel filter banks (25 ms
    window, 10 ms shift) of samples scaled by 2**15, each mel bin with the mean and the
    unbiased variance of the utterance taken out. A bin that never changes, as in
    digital silence, comes out as zeros, as in Transformers'
    ``SeamlessM4TFeatureExtractor``; fairseq2 alone gives NaN.

    :returns: (frames, 80), float32, on the CPU.
    :raises AudioError: if the waveform is shorter than two frames (35 ms), the
        shortest that has an embedding.
    """
    samples = waveform.samples.detach().to("cpu", torch.float32)

    if samples.ndim != 1 or not bool(samples.isfinite().all()):
        raise AudioError(
            f"{waveform.source}: its samples are of shape {tuple(samples.shape)} or "
            "not all finite; expected (samples,) of finite numbers."
        )

    num_samples = len(samples)

    if num_samples < MIN_SAMPLES:
        raise AudioError(
            f"{waveform.source}: too short, {num_samples} samples at 16 kHz "
            f"({1000 * num_samples / SAMPLING_RATE:.1f} ms); one encoder frame takes "
            f"{MIN_SAMPLES} samples (35 ms)."
        )

    features: Tensor = _converter()(
        {"waveform": samples.unsqueeze(-1), "sample_rate": SAMPLING_RATE}
    )["fbank"]

    # A constant bin has no standard deviation to be divided by.
    constant = ~features.isfinite().all(dim=0)

    return features.masked_fill(constant, 0.0) if bool(constant.any()) else features


def num_frames(num_samples: int) -> int:
    """Return how many fbank frames ``num_samples`` samples at 16 kHz have."""
    return max(0, (num_samples - FBANK_WINDOW) // FBANK_SHIFT + 1)
