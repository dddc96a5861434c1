"""Audio in any form -> :class:`Waveform`: mono, float32, 16 kHz.

Comes in: a path, bytes, a file object, an array or tensor, or fairseq2's
``archive:offset:length``. Decoding is fairseq2's ``AudioDecoder``. What stock pipelines
leave to luck, the channels and the sampling rate, is settled here, once.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import soundfile
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from seamless_w2vbert import stack
from seamless_w2vbert.constants import SAMPLING_RATE
from seamless_w2vbert.errors import AudioError

AudioInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | NDArray[Any] | Tensor | Waveform"  # noqa: E501
"""Whatever :func:`decode` takes."""

_ARCHIVE_CLIP = re.compile(r"^(?P<file>.+?):(?P<offset>\d+)(:(?P<length>\d+))?$")

_MAX_ABS_SAMPLE = 1e10
"""Beyond this the power spectrum overflows float32, and no microphone goes there."""

_MAX_CHANNELS = 1024

_MAX_FRAMES = 2**40
"""More samples than this no file has: libsndfile says so where it cannot know."""

_SIGNS_OF_TRUNCATION = (
    "does not match value from 'ds64'",  # RF64
    "Last page lacks an end-of-stream bit",  # Ogg
    "Junk after the last page",  # Ogg, cut within its last page
    "Seems to be a truncated file",  # VOC
)
"""What libsndfile logs, and goes on, where a file ends early."""


@dataclass(frozen=True)
class Waveform:
    """Mono audio at 16 kHz and where it came from."""

    samples: Tensor
    """*Shape:* (samples,), float32, on the CPU, nominally in [-1, 1]."""

    source: str = "<array>"
    """The path or the kind of object it was decoded from, for messages."""

    original_sampling_rate: int = SAMPLING_RATE
    """The rate before resampling, in Hz."""

    original_channels: int = 1
    """The number of channels before they were averaged."""

    @property
    def duration(self) -> float:
        """The length in seconds."""
        return len(self.samples) / SAMPLING_RATE


@dataclass(frozen=True)
class Encoded:
    """The bytes of an audio file that can be read only once, such as a pipe."""

    data: bytes
    source: str


@dataclass(frozen=True)
class AudioInfo:
    """What an input says of itself before it is decoded."""

    samples: int
    """The number of samples it will have at 16 kHz."""

    sampling_rate: int
    """The rate it is stored at, in Hz."""

    channels: int
    """The number of channels it is stored with."""


def decode(audio: AudioInput, *, sampling_rate: int | None = None) -> Waveform:
    """Decode ``audio`` to a mono float32 waveform at 16 kHz.

    Channels are averaged, then the mono signal is resampled with soxr's high
    quality setting. Integer arrays are scaled to [-1, 1] by the range of their type.

    :param audio:
        A path; the bytes of an audio file or an open binary file; a NumPy array or
        tensor of shape (samples,) or (channels, samples); or ``"file:offset:length"``,
        fairseq2's notation for a clip inside an uncompressed archive, in bytes
        (``length`` may be left out). WAV, FLAC, Ogg (Vorbis, Opus), MP3, AIFF, AU
        and whatever else libsndfile reads.
    :param sampling_rate:
        The rate of an array or tensor in Hz; 16,000 if None. Files carry their own.

    :raises AudioError: if ``audio`` cannot be read or decoded, is truncated, or has
        samples that are not finite.
    """
    if isinstance(audio, Waveform):
        return audio

    if isinstance(audio, (np.ndarray, Tensor)):
        source = f"<{'tensor' if isinstance(audio, Tensor) else 'array'}>"
        channels = _channels_of_array(audio, source)
        rate = _check_rate(sampling_rate, source)
    else:
        data, source = _read(audio)
        if sampling_rate is not None:
            raise AudioError(
                f"{source}: `sampling_rate` was given, but files carry their own; "
                "leave it out."
            )
        channels, rate = _decode_file(data, source)

    mono = _to_mono(channels, source)

    return Waveform(
        samples=torch.from_numpy(_resample(mono, rate, source)),
        source=source,
        original_sampling_rate=rate,
        original_channels=len(channels),
    )


def inspect(audio: AudioInput, *, sampling_rate: int | None = None) -> AudioInfo:
    """Read how long ``audio`` is from its header, without decoding it.

    :raises AudioError: if it cannot be opened.
    """
    if isinstance(audio, Waveform):
        return AudioInfo(len(audio.samples), SAMPLING_RATE, 1)

    if sampling_rate is not None:
        sampling_rate = _check_rate(sampling_rate, name_of(audio))

    if isinstance(audio, (np.ndarray, Tensor)):
        rate = _check_rate(sampling_rate, name_of(audio))
        channels = 1 if audio.ndim < 2 else int(audio.shape[0])
        length = int(audio.shape[-1]) if audio.ndim else 0
        return AudioInfo(_resampled_length(length, rate), rate, channels)

    opened: bytes | io.BytesIO
    if isinstance(audio, (str, os.PathLike)) and os.path.isfile(audio):
        source = os.fsdecode(audio)
        opened = os.fsencode(audio)  # a name need not be UTF-8
    else:
        data, source = _read(audio)
        opened = io.BytesIO(data)

    try:
        with soundfile.SoundFile(opened) as file:
            return AudioInfo(
                _resampled_length(file.frames, file.samplerate),
                file.samplerate,
                file.channels,
            )
    except (soundfile.LibsndfileError, OSError, TypeError) as ex:
        raise _cannot_decode(source, ex) from None


def rereadable(audio: Any) -> Any:
    """Return ``audio`` in a form that can be read twice: file objects, pipes and
    devices become their bytes, with their name; anything else stays.

    :raises AudioError: if it cannot be read.
    """
    is_path = isinstance(audio, (str, os.PathLike))

    if hasattr(audio, "read") or (
        is_path and os.path.exists(audio) and not os.path.isfile(audio)
    ):
        return Encoded(*_read(audio))

    return audio


def is_array(audio: AudioInput) -> bool:
    """Tell whether ``audio`` is an array or tensor, which carries no rate."""
    return isinstance(audio, (np.ndarray, Tensor))


def name_of(audio: AudioInput) -> str:
    """Return what messages call ``audio``: its path, or the kind of object it is."""
    if isinstance(audio, (Waveform, Encoded)):
        return audio.source
    if isinstance(audio, (str, os.PathLike)):
        return os.fsdecode(audio)
    if isinstance(audio, Tensor):
        return "<tensor>"
    if isinstance(audio, np.ndarray):
        return "<array>"
    if isinstance(audio, (bytes, bytearray, memoryview)):
        return "<bytes>"

    return str(getattr(audio, "name", "<file object>"))


# -- bytes ---------------------------------------------------------------------------


def _read(audio: Any) -> tuple[bytes, str]:
    source = name_of(audio)

    if isinstance(audio, Encoded):
        data = audio.data
    elif isinstance(audio, (str, os.PathLike)):
        data = _read_path(source)
    elif isinstance(audio, (bytes, bytearray, memoryview)):
        data = bytes(audio)
    elif hasattr(audio, "read"):
        try:
            data = audio.read()
        except (OSError, ValueError) as ex:
            raise AudioError(f"{source}: cannot be read: {ex}.") from None
        if not isinstance(data, bytes):
            raise AudioError(
                f"{source}: reading it gave {type(data).__name__}, not bytes; open "
                'it in binary mode ("rb").'
            )
    else:
        raise AudioError(
            f"{type(audio).__name__} is not audio; pass a path, bytes, a binary file, "
            "a NumPy array or a tensor."
        )

    if not data:
        raise AudioError(f"{source}: empty, there is nothing to decode.")

    return data, source


def _read_path(path: str) -> bytes:
    if not path:
        raise AudioError("'' is no path: the name of an audio file is empty.")

    clip = None if os.path.exists(path) else _ARCHIVE_CLIP.match(path)

    try:
        if clip is None:
            return Path(path).read_bytes()

        offset = int(clip["offset"])
        length = None if clip["length"] is None else int(clip["length"])

        with open(clip["file"], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if offset + (length or 0) > size:
                raise AudioError(
                    f"{path}: the clip ends at byte {offset + (length or 0):,}, but "
                    f"{clip['file']} has {size:,} bytes; the manifest does not "
                    "belong to this archive."
                )
            file.seek(offset)
            return file.read(-1 if length is None else length)
    except OSError as ex:
        hint = "" if clip else " (for a clip in an archive: file:offset:length)"
        raise AudioError(f"{path}: cannot be read: {ex.strerror}{hint}.") from None
    except ValueError as ex:  # a null byte in the path
        raise AudioError(f"{path!r}: cannot be read: {ex}.") from None


# -- samples -------------------------------------------------------------------------


@cache
def _audio_decoder() -> Any:
    return stack.load().AudioDecoder(dtype=torch.float32)


def _decode_file(data: bytes, source: str) -> tuple[NDArray[np.float32], int]:
    _check_container(data, source)

    try:
        output = _audio_decoder()(stack.load().MemoryBlock(data))
    except (ValueError, RuntimeError) as ex:
        raise _cannot_decode(source, ex) from None

    samples = output["waveform"].numpy()
    # (S) or (S, C) -> (C, S)
    channels = samples[np.newaxis] if samples.ndim == 1 else samples.T

    return channels, round(output["sample_rate"])


def _check_container(data: bytes, source: str) -> None:
    """Refuse what libsndfile would quietly decode less of than the file claims."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            frames, log = file.frames, file.extra_info
            seconds = frames / file.samplerate
            if frames > _MAX_FRAMES:
                raise AudioError(
                    f"{source}: its header does not say how long it is, as that of a "
                    "stream; write it anew, for example with `ffmpeg -i IN OUT.flac`."
                )
    except (soundfile.LibsndfileError, OSError) as ex:
        raise _cannot_decode(source, ex) from None

    # libsndfile logs "data : 64000 (should be 32000)" where a header claims more
    # bytes than follow. Streamed files claim the largest size there is.
    claims = re.findall(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be", log)

    if any(int(claimed) < 0x7FFF_0000 for claimed in claims) or any(
        sign in log for sign in _SIGNS_OF_TRUNCATION
    ):
        raise _truncated(source, seconds)


def _truncated(source: str, seconds: float) -> AudioError:
    return AudioError(
        f"{source}: truncated, its header promises more audio than the "
        f"{seconds:.2f} s that can be decoded; fetch or convert it again."
    )


def _cannot_decode(source: str, ex: Exception) -> AudioError:
    # fairseq2 nests the cause; its own message and a stack trace stand around it.
    lines = [line.strip() for line in str(ex.__cause__ or ex).splitlines()]
    reason = next((line for line in lines if line), type(ex).__name__)
    reason = re.sub(r"^Error opening <[^>]*>: |Please file a bug report\.", "", reason)
    reason = reason.split("Exception raised from")[0].strip().rstrip(".")
    return AudioError(
        f"{source}: cannot be decoded as audio ({reason}); convert it to WAV or FLAC, "
        "for example with `ffmpeg -i IN OUT.flac`."
    )


def _channels_of_array(
    array: NDArray[Any] | Tensor, source: str
) -> NDArray[np.float32]:
    if isinstance(array, np.ma.MaskedArray):
        raise AudioError(f"{source}: is a masked array; fill it first.")

    try:
        if isinstance(array, Tensor):
            array = array.detach().cpu().resolve_conj().resolve_neg()
            array = array.float() if array.is_floating_point() else array
            array = array.numpy()
        array = np.asarray(array)
    except (RuntimeError, TypeError, NotImplementedError) as ex:
        raise AudioError(f"{source}: is not a plain array: {ex}.") from None

    if array.ndim not in (1, 2):
        raise AudioError(
            f"{source}: has {array.ndim} dimensions; expected (samples,) or "
            "(channels, samples)."
        )

    channels = np.atleast_2d(array)

    if array.ndim == 2 and channels.shape[0] > max(channels.shape[1], 1):
        raise AudioError(
            f"{source}: of shape {tuple(channels.shape)} would be "
            f"{channels.shape[0]} channels; arrays are (channels, samples), so "
            "transpose it."
        )

    if channels.dtype.kind == "f":
        return channels.astype(np.float32, copy=False)

    if channels.dtype == np.uint8:  # as in 8-bit WAV
        return np.asarray((channels - 128.0) / 128, dtype=np.float32)

    if channels.dtype.kind == "i" and channels.dtype.itemsize <= 4:
        full_scale = -float(np.iinfo(channels.dtype).min)
        return np.asarray(channels / full_scale, dtype=np.float32)

    raise AudioError(
        f"{source}: of dtype {channels.dtype} is not audio; expected floating-point "
        "samples in [-1, 1], or integers of 8, 16 or 32 bits that fill their range."
    )


def _to_mono(channels: NDArray[np.float32], source: str) -> NDArray[np.float32]:
    if not 1 <= len(channels) <= _MAX_CHANNELS:
        raise AudioError(f"{source}: has {len(channels)} channels.")

    if not np.isfinite(channels).all():
        raise AudioError(f"{source}: has samples that are NaN or infinite.")

    peak = float(np.abs(channels).max(initial=0))

    if peak > _MAX_ABS_SAMPLE:
        raise AudioError(f"{source}: has samples of {peak:g}; expected [-1, 1].")

    if len(channels) == 1:
        # A copy only where torch could not take the array as it is.
        return np.require(channels[0], requirements=["C", "W"])

    mono: NDArray[np.float32] = channels.mean(axis=0, dtype=np.float32)

    return mono


def _resample(mono: NDArray[np.float32], rate: int, source: str) -> NDArray[np.float32]:
    rate = _check_rate(rate, source)

    if rate == SAMPLING_RATE or len(mono) == 0:
        return mono

    resampled: NDArray[np.float32] = soxr.resample(
        mono, rate, SAMPLING_RATE, quality="HQ"
    )

    return resampled


def _check_rate(rate: Any, source: str) -> int:
    """Return a sampling rate in Hz as an int; that of the model for None."""
    if rate is None:
        return SAMPLING_RATE

    try:
        whole = int(rate)
        valid = not isinstance(rate, (str, bytes, bool)) and whole == rate
    except (TypeError, ValueError, OverflowError):
        whole, valid = 0, False

    if not (valid and 100 <= whole <= 10_000_000):
        raise AudioError(
            f"{source}: a sampling rate of {rate!r} Hz is not one of audio; expected a "
            "whole number of Hz such as 8000 or 48000."
        )

    return whole


def _resampled_length(samples: int, rate: float) -> int:
    return round(samples * SAMPLING_RATE / rate) if rate > 0 else 0
