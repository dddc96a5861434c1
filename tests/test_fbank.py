from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from reference import feature_extractor

from seamless_w2vbert import AudioError
from seamless_w2vbert.audio import decode
from seamless_w2vbert.fbank import fbank, num_frames


def noise(samples: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (0.1 * random.standard_normal(samples)).astype(np.float32)


def expected_fbank(samples: np.ndarray) -> torch.Tensor:
    """Transformers' features, unstacked."""
    output = feature_extractor()(samples, sampling_rate=16000, return_tensors="pt")
    return output["input_features"][0].reshape(-1, 80)


@pytest.mark.parametrize(
    # The recording has digital silence, whose log energies round more coarsely.
    ("signal", "bound"),
    [("noise", 1e-4), ("speech", 5e-4)],
)
def test_an_fbank_is_that_of_transformers(speech, signal, bound):
    waveform = speech if signal == "speech" else decode(noise(48000))
    actual = fbank(waveform)
    expected = expected_fbank(waveform.samples.numpy())

    assert actual.dtype == torch.float32
    assert actual.shape == (num_frames(len(waveform.samples)), 80)
    torch.testing.assert_close(
        actual[: len(expected)], expected[: len(actual)], atol=bound, rtol=0
    )
    assert (actual[: len(expected)] - expected[: len(actual)]).abs().mean() < 1e-5


def test_every_length_around_the_frame_edges_is_embedded_or_refused(tiny):
    samples = noise(1200)

    for length in range(1201):
        if length < 560:
            with pytest.raises(AudioError, match=f"too short, {length} samples"):
                tiny(samples[:length])
            continue

        frames = 1 + (length - 400) // 160
        output = tiny(samples[:length])

        assert tiny.fbank(tiny.decode(samples[:length])).shape == (frames, 80)
        assert output.lengths.tolist() == [frames // 2]
        assert output.last_hidden_state.shape == (1, frames // 2, 128)
        assert output.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.25, -1.0])
def test_digital_silence_has_the_features_that_transformers_gives_it(value):
    """Stock fairseq2 divides by a standard deviation of zero and gives NaN.
    Transformers gives the rounding of its float32 mean, divided by sqrt(1e-7)."""
    samples = np.full(8000, value, dtype=np.float32)

    actual = fbank(decode(samples))

    assert torch.equal(actual, torch.zeros_like(actual))
    torch.testing.assert_close(
        actual, expected_fbank(samples)[: len(actual)], atol=5e-3, rtol=0
    )


def test_silence_with_a_click_is_finite(tiny):
    samples = np.zeros(16000, dtype=np.float32)
    samples[8000] = 1.0
    assert tiny(samples).last_hidden_state.isfinite().all()


def test_the_scale_of_a_recording_does_not_matter():
    samples = noise(8000)
    loud, quiet = fbank(decode(samples)), fbank(decode(samples * 0.01))
    torch.testing.assert_close(loud, quiet, atol=2e-2, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_waveform_that_is_not_finite_is_not_taken_for_silence(bad):
    waveform = decode(noise(8000))
    waveform.samples[5] = bad
    with pytest.raises(AudioError, match="not all finite"):
        fbank(waveform)


def test_threads_that_begin_together_get_the_same_and_leave_stderr_open():
    """Twenty processes of eight threads: priming the converter is a race to lose."""
    program = """
import os, threading
import torch
from seamless_w2vbert import stack
from seamless_w2vbert.audio import decode
from seamless_w2vbert.fbank import fbank
stack.load()
waveform = decode(torch.randn(16000))
def race():
    barrier = threading.Barrier(8)
    found = []
    def run():
        barrier.wait()
        found.append(fbank(waveform))
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    expected = fbank(waveform)
    same = [torch.equal(array, expected) for array in found]
    os.write(2, (f"{same.count(True)} the same\\n").encode())
for _ in range(20):
    process = os.fork()
    if not process:
        race()
        os._exit(0)
    os.waitpid(process, 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stderr.splitlines() == ["8 the same"] * 20
