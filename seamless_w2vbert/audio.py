"""Audio in any form -> :class:`Waveform`: mono, float32, 16 kHz.

Comes in: a path or URL, bytes, a file object, an array or tensor, fairseq2's
``archive:offset:length``, or a :class:`Clip` of any of them. Decoding is fairseq2's
``AudioDecoder``, or soundfile for clips, which it can seek. What stock pipelines leave
to luck, the channels and the sampling rate, is settled here, once.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from seamless_w2vbert.urls import filesystem, is_url

AudioInput: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | NDArray[Any] | Tensor | Waveform | Clip | Deferred"  # noqa: E501
"""Whatever :func:`decode` takes."""

_ARCHIVE_CLIP = re.compile(r"^(?P<file>.+?):(?P<offset>\d+)(:(?P<length>\d+))?$")

_MAX_ABS_SAMPLE = 1e10
"""Beyond this the power spectrum overflows float32, and no microphone goes there."""

_MAX_CHANNELS = 1024

MAX_OVERSHOOT = 0.5
"""The seconds that a clip may end behind its file, as Kaldi's ``extract-segments``
tolerates it: manifests round, and headers of lossy formats are not exact."""

_HEADER_BLOCK = 1 << 16
"""The bytes that are fetched at a time where only parts of a remote file are read."""

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
class Clip:
    """A stretch of a recording. Of files that can be sought only that is decoded."""

    audio: AudioInput
    """The recording, in any form that :func:`decode` takes."""

    start: float = 0.0
    """Where it begins, in seconds."""

    end: float | None = None
    """Where it ends, in seconds; None for the end of the recording. Up to half a
    second behind it is taken for its end."""


@dataclass(frozen=True)
class Deferred:
    """Audio that another library decodes, once it is asked for."""

    load: Callable[[], NDArray[Any]]
    """Gives the samples, in a form that :func:`decode` takes; picklable."""

    info: AudioInfo
    """What is known of them before."""

    source: str
    """What messages call it."""


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
        A path, or a URL that fsspec knows; the bytes of an audio file or an open
        binary file; a NumPy array or tensor of shape (samples,) or (channels,
        samples); ``"file:offset:length"``, fairseq2's notation for a clip inside an
        uncompressed archive, in bytes (``length`` may be left out); or a
        :class:`Clip` of one of them, in seconds. WAV, FLAC, Ogg (Vorbis, Opus), MP3,
        AIFF, AU and whatever else libsndfile reads.
    :param sampling_rate:
        The rate of an array or tensor in Hz; 16,000 if None. Files carry their own.

    :raises AudioError: if ``audio`` cannot be read or decoded, is truncated, or has
        samples that are not finite; if a clip is not within its recording. Where the
        operating system could not read it, ``__cause__`` is its ``OSError``.
    """
    if isinstance(audio, Waveform):
        return audio

    source = name_of(audio)

    if isinstance(audio, (np.ndarray, Tensor)):
        channels = _channels_of_array(audio, source)
        rate = _check_rate(sampling_rate, source)
    elif isinstance(audio, Clip):
        channels, rate = _decode_clip(audio, sampling_rate)
    elif isinstance(audio, Deferred):
        _check_no_rate(sampling_rate, source)
        channels = _channels_of_array(_load(audio), source)
        rate = audio.info.sampling_rate
    else:
        data, source = _read(audio)
        _check_no_rate(sampling_rate, source)
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

    if isinstance(audio, Deferred):
        return audio.info

    if isinstance(audio, Clip):
        info = inspect(audio.audio, sampling_rate=sampling_rate)
        first, last = _bounds(audio, info.samples, SAMPLING_RATE)
        return replace(info, samples=last - first)

    if sampling_rate is not None:
        sampling_rate = _check_rate(sampling_rate, name_of(audio))

    if isinstance(audio, (np.ndarray, Tensor)):
        rate = _check_rate(sampling_rate, name_of(audio))
        channels = 1 if audio.ndim < 2 else int(audio.shape[0])
        length = int(audio.shape[-1]) if audio.ndim else 0
        return AudioInfo(_resampled_length(length, rate), rate, channels)

    with _open(audio) as file:
        return AudioInfo(
            _resampled_length(file.frames, file.samplerate),
            file.samplerate,
            file.channels,
        )


def rereadable(audio: Any) -> Any:
    """Return ``audio`` in a form that can be read twice: file objects, pipes and
    devices become their bytes, with their name; anything else stays.

    :raises AudioError: if it cannot be read.
    """
    if isinstance(audio, Clip):
        inner = rereadable(audio.audio)
        return audio if inner is audio.audio else replace(audio, audio=inner)

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
    if isinstance(audio, (Waveform, Encoded, Deferred)):
        return audio.source
    if isinstance(audio, Clip):
        end = "" if audio.end is None else audio.end
        return f"{name_of(audio.audio)}#{audio.start}-{end}"
    if isinstance(audio, (str, os.PathLike)):
        return os.fsdecode(audio)
    if isinstance(audio, Tensor):
        return "<tensor>"
    if isinstance(audio, np.ndarray):
        return "<array>"
    if isinstance(audio, (bytes, bytearray, memoryview)):
        return "<bytes>"
    if audio is None:
        return "<null>"

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
    elif audio is None:
        raise AudioError("There is no audio: it is null in the manifest.")
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

    if is_url(path):
        return _read_url(path)

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
            if length is None:
                length = _length_of_riff(file.read(12))
                file.seek(offset)
            return file.read(-1 if length is None else length)
    except OSError as ex:
        hint = "" if clip else " (for a clip in an archive: file:offset:length)"
        # The cause tells a caller whether this file is at fault or the whole storage.
        raise AudioError(f"{path}: cannot be read: {ex.strerror}{hint}.") from ex
    except ValueError as ex:  # a null byte in the path
        raise AudioError(f"{path!r}: cannot be read: {ex}.") from None


def _length_of_riff(header: bytes) -> int | None:
    """Return the bytes of the WAV file that starts with ``header``, as it says itself:
    Kaldi's archives hold one behind the other. None where it does not know."""
    if header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return None

    size = int.from_bytes(header[4:8], "little")

    # What writes to a pipe claims nothing, or the largest size there is.
    return 8 + size if 0 < size < 0x7FFF_0000 else None


def _read_url(url: str) -> bytes:
    with _url_errors(url):
        fs, path = filesystem(url)
        clip = _ARCHIVE_CLIP.match(path)

        if clip is None or fs.exists(path):
            return bytes(fs.cat_file(path))

        file, offset = clip["file"], int(clip["offset"])
        length = None if clip["length"] is None else int(clip["length"])
        if length is None:
            header = fs.cat_file(file, start=offset, end=offset + 12)
            length = _length_of_riff(header)

        end = None if length is None else offset + length
        data = bytes(fs.cat_file(file, start=offset, end=end))

    if len(data) < (length or 0):
        raise AudioError(
            f"{url}: the clip ends at byte {end:,}, but the archive is shorter; the "
            "manifest does not belong to this archive."
        )

    return data


@contextmanager
def _url_errors(url: str) -> Iterator[None]:
    try:
        yield
    except AudioError:
        raise
    # Each filesystem has its own exceptions, and few are an OSError.
    except Exception as ex:
        reason = getattr(ex, "strerror", None) or str(ex) or type(ex).__name__
        raise AudioError(f"{url}: cannot be read: {reason.rstrip('.')}.") from ex


@contextmanager
def _open(audio: Any) -> Iterator[soundfile.SoundFile]:
    """Open encoded audio such that only what is asked for is read, where that can be.

    :raises AudioError: if it cannot be read, or what is done with it fails.
    """
    source = name_of(audio)
    is_path = isinstance(audio, (str, os.PathLike))
    opened: Any

    try:
        if is_path and os.path.isfile(audio):
            with (
                open(audio, "rb") as opened,
                soundfile.SoundFile(opened.fileno(), closefd=False) as file,
            ):
                yield file
        elif is_path and is_url(source) and not _ARCHIVE_CLIP.match(source):
            with _open_url(source) as opened, soundfile.SoundFile(opened) as file:
                yield file
        else:
            with soundfile.SoundFile(io.BytesIO(_read(audio)[0])) as file:
                yield file
    except (soundfile.LibsndfileError, TypeError, ValueError) as ex:
        raise _cannot_decode(source, ex) from None
    except OSError as ex:
        raise AudioError(f"{source}: cannot be read: {ex.strerror or ex}.") from ex


@contextmanager
def _open_url(url: str) -> Iterator[Any]:
    with _url_errors(url):
        fs, path = filesystem(url)
        opened = fs.open(path, "rb", block_size=_HEADER_BLOCK)

    with opened:
        if opened.seekable():
            yield opened
        else:
            yield io.BytesIO(_read_url(url))


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
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_header(file, source)
    except (soundfile.LibsndfileError, OSError) as ex:
        raise _cannot_decode(source, ex) from None


def _check_header(file: soundfile.SoundFile, source: str) -> None:
    """Refuse what libsndfile would quietly decode less of than the file claims."""
    frames, log = file.frames, file.extra_info
    seconds = frames / file.samplerate

    if frames > _MAX_FRAMES:
        raise AudioError(
            f"{source}: its header does not say how long it is, as that of a "
            "stream; write it anew, for example with `ffmpeg -i IN OUT.flac`."
        )

    # libsndfile logs "data : 64000 (should be 32000)" where a header claims more
    # bytes than follow. Streamed files claim the largest size there is.
    claims = re.findall(r"(?:data|SSND|Data Size|riff)\s*: (\d+) \(should be", log)

    if any(int(claimed) < 0x7FFF_0000 for claimed in claims) or any(
        sign in log for sign in _SIGNS_OF_TRUNCATION
    ):
        raise _truncated(source, seconds)


def _decode_clip(
    clip: Clip, sampling_rate: int | None
) -> tuple[NDArray[np.float32], int]:
    audio, source = clip.audio, name_of(clip)

    if isinstance(audio, Waveform):
        audio, sampling_rate = audio.samples, SAMPLING_RATE
    elif isinstance(audio, Deferred):
        sampling_rate = audio.info.sampling_rate
        audio = _load(audio)

    if isinstance(audio, (np.ndarray, Tensor)):
        channels = _channels_of_array(audio, source)
        rate = _check_rate(sampling_rate, source)
        first, last = _bounds(clip, channels.shape[1], rate)
        return channels[:, first:last], rate

    _check_no_rate(sampling_rate, source)

    with _open(audio) as file:
        _check_header(file, source)
        first, last = _bounds(clip, file.frames, file.samplerate)
        file.seek(first)
        # (S, C) -> (C, S)
        channels = file.read(last - first, dtype="float32", always_2d=True).T

        if channels.shape[1] < last - first:
            raise _truncated(source, (first + channels.shape[1]) / file.samplerate)

        return channels, file.samplerate


def _bounds(clip: Clip, frames: int, rate: int) -> tuple[int, int]:
    """Return the first sample of a clip and the one behind its last."""
    seconds = frames / rate
    end = seconds if clip.end is None else clip.end

    if 0 <= clip.start < end <= seconds + MAX_OVERSHOOT:
        first, last = round(clip.start * rate), min(round(end * rate), frames)
        if first < last:
            return first, last

    raise AudioError(
        f"{name_of(clip)}: there is no such clip in a recording of {seconds:.2f} s; "
        "expected start and end in seconds."
    )


def _load(audio: Deferred) -> NDArray[Any]:
    try:
        return audio.load()
    except AudioError:
        raise
    # Whatever library is behind it, one bad file is no reason to end a dump.
    except Exception as ex:
        reason = (str(ex) or type(ex).__name__).splitlines()[0].rstrip(".")
        raise AudioError(f"{audio.source}: cannot be loaded: {reason}.") from ex


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


def _check_no_rate(rate: int | None, source: str) -> None:
    if rate is not None:
        raise AudioError(
            f"{source}: `sampling_rate` was given, but files carry their own; "
            "leave it out."
        )


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
