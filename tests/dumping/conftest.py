from __future__ import annotations

import numpy as np
import pytest
import soundfile

from seamless_w2vbert import SpeechEncoderPipeline


@pytest.fixture(scope="session")
def pipeline() -> SpeechEncoderPipeline:
    """The pipeline that dumps embed with."""
    return SpeechEncoderPipeline.from_pretrained("tiny-random")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, speech):
    """A folder of 24 clips of speech of mixed lengths, some in subfolders."""
    root = tmp_path_factory.mktemp("corpus")
    samples = speech.samples.numpy()
    random = np.random.default_rng(3)

    for number in range(24):
        length = int(random.integers(2000, 40000))
        start = int(random.integers(0, len(samples) - length))
        path = root / f"speaker{number % 3}" / f"utt-{number:02}.flac"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, samples[start : start + length], 16000)

    return root
