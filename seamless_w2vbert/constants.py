"""Numbers that describe the features of W2v-BERT 2.0, with their units."""

from __future__ import annotations

from typing import Final

SAMPLING_RATE: Final = 16_000
"""Samples per second of every waveform that reaches the fbank."""

WAVEFORM_SCALE: Final = 2**15
"""Kaldi's filter banks expect 16-bit integers; Seamless scales [-1, 1] up to them."""

NUM_MEL_BINS: Final = 80
"""Channels of one fbank frame."""

FBANK_WINDOW: Final = 400
"""Samples under one fbank frame: 25 ms."""

FBANK_SHIFT: Final = 160
"""Samples between fbank frames: 10 ms."""

FBANK_STRIDE: Final = 2
"""Fbank frames in one encoder frame: 20 ms."""

MIN_SAMPLES: Final = FBANK_WINDOW + FBANK_SHIFT
"""The shortest waveform with one encoder frame: 560 samples, 35 ms."""

PAD_VALUE: Final = 1
"""What Seamless and ``facebook/w2v-bert-2.0`` pad fbanks with."""

FRAMES_PER_SECOND: Final = SAMPLING_RATE // (FBANK_SHIFT * FBANK_STRIDE)
"""Encoder frames in a second: 50."""
