"""Noise in the shape of speech, for measuring where there is no recording.

Comes in: a length. Goes out: samples, the same for the same seed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seamless_w2vbert.constants import SAMPLING_RATE

_SYLLABLES_PER_SECOND = 4.0


def speech_like_noise(seconds: float, seed: int = 0) -> NDArray[np.float32]:
    """Return noise with the slope of a speech spectrum and syllables of about its rate.

    *Shape:* (samples,), at 16 kHz.
    """
    samples = max(1, round(seconds * SAMPLING_RATE))
    random = np.random.default_rng(seed)

    spectrum = np.fft.rfft(random.standard_normal(samples))
    # Flat up to 500 Hz, then 6 dB an octave down.
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLING_RATE)
    noise = np.fft.irfft(spectrum / np.maximum(1.0, frequencies / 500.0), samples)

    phase = 2 * np.pi * _SYLLABLES_PER_SECOND * np.arange(samples) / SAMPLING_RATE
    envelope = 0.02 + np.clip(np.sin(phase + random.uniform(0, 6.28)), 0, None)
    shaped = noise * envelope

    loud: NDArray[np.float32] = (0.3 * shaped / np.abs(shaped).max()).astype(np.float32)

    return loud
