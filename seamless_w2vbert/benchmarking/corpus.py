"""A corpus of mixed lengths, and how fast it goes through each step.

Comes in: how much audio. Goes out: :class:`CorpusRates`: decoding, fbanks, the encoder
alone, the whole stream and a dump in hours of audio per hour, and the share of padding.
The recordings are noise in the shape of speech, of log-normal lengths from 1 to 30 s.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from seamless_w2vbert.audio import Waveform
from seamless_w2vbert.batch import FbankBatch, HiddenBatch
from seamless_w2vbert.benchmarking.results import CorpusRates, Throughput
from seamless_w2vbert.constants import NUM_MEL_BINS, SAMPLING_RATE
from seamless_w2vbert.dumping.run import dump
from seamless_w2vbert.encoder import EncoderOutput, Layers
from seamless_w2vbert.fbank import num_frames
from seamless_w2vbert.pipeline import SpeechEncoderPipeline
from seamless_w2vbert.synthetic import speech_like_noise

MIN_SECONDS, MAX_SECONDS = 1.0, 30.0
_MEDIAN_SECONDS, _SIGMA = 7.0, 0.7
"""Of the log-normal distribution, before it is cut to the limits."""

_HOUR = 3600.0
_SEED = 30


# -- making it -----------------------------------------------------------------------


def draw_lengths(audio_seconds: float) -> list[float]:
    """Draw lengths in seconds until they add up to ``audio_seconds`` or more."""
    random = np.random.default_rng(_SEED)
    lengths: list[float] = []

    while sum(lengths) < audio_seconds:
        length = _MEDIAN_SECONDS * float(np.exp(_SIGMA * random.standard_normal()))
        if MIN_SECONDS <= length <= MAX_SECONDS:
            lengths.append(length)

    return lengths


@dataclass
class Workload:
    """What the steps work on."""

    pipeline: SpeechEncoderPipeline
    folder: Path
    """Where a step may write, in a folder of its own."""

    flac: list[Path]
    wav: list[Path]
    audio_seconds: float
    waveforms: list[Waveform] = field(default_factory=list)
    batches: list[FbankBatch] = field(default_factory=list)
    """As the stream cuts and pads them."""

    padded_share: float = 0.0


def _write(folder: Path, audio_seconds: float) -> tuple[list[Path], list[Path], float]:
    """Write the recordings in both formats, unless another side already has."""
    folder.mkdir(parents=True, exist_ok=True)
    lengths = draw_lengths(audio_seconds)
    flac = [folder / f"{index:05}.flac" for index in range(len(lengths))]
    wav = [path.with_suffix(".wav") for path in flac]

    for index, length in enumerate(lengths):
        if not wav[index].exists():
            noise = speech_like_noise(length, seed=index)
            soundfile.write(flac[index], noise, SAMPLING_RATE)
            soundfile.write(wav[index], noise, SAMPLING_RATE)

    return flac, wav, sum(lengths)


# -- the steps -----------------------------------------------------------------------


def _decode_flac(work: Workload) -> None:
    for path in work.flac:
        work.pipeline.decode(path)


def _decode_wav(work: Workload) -> None:
    for path in work.wav:
        work.pipeline.decode(path)


def _fbank(work: Workload) -> None:
    for waveform in work.waveforms:
        work.pipeline.fbank(waveform)


def _encoder(work: Workload) -> None:
    for fbanks in work.batches:
        work.pipeline.encoder(work.pipeline.encoder_frontend(fbanks))
    if work.pipeline.device.type == "cuda":
        torch.cuda.synchronize(work.pipeline.device)


def _stream(work: Workload) -> None:
    for _ in work.pipeline.stream(work.flac):
        pass


def _dump(work: Workload) -> None:
    with tempfile.TemporaryDirectory(dir=work.folder) as folder:
        dump([str(path) for path in work.flac], Path(folder) / "dump", work.pipeline)


Step = Callable[[Workload], None]

STEPS: dict[str, Step] = {
    "decode FLAC": _decode_flac,
    "decode WAV": _decode_wav,
    "fbank": _fbank,
    "encoder": _encoder,
    "stream": _stream,
    "dump": _dump,
}
"""What is timed, in turn, each over the whole corpus."""


# -- measuring -----------------------------------------------------------------------


def measure(
    pipeline: SpeechEncoderPipeline,
    folder: str | Path,
    audio_seconds: float,
    repeats: int,
    max_seconds: float,
) -> CorpusRates:
    """Time every step over a corpus.

    :param audio_seconds: how much audio it has at least.
    :param max_seconds: no further repeat is begun that would go beyond.
    """
    flac, wav, total = _write(Path(folder) / "corpus", audio_seconds)
    work = Workload(pipeline, Path(folder), flac, wav, total)
    work.batches = _batches_of_stream(pipeline, flac)
    work.waveforms = [pipeline.decode(path) for path in wav]

    # The longest batch first, for what is allocated once.
    pipeline.encoder(pipeline.encoder_frontend(work.batches[0]))

    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    begun = time.perf_counter()
    for repeat in range(repeats):
        spent = time.perf_counter() - begun
        if repeat and spent * (repeat + 1) / repeat > max_seconds:
            break
        for name, step in STEPS.items():
            start = time.perf_counter()
            step(work)
            seconds[name].append(time.perf_counter() - start)

    return CorpusRates(
        dtype=str(pipeline.dtype).removeprefix("torch."),
        files=len(flac),
        audio_seconds=total,
        padded_share=_padded_share(work.batches),
        padded_share_of_hour=_padded_share(
            _batches_of_stream(pipeline, _hour(), fbank=_blank_fbank)
        ),
        rates=tuple(
            Throughput(name, total, tuple(values)) for name, values in seconds.items()
        ),
    )


def _hour() -> list[NDArray[np.float32]]:
    """An hour of recordings in the memory of one."""
    silence = np.zeros(round(MAX_SECONDS * SAMPLING_RATE), np.float32)
    return [silence[: round(s * SAMPLING_RATE)] for s in draw_lengths(_HOUR)]


def _batches_of_stream(
    pipeline: SpeechEncoderPipeline,
    inputs: Sequence[Path | NDArray[np.float32]],
    fbank: Callable[[Waveform], Tensor] | None = None,
) -> list[FbankBatch]:
    """Return the batches that the stream makes, from a stream that does not encode."""
    batches: list[FbankBatch] = []

    def keep(fbanks: FbankBatch) -> HiddenBatch:
        batches.append(fbanks)
        return HiddenBatch(fbanks.seqs[:, :, :1], fbanks.lengths)

    def pass_on(hidden: HiddenBatch, layers: Layers = None) -> EncoderOutput:
        return EncoderOutput({}, hidden.lengths, (hidden.seqs, hidden.lengths))

    other = SpeechEncoderPipeline(pipeline.module)
    other.encoder_frontend = keep
    other.encoder = pass_on
    if fbank is not None:
        other.fbank = fbank
    for _ in other.stream(inputs):
        pass

    return batches


def _blank_fbank(waveform: Waveform) -> Tensor:
    return torch.zeros(num_frames(len(waveform.samples)), NUM_MEL_BINS)


def _padded_share(batches: Sequence[FbankBatch]) -> float:
    computed = sum(batch.seqs.size(0) * batch.seqs.size(1) for batch in batches)
    valid = sum(int(batch.lengths.sum()) for batch in batches)

    return 1 - valid / computed
