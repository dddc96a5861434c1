from __future__ import annotations

import errno
import io
import os
import pickle
import tarfile
import wave
from pathlib import Path

import fsspec
import numpy as np
import pytest
import soundfile
import soxr
import torch
from reference import SPEECH, mean_cosine, read_mono_16k

from seamless_w2vbert import AudioError
from seamless_w2vbert.audio import (
    AudioInfo,
    Clip,
    Deferred,
    Waveform,
    decode,
    inspect,
    name_of,
    rereadable,
)

CONTAINERS = [
    ("wav", "WAV", "PCM_U8"),
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "PCM_32"),
    ("wav", "WAV", "FLOAT"),
    ("wav", "WAV", "DOUBLE"),
    ("flac", "FLAC", "PCM_16"),
    ("flac", "FLAC", "PCM_24"),
    ("ogg", "OGG", "VORBIS"),
    ("opus", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
    ("aiff", "AIFF", "PCM_16"),
    ("au", "AU", "PCM_16"),
]

RATES = [8000, 11025, 16000, 22050, 44100, 48000, 96000]


def tone(rate: int, channels: int, seconds: float = 0.7) -> np.ndarray:
    """Speech-like sound, another in each channel. (samples, channels)"""
    time = np.arange(int(seconds * rate)) / rate
    random = np.random.default_rng(rate + channels)
    return np.stack(
        [
            0.2 * np.sin(2 * np.pi * (200 + 330 * c) * time) * (1 + np.sin(9 * time))
            + 0.02 * random.standard_normal(len(time))
            for c in range(channels)
        ],
        axis=1,
    ).astype(np.float32)


@pytest.fixture(scope="module")
def stereo_wav(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "stereo.wav"
    soundfile.write(path, tone(44100, 2), 44100)
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("suffix", "container", "subtype"), CONTAINERS)
def test_every_container_decodes_as_soundfile_does(
    tmp_path, suffix, container, subtype, channels
):
    path = tmp_path / f"a.{suffix}"
    rate = 48000 if subtype == "OPUS" else 16000
    soundfile.write(path, tone(rate, channels), rate, format=container, subtype=subtype)

    waveform = decode(path)

    assert waveform.samples.dtype == torch.float32
    assert waveform.source == str(path)
    assert waveform.original_sampling_rate == rate
    assert waveform.original_channels == channels
    np.testing.assert_allclose(waveform.samples, read_mono_16k(path), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", RATES)
def test_any_rate_and_channel_count_becomes_the_16_khz_mono_signal(
    tmp_path, rate, channels
):
    path = tmp_path / "a.wav"
    signal = tone(rate, channels)
    soundfile.write(path, signal, rate, subtype="FLOAT")

    expected = signal.mean(axis=1, dtype=np.float32)
    if rate != 16000:
        expected = soxr.resample(expected, rate, 16000, quality="HQ")

    np.testing.assert_allclose(decode(path).samples, expected, atol=1e-6)
    np.testing.assert_allclose(
        decode(signal.T, sampling_rate=rate).samples, expected, atol=1e-6
    )


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", RATES)
def test_the_embedding_is_that_of_the_mono_16_khz_signal(tiny, rate, channels):
    signal = tone(rate, channels)
    # The other order of operations, in double precision: resample, then average.
    by_channel = [
        channel if rate == 16000 else soxr.resample(channel, rate, 16000, quality="HQ")
        for channel in signal.T.astype(np.float64)
    ]
    expected = tiny(np.mean(by_channel, axis=0)).last_hidden_state
    actual = tiny(signal.T, sampling_rate=rate).last_hidden_state

    frames = min(actual.size(1), expected.size(1))
    # Upsampled audio has empty upper mel bins, whose rounding noise differs.
    bound = 0.99 if rate < 16000 else 0.999
    assert mean_cosine(actual[0, :frames], expected[0, :frames]) > bound


def test_stereo_is_not_read_as_interleaved_mono(stereo_wav, tiny):
    """Stock fairseq2 keeps the first half of the interleaved samples."""
    waveform = decode(stereo_wav)

    assert waveform.duration == pytest.approx(0.7, abs=1e-3)
    np.testing.assert_allclose(waveform.samples, read_mono_16k(stereo_wav), atol=1e-6)


def test_every_form_of_input_gives_the_same_samples(stereo_wav):
    expected = decode(stereo_wav).samples
    data = stereo_wav.read_bytes()
    array, rate = soundfile.read(stereo_wav, dtype="float32")

    assert torch.equal(decode(str(stereo_wav)).samples, expected)
    assert torch.equal(decode(data).samples, expected)
    assert torch.equal(decode(bytearray(data)).samples, expected)
    assert torch.equal(decode(memoryview(data)).samples, expected)
    assert torch.equal(decode(io.BytesIO(data)).samples, expected)
    with stereo_wav.open("rb") as file:
        assert torch.equal(decode(file).samples, expected)
    assert torch.equal(decode(array.T, sampling_rate=rate).samples, expected)
    assert torch.equal(
        decode(torch.from_numpy(array.T.copy()), sampling_rate=rate).samples, expected
    )


def test_a_waveform_decodes_to_itself(speech):
    assert decode(speech) is speech


def test_arrays_without_a_rate_are_taken_for_16_khz():
    array = np.linspace(-0.5, 0.5, 1600, dtype=np.float32)
    assert torch.equal(decode(array).samples, torch.from_numpy(array))


@pytest.mark.parametrize(
    "dtype", [np.int16, np.int32, np.uint8, np.float64, np.float16]
)
def test_arrays_of_other_types_are_scaled_by_their_range(tmp_path, dtype):
    signal = tone(16000, 1)[:, 0]
    if dtype == np.uint8:
        array = np.round(signal * 128 + 128).astype(np.uint8)
    elif np.issubdtype(dtype, np.integer):
        array = np.round(signal * 2.0 ** (8 * dtype().itemsize - 1)).astype(dtype)
    else:
        array = signal.astype(dtype)

    step = {np.uint8: 1 / 128, np.float16: 1e-3}.get(dtype, 1e-4)
    np.testing.assert_allclose(decode(array).samples, signal, atol=step)


def test_read_only_arrays_are_taken_without_a_warning(recwarn):
    array = np.zeros(800, dtype=np.float32)
    array.flags.writeable = False
    decode(array)
    assert not recwarn.list


def test_a_clip_inside_an_archive_is_read_by_offset_and_length(tmp_path, stereo_wav):
    archive = tmp_path / "clips.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(SPEECH, "first.flac")
        tar.add(stereo_wav, "second.wav")
    with tarfile.open(archive) as tar:
        first, second = tar.getmembers()

    clip = decode(f"{archive}:{second.offset_data}:{second.size}")
    assert torch.equal(clip.samples, decode(stereo_wav).samples)

    clip = decode(f"{archive}:{first.offset_data}:{first.size}")
    assert torch.equal(clip.samples, decode(SPEECH).samples)

    # A clip to the end of the file, which fairseq2 allows.
    assert len(decode(f"{archive}:{second.offset_data}").samples) > 0


def test_a_colon_in_a_file_name_is_no_offset(tmp_path, stereo_wav):
    path = tmp_path / "talk:10:20"
    path.write_bytes(stereo_wav.read_bytes())
    assert torch.equal(decode(path).samples, decode(stereo_wav).samples)


def test_a_clip_beyond_its_archive_is_refused(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(bytes(100))
    with pytest.raises(AudioError, match=r"a\.tar:50:51: .* has 100 bytes"):
        decode(f"{archive}:50:51")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(tmp_path, bad):
    signal = tone(16000, 1)[:, 0]
    signal[1234] = bad
    path = tmp_path / "bad.wav"
    soundfile.write(path, signal, 16000, subtype="FLOAT")

    with pytest.raises(AudioError, match="NaN or infinite"):
        decode(signal)
    with pytest.raises(AudioError, match=r"bad\.wav: .*NaN or infinite"):
        decode(path)


def test_samples_that_would_overflow_are_refused():
    with pytest.raises(AudioError, match="1e\\+20"):
        decode(np.full(1600, 1e20, dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.wav", b"", "empty"),
        ("text.wav", b"this is not audio\n" * 50, "cannot be decoded"),
        ("zeros.flac", bytes(5000), "cannot be decoded"),
        ("header.wav", b"RIFF\x24\x00\x00\x00WAVEfmt ", "cannot be decoded"),
    ],
)
def test_what_is_no_audio_is_refused_by_name(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(AudioError, match=rf"{name}: .*{reason}|{name}: {reason}"):
        decode(path)


@pytest.mark.parametrize("name", ["missing.wav", "missing.tar:10:20"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(AudioError, match=f"{name}: cannot be read: No such file"):
        decode(tmp_path / name)


def test_a_folder_is_no_audio(tmp_path):
    with pytest.raises(AudioError, match="Is a directory"):
        decode(tmp_path)


@pytest.mark.parametrize("suffix", ["wav", "aiff", "au", "flac"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, tone(16000, 1, seconds=3), 16000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    with pytest.raises(
        AudioError, match=rf"cut\.{suffix}: (truncated|cannot be decod)"
    ):
        decode(path)


def test_a_streamed_wav_without_a_length_is_not_taken_for_truncated(tmp_path):
    """ffmpeg and sox write the largest size there is when they write to a pipe."""
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(16000, 1), 16000, subtype="PCM_16")
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    expected = decode(path).samples

    for size in (0xFFFF_FFFF, 0x7FFF_F024):
        data[at : at + 4] = size.to_bytes(4, "little")
        assert torch.equal(decode(bytes(data)).samples, expected)


def test_a_renamed_file_is_decoded_by_its_content(tmp_path, stereo_wav):
    path = tmp_path / "really_wav.mp3"
    path.write_bytes(stereo_wav.read_bytes())
    assert torch.equal(decode(path).samples, decode(stereo_wav).samples)


def test_a_wav_of_no_samples_decodes_to_none(tmp_path):
    path = tmp_path / "none.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
    assert len(decode(path).samples) == 0


@pytest.mark.parametrize("rate", [0, -16000, 0.5, 16000.5, 10**9])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(AudioError, match="sampling rate"):
        decode(np.zeros(1600, dtype=np.float32), sampling_rate=rate)


def test_a_rate_beside_a_file_is_refused():
    with pytest.raises(AudioError, match="files carry their own"):
        decode(SPEECH, sampling_rate=16000)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((1600, 2), dtype=np.float32), "transpose it"),
        (np.zeros((1, 2, 3), dtype=np.float32), "3 dimensions"),
        (np.array(0.5, dtype=np.float32), "0 dimensions"),
        (np.zeros(1600, dtype=complex), "complex128"),
        (np.zeros(1600, dtype=bool), "bool"),
    ],
)
def test_arrays_of_another_shape_or_kind_are_refused(array, reason):
    with pytest.raises(AudioError, match=reason):
        decode(array)


@pytest.mark.parametrize("thing", [None, 3, ["a.wav"], io.StringIO("text")])
def test_what_is_no_input_at_all_is_refused(thing):
    with pytest.raises(AudioError):
        decode(thing)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("suffix", "container", "subtype"), CONTAINERS)
def test_the_header_tells_the_length_that_decoding_gives(
    tmp_path, suffix, container, subtype, rate
):
    if subtype == "OPUS" and rate not in (8000, 16000, 48000):
        rate = 24000
    if container == "MP3" and rate == 96000:
        rate = 32000
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(rate, 1), rate, format=container, subtype=subtype)

    assert abs(inspect(path).samples - len(decode(path).samples)) <= 1
    assert inspect(path.read_bytes()) == inspect(path)


def test_integers_of_64_bits_are_refused_since_nothing_tells_their_range():
    array = (tone(16000, 1)[:, 0] * 20000).astype(np.int64)
    with pytest.raises(AudioError, match="int64 is not audio"):
        decode(array)


def test_masked_arrays_are_refused():
    with pytest.raises(AudioError, match="masked array"):
        decode(np.ma.masked_greater(np.zeros(800), 1))


def test_lazily_negated_tensors_are_read_as_they_are():
    imaginary = torch.linspace(-0.5, 0.5, 800)
    lazy = torch.complex(torch.zeros(800), imaginary).conj().imag
    torch.testing.assert_close(decode(lazy).samples, -imaginary)


@pytest.mark.parametrize("rate", ["16000", [16000], 1j, True, float("nan")])
def test_a_rate_that_is_no_number_is_refused(rate):
    with pytest.raises(AudioError, match="sampling rate"):
        decode(np.zeros(1600, dtype=np.float32), sampling_rate=rate)


@pytest.mark.parametrize(
    ("suffix", "container", "subtype"),
    [("wav", "RF64", "PCM_16"), ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS")],
)
@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_truncation_that_libsndfile_only_logs_is_refused(
    tmp_path, suffix, container, subtype, fraction
):
    path = tmp_path / f"cut.{suffix}"
    signal = tone(16000, 1, seconds=30)
    soundfile.write(path, signal, 16000, format=container, subtype=subtype)
    path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])

    with pytest.raises(AudioError, match=rf"cut\.{suffix}: truncated"):
        decode(path)


def test_a_flac_of_unknown_length_is_refused_with_a_way_out(tmp_path):
    """As an encoder writes it to a pipe: the header's count of samples is zero."""
    path = tmp_path / "piped.flac"
    soundfile.write(path, tone(16000, 1), 16000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the 36-bit count in STREAMINFO
    data[22:26] = bytes(4)
    path.write_bytes(data)

    with pytest.raises(
        AudioError, match=r"does not say how long it is.*ffmpeg"
    ) as error:
        decode(path)
    assert "\n" not in str(error.value)


def test_messages_hold_no_stack_of_the_decoder(tmp_path):
    path = tmp_path / "text.flac"
    path.write_bytes(b"fLaC" + bytes(range(256)))
    with pytest.raises(AudioError) as error:
        decode(path)
    assert "frame #" not in str(error.value)
    assert "BytesIO" not in str(error.value)
    assert "\n" not in str(error.value)


# -- clips ---------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "container", "subtype"), CONTAINERS)
def test_a_clip_is_that_stretch_of_every_container(
    tmp_path, suffix, container, subtype
):
    path = tmp_path / f"a.{suffix}"
    rate = 48000 if subtype == "OPUS" else 16000
    soundfile.write(path, tone(rate, 2, 8.0), rate, format=container, subtype=subtype)
    whole, _ = soundfile.read(path, dtype="float32", always_2d=True)
    whole = whole.mean(axis=1, dtype=np.float32)

    for start, end in ((0.0, 0.5), (1.2345, 2.5), (6.9, None)):
        last = None if end is None else round(end * rate)
        expected = whole[round(start * rate) : last]
        if rate != 16000:
            expected = soxr.resample(expected, rate, 16000, quality="HQ")
        for audio in (path, path.read_bytes()):
            waveform = decode(Clip(audio, start, end))
            np.testing.assert_allclose(waveform.samples, expected, atol=1e-6)
            assert waveform.original_channels == 2
        assert abs(inspect(Clip(path, start, end)).samples - len(expected)) <= 1


def test_only_what_a_clip_needs_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.zeros(16000 * 60), 16000)
    read = soundfile.SoundFile.read
    counts = []

    def counted(self, frames=-1, *args, **kwargs):
        counts.append(frames)
        return read(self, frames, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert len(decode(Clip(path, 30, 31)).samples) == 16000
    assert counts == [16000]


def test_arrays_and_waveforms_and_clips_in_archives_are_clipped_too(tmp_path):
    signal = tone(8000, 2, 2.0).T
    expected = decode(signal[:, 4000:8000], sampling_rate=8000).samples
    clip = Clip(signal, 0.5, 1.0)
    assert torch.equal(decode(clip, sampling_rate=8000).samples, expected)
    assert torch.equal(
        decode(Clip(torch.from_numpy(signal), 0.5, 1.0), sampling_rate=8000).samples,
        expected,
    )
    assert inspect(clip, sampling_rate=8000).samples == len(expected)

    waveform = Waveform(torch.arange(16000) / 16000)
    assert torch.equal(
        decode(Clip(waveform, 0.25, 0.5)).samples, torch.arange(4000, 8000) / 16000
    )

    soundfile.write(tmp_path / "a.wav", signal.T, 8000, subtype="FLOAT")
    data = (tmp_path / "a.wav").read_bytes()
    (tmp_path / "a.bin").write_bytes(b"junk" + data)
    clip = Clip(f"{tmp_path}/a.bin:4:{len(data)}", 0.5, 1.0)
    assert torch.equal(decode(clip).samples, expected)


@pytest.fixture
def half_second(tmp_path) -> Path:
    path = tmp_path / "half.wav"
    soundfile.write(path, tone(16000, 1, 0.5), 16000, subtype="FLOAT")
    return path


@pytest.mark.parametrize("end", [0.5, 0.51, 1.0])
def test_a_clip_may_end_half_a_second_behind_its_file(half_second, end):
    whole, _ = soundfile.read(half_second, dtype="float32")
    samples = decode(Clip(half_second, 0.1, end)).samples
    np.testing.assert_array_equal(samples, whole[1600:])
    assert inspect(Clip(half_second, 0.1, end)).samples == len(samples)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0.1, 1.01),
        (0.3, 0.2),
        (0.2, 0.2),
        (-0.1, 0.2),
        (0.5, 0.9),
        (2.0, None),
        (0.1, 0.10001),
        (float("nan"), 0.2),
        (0.1, float("nan")),
        (0.1, float("inf")),
    ],
)
def test_a_clip_that_is_not_in_its_file_is_refused(half_second, start, end):
    for audio in (half_second, half_second.read_bytes(), np.zeros(8000)):
        with pytest.raises(
            AudioError, match=r"#.*: there is no such clip.* of 0\.50 s"
        ):
            decode(Clip(audio, start, end))


def test_a_clip_of_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "cut.wav"
    soundfile.write(path, tone(16000, 1, 3.0), 16000)
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(AudioError, match=r"cut\.wav#0\.5-1\.0: truncated"):
        decode(Clip(path, 0.5, 1.0))


def test_a_clip_of_what_is_no_audio_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    with pytest.raises(AudioError, match="No such file"):
        decode(Clip(path))
    path.write_bytes(b"no audio")
    with pytest.raises(AudioError, match=r"a\.wav: cannot be decoded"):
        decode(Clip(path))
    with pytest.raises(AudioError, match="files carry their own"):
        decode(Clip(SPEECH), sampling_rate=16000)


def test_a_clip_has_a_name_and_can_be_read_again_and_sent(half_second):
    clip = Clip(str(half_second), 0.125, 0.25)
    assert name_of(clip) == f"{half_second}#0.125-0.25"
    assert name_of(Clip(b"")) == "<bytes>#0.0-"
    assert rereadable(clip) is clip
    assert pickle.loads(pickle.dumps(clip)) == clip

    again = rereadable(Clip(io.BytesIO(half_second.read_bytes()), 0.125, 0.25))
    for _ in range(2):
        assert torch.equal(decode(again).samples, decode(clip).samples)


# -- audio from elsewhere ------------------------------------------------------------


class CountedFile(fsspec.spec.AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.fetched += end - start
        return self.fs.files[self.path][start:end]


class CountedFileSystem(fsspec.AbstractFileSystem):
    """A remote filesystem that counts the bytes it hands out."""

    protocol = "counted"
    cachable = True
    fetched = 0
    files: dict[str, bytes] = {}  # noqa: RUF012

    def info(self, path, **kwargs):
        path = self._strip_protocol(path)
        if path not in self.files:
            raise FileNotFoundError(2, "No such file", path)
        return {"name": path, "size": len(self.files[path]), "type": "file"}

    def _open(self, path, mode="rb", block_size=None, **kwargs):
        return CountedFile(self, path, mode, block_size or 50 << 20, **kwargs)


@pytest.fixture
def counted(half_second):
    fsspec.register_implementation("counted", CountedFileSystem, clobber=True)
    fs = fsspec.filesystem("counted")
    fs.files.clear()
    yield fs
    fs.fetched = 0


def test_audio_behind_a_url_is_read(counted, half_second):
    data = half_second.read_bytes()
    expected = decode(half_second).samples
    counted.files.update({"b/a.wav": data, "b/a.tar": b"junk" + data + b"junk"})

    assert torch.equal(decode("counted://b/a.wav").samples, expected)
    assert torch.equal(decode("counted://b/a.tar:4").samples, expected)
    assert torch.equal(decode(f"counted://b/a.tar:4:{len(data)}").samples, expected)
    assert torch.equal(decode(f"file://{half_second}").samples, expected)
    assert torch.equal(
        decode(Clip("counted://b/a.wav", 0.25, 0.375)).samples, expected[4000:6000]
    )
    with pytest.raises(AudioError, match=r"a\.tar:4:99999999: .* archive is shorter"):
        decode("counted://b/a.tar:4:99999999")
    with pytest.raises(AudioError, match=r"counted://b/none\.wav: cannot be read"):
        decode("counted://b/none.wav")
    with pytest.raises(AudioError, match="nosuch://b/a: cannot be read: Protocol not"):
        decode("nosuch://b/a")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_of_a_long_file_behind_a_url_only_what_is_needed_is_fetched(
    counted, tmp_path, suffix
):
    path = tmp_path / f"a.{suffix}"
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        for block in np.split(tone(16000, 1, 240), 240):  # Vorbis crashes on all
            file.write(block)
    data = counted.files["b/a"] = path.read_bytes()
    whole, _ = soundfile.read(path, dtype="float32")

    counted.fetched = 0
    assert inspect("counted://b/a") == inspect(path)
    assert counted.fetched < min(400_000, len(data) / 2)

    counted.fetched = 0
    clip = decode(Clip("counted://b/a", 120, 121))
    np.testing.assert_allclose(clip.samples, whole[120 * 16000 :][:16000], atol=1e-6)
    assert counted.fetched < len(data)


def test_a_wav_in_an_archive_without_a_length_is_read_to_its_own_end(tmp_path):
    """As Kaldi's `file.ark:offset`."""
    ark = b""
    offsets = []
    for seconds in (0.25, 0.5):
        file = io.BytesIO()
        soundfile.write(file, tone(16000, 1, seconds), 16000, format="WAV")
        offsets.append(len(ark) + 4)
        ark += b"key " + file.getvalue()
    path = tmp_path / "wav.ark"
    path.write_bytes(ark)

    for offset, length in zip(offsets, (4000, 8000), strict=True):
        assert len(decode(f"{path}:{offset}").samples) == length
        assert inspect(f"{path}:{offset}").samples == length


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN])
@pytest.mark.parametrize("name", ["a.wav", "a.tar:10:20"])
def test_the_number_of_an_error_of_the_system_can_be_reached(
    monkeypatch, half_second, number, name
):
    def gone(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("seamless_w2vbert.audio.open", gone, raising=False)
    monkeypatch.setattr(Path, "read_bytes", gone)

    for audio in (str(half_second.parent / name), Clip(str(half_second), 0.1)):
        with pytest.raises(AudioError, match=os.strerror(number)) as error:
            decode(audio)
        assert error.value.__cause__.errno == number


def test_audio_that_another_library_decodes_is_loaded_when_it_is_asked_for():
    info = AudioInfo(8000, 8000, 2)
    signal = tone(8000, 2, 0.5).T
    calls = []

    def load():
        calls.append(1)
        return signal

    audio = Deferred(load, info, "row 3")

    assert (inspect(audio), name_of(audio), calls) == (info, "row 3", [])
    expected = decode(signal, sampling_rate=8000).samples
    assert torch.equal(decode(audio).samples, expected)
    assert len(decode(Clip(audio, 0.25)).samples) == 4000

    broken = Deferred(lambda: 1 / 0, info, "row 3")
    with pytest.raises(AudioError, match="row 3: cannot be loaded: division by zero"):
        decode(broken)


def test_audio_that_is_null_says_so():
    with pytest.raises(AudioError, match="null"):
        decode(None)
