from __future__ import annotations

import gc
import io
import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import soundfile
import torch
from reference import (
    DATA,
    SPEECH,
    hidden_states_from_audio,
    mean_cosine,
    read_mono_16k,
    relative_difference,
)

from seamless_w2vbert import (
    ArgumentError,
    AudioError,
    SpeechEncoderPipeline,
    Waveform,
    load_conformer_shaw_model,
)


def test_from_audio_every_layer_is_that_of_transformers(tiny, tiny_twin, clips):
    expected = hidden_states_from_audio(tiny_twin, clips)
    output = tiny(clips, layers=range(4))

    for layer in range(4):
        for row, reference in enumerate(expected[layer]):
            actual = output.hidden_states[layer][row, : output.lengths[row]]
            # Transformers adds 1e-7 to the variance of each mel bin, which tells
            # where two frames are all there is to take a variance of.
            bound = 1e-4 if len(reference) > 1 else 1e-3
            assert relative_difference(actual, reference) < bound


def test_tiny_random_embeds_as_the_committed_reference(tiny):
    """The reference was made by Transformers (tests/make_reference.py); both
    generations of fairseq2 have to meet it."""
    reference = np.load(DATA / "tiny_random_reference.npz")
    samples = torch.from_numpy(read_mono_16k(SPEECH)[:16000])
    output = tiny([samples], layers=range(4))

    for layer in range(4):
        expected = torch.from_numpy(reference[f"layer_{layer}"])
        assert relative_difference(output.hidden_states[layer][0], expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_the_direction_of_every_frame(tiny, clips, dtype):
    half = SpeechEncoderPipeline.from_pretrained("tiny-random", dtype=dtype)
    output = half(clips, layers=range(4))
    expected = tiny(clips, layers=range(4))

    assert half.dtype == dtype
    for layer in range(4):
        assert output.hidden_states[layer].dtype == dtype
        for row, length in enumerate(output.lengths.tolist()):
            actual = output.hidden_states[layer][row, :length]
            reference = expected.hidden_states[layer][row, :length]
            assert mean_cosine(actual, reference) > 0.999


def test_the_stages_chain_by_hand(tiny):
    waveform = tiny.decode(SPEECH)
    fbank = tiny.fbank(waveform)
    batch = tiny.pad([fbank, fbank[:100]])
    hidden = tiny.encoder_frontend(batch)
    output = tiny.encoder(hidden, layers=(1, 3))

    assert isinstance(waveform, Waveform)
    assert waveform.samples.dtype == torch.float32
    assert fbank.shape == ((len(waveform.samples) - 400) // 160 + 1, 80)
    assert batch.seqs.shape == (2, len(fbank), 80)
    assert hidden.seqs.shape == (2, len(fbank) // 2, 128)
    assert output.last_hidden_state.shape == hidden.seqs.shape
    assert output.lengths.tolist() == [len(fbank) // 2, 50]
    torch.testing.assert_close(
        output.last_hidden_state[0], tiny(SPEECH).last_hidden_state[0]
    )


def test_one_call_takes_every_form_of_input(tiny, clips):
    output = tiny(
        [str(SPEECH), SPEECH.read_bytes(), clips[0], torch.from_numpy(clips[1])],
        sampling_rate=16000,
    )
    torch.testing.assert_close(output.last_hidden_state[0], output.last_hidden_state[1])
    assert output.lengths.tolist() == [277, 277, 49, 27]


def test_a_stage_is_replaced_by_assignment(clips):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
    original = pipeline.decode
    pipeline.decode = lambda audio, **kwargs: original(clips[0])

    output = pipeline([SPEECH])
    expected = SpeechEncoderPipeline(pipeline.module)([clips[0]])

    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    (item,) = pipeline.stream([SPEECH])
    assert len(item.last_hidden_state) == expected.lengths[0]


def test_a_step_goes_between_two_stages(tiny, clips):
    pipeline = SpeechEncoderPipeline(tiny.module)
    pipeline.insert_after("fbank", lambda fbank: fbank[:40])

    output = pipeline(clips[:2])

    assert output.lengths.tolist() == [20, 20]
    with pytest.raises(ArgumentError, match="'mel'; the stages are decode, fbank"):
        pipeline.insert_after("mel", lambda x: x)


def test_a_pipeline_runs_accelerated_unless_told_otherwise(clips):
    def attention_of(pipeline):
        return type(pipeline.module.encoder.layers[0].self_attn.sdpa).__name__

    fast = SpeechEncoderPipeline.from_pretrained("tiny-random")
    stock = SpeechEncoderPipeline.from_pretrained("tiny-random", accelerated=False)
    assert attention_of(fast) == "LinearShawSDPA"
    assert attention_of(stock) == "ShawRelativePositionSDPA"

    # Left as they are, fairseq2's modules give what they give to the bit.
    own = SpeechEncoderPipeline(load_conformer_shaw_model("tiny-random"))
    expected = own(clips).last_hidden_state
    assert torch.equal(stock(clips).last_hidden_state, expected)
    torch.testing.assert_close(
        fast(clips).last_hidden_state, expected, atol=1e-5, rtol=1e-5
    )


# -- stream --------------------------------------------------------------------------


def test_a_stream_gives_what_a_call_gives_in_order(tiny, clips):
    inputs = [SPEECH, *clips, SPEECH.read_bytes()]
    items = list(tiny.stream(inputs, layers=(1, -1), max_frames=300))

    assert [item.index for item in items] == list(range(len(inputs)))
    assert items[0].id == str(SPEECH)
    assert items[1].id == "1"

    for given, item in zip(inputs, items, strict=True):
        alone = tiny([given], layers=(1, 3))
        assert item.error is None
        assert sorted(item.hidden_states) == [1, 3]
        for layer in (1, 3):
            assert (
                relative_difference(
                    item.hidden_states[layer], alone.hidden_states[layer][0]
                )
                < 1e-5
            )


def test_ids_come_with_the_inputs(tiny, clips):
    named = [(f"utt-{n}", clip) for n, clip in enumerate(clips)]
    assert [item.id for item in tiny.stream(named)] == [name for name, _ in named]


def test_arrays_in_a_stream_have_the_rate_that_is_given(tiny):
    clip = np.random.default_rng(0).standard_normal(48000).astype(np.float32) / 9
    (item,) = tiny.stream([clip], sampling_rate=48000)
    assert item.samples == 16000


def test_batches_of_a_stream_stay_within_their_bound(tiny, clips):
    pipeline = SpeechEncoderPipeline(tiny.module)
    shapes = []
    pipeline.insert_after("pad", lambda batch: shapes.append(batch.seqs.shape) or batch)

    list(pipeline.stream(clips * 20, max_frames=400, max_items=7))

    assert sum(n for n, _, _ in shapes) == 20 * len(clips)
    assert all(n * frames <= 400 or n == 1 for n, frames, _ in shapes)
    assert all(n <= 7 for n, _, _ in shapes)


def test_batches_that_do_not_fit_are_split_and_later_ones_are_smaller(tiny, clips):
    """The memory of a GPU that holds 300 frames, and its way of saying so."""
    pipeline = SpeechEncoderPipeline(tiny.module)
    run, sizes = pipeline.encoder_frontend, []

    def encoder_frontend(batch):
        sizes.append(batch.seqs.size(0) * batch.seqs.size(1))
        if sizes[-1] > 300:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return run(batch)

    pipeline.encoder_frontend = encoder_frontend
    inputs = [clips[0]] * 100 + [np.tile(clips[0], 4)]
    *items, long = pipeline.stream(
        inputs, max_frames=2_000, max_items=4, on_error="return"
    )

    expected = tiny([clips[0]]).last_hidden_state[0]
    assert len(items) == 100
    for item in items:
        assert relative_difference(item.last_hidden_state, expected) < 1e-5
    # Of what does not fit alone, the reason and the way out are given.
    assert "398 fbank frames do not fit" in str(long.error)
    assert "chunks" in str(long.error)
    # The long one came first; what had been prepared by then was split.
    refused = [n for n, size in enumerate(sizes) if size > 300]
    assert max(refused) < 30 < len(sizes)


@pytest.fixture
def corpus(tmp_path, clips):
    """Good and bad inputs, and which are bad."""
    text = tmp_path / "text.wav"
    text.write_text("no audio")
    nan = np.array(clips[0])
    nan[7] = np.nan
    inputs = [clips[0], text, clips[1], clips[2][:300], nan, tmp_path / "gone.wav"]
    return [*inputs, clips[3]], {1, 3, 4, 5}


def test_bad_inputs_come_back_as_errors_in_their_place(tiny, corpus):
    inputs, bad = corpus
    items = list(tiny.stream(inputs, on_error="return"))

    assert [item.index for item in items] == list(range(len(inputs)))
    for item in items:
        if item.index in bad:
            assert isinstance(item.error, AudioError)
            assert item.last_hidden_state is None
            assert not item.hidden_states
        else:
            assert item.error is None
            assert item.last_hidden_state.isfinite().all()


def test_a_bad_input_is_raised_after_the_good_ones_before_it(tiny, corpus):
    inputs, _ = corpus
    stream = tiny.stream(inputs)

    assert next(stream).index == 0
    with pytest.raises(AudioError, match=r"text\.wav"):
        next(stream)


def test_an_error_of_the_callers_own_reaches_the_caller(tiny, clips):
    def inputs():
        yield clips[0]
        raise RuntimeError("the manifest ended early")

    with pytest.raises(RuntimeError, match="the manifest ended early"):
        list(tiny.stream(inputs(), on_error="return"))

    pipeline = SpeechEncoderPipeline(tiny.module)
    pipeline.insert_after("fbank", lambda fbank: fbank.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        list(pipeline.stream(clips, on_error="return"))


def test_an_empty_stream_ends(tiny):
    assert list(tiny.stream([])) == []


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        ("a.wav", {}, "pass a list"),
        ([], {"on_error": "ignore"}, "'ignore'"),
        ([], {"layers": 9}, "Layer 9"),
    ],
)
def test_a_stream_checks_its_arguments_at_once(tiny, inputs, options, reason):
    with pytest.raises(ArgumentError, match=reason):
        tiny.stream(inputs, **options)


def test_a_stream_that_is_left_early_stops_its_threads(tiny, clips):
    before = threading.active_count()
    drawn = 0

    def endless():
        nonlocal drawn
        for clip in itertools.cycle(clips):
            drawn += 1
            yield clip

    stream = tiny.stream(endless(), max_frames=400, max_items=1)
    for _ in range(3):
        next(stream)
    stream.close()
    gc.collect()

    time.sleep(0.2)
    seen = drawn
    time.sleep(0.3)
    assert drawn == seen
    assert threading.active_count() <= before


def test_a_corpus_streams_at_constant_memory(tmp_path):
    """In a process of its own: 30 and 90 minutes of audio, the same peak."""
    path = tmp_path / "second.wav"
    random = np.random.default_rng(0)
    soundfile.write(path, 0.1 * random.standard_normal(16000), 16000)
    program = f"""
import resource, sys, warnings
warnings.simplefilter("ignore")
from seamless_w2vbert import SpeechEncoderPipeline
pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
peaks = []
for count in (1800, 5400):
    items = sum(1 for _ in pipeline.stream([{str(path)!r}] * count, layers=(1, 3)))
    assert items == count
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(*peaks)
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        # Memory that the allocator keeps for each of many threads is no leak.
        env={**os.environ, "OMP_NUM_THREADS": "2", "MALLOC_ARENA_MAX": "2"},
    )
    first, second = map(float, result.stdout.split()[-2:])

    # The second corpus' outputs alone are 270 MB.
    assert second - first < 100


# -- what a stream may be given --------------------------------------------------------


def test_files_that_can_be_read_only_once_stream(tiny, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(SPEECH.read_bytes()))
    writer.start()

    with SPEECH.open("rb") as file:
        inputs = [file, io.BytesIO(SPEECH.read_bytes()), fifo]
        items = list(tiny.stream(inputs, on_error="return"))
    writer.join()

    assert [item.error for item in items] == [None] * 3
    assert [len(item.last_hidden_state) for item in items] == [277] * 3


def test_a_replaced_decoder_takes_inputs_of_its_own(clips):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
    original = pipeline.decode
    pipeline.decode = lambda example, **kwargs: original(example["array"])

    examples = [{"array": clip} for clip in clips]
    (first, *_) = items = list(pipeline.stream(examples, on_error="return"))

    assert all(item.error is None for item in items)
    assert len(first.last_hidden_state) == 49


def test_a_step_that_leaves_too_little_is_an_error_of_that_input(clips):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
    pipeline.insert_after("fbank", lambda fbank: fbank[30:])
    short = clips[0][:4000]

    items = list(pipeline.stream([clips[0], ("b.wav", short)], on_error="return"))
    assert items[0].error is None
    assert "has 0 fbank frames" in str(items[1].error)


@pytest.mark.parametrize(
    ("stage", "step", "reason"),
    [
        ("decode", lambda w: Waveform(w.samples * float("nan")), "not all finite"),
        ("fbank", lambda f: f * float("nan"), "NaN or infinite"),
        ("fbank", lambda f: None, "NoneType"),
        ("fbank", lambda f: f[:, :40], r"\(98, 40\)"),
    ],
)
def test_a_step_that_spoils_its_input_is_found_out(clips, stage, step, reason):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
    pipeline.insert_after(stage, step)

    with pytest.raises(AudioError, match=reason):
        pipeline(clips[0])
    (item,) = pipeline.stream(clips[:1], on_error="return")
    assert isinstance(item.error, AudioError)


def test_a_padding_stage_that_returns_nothing_is_found_out(clips):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
    pipeline.pad = lambda fbanks: None
    with pytest.raises(ArgumentError, match="`pad` returned NoneType"):
        list(pipeline.stream(clips))


@pytest.mark.parametrize("name", ["x.raw", "no_suffix", "ends.in.npz", "é\n.wav"])
def test_the_name_of_a_file_does_not_matter(tiny, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(SPEECH.read_bytes())
    (item,) = tiny.stream([path])
    assert len(item.last_hidden_state) == 277


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        (None, {}, "pass a list"),
        (5, {}, "pass a list"),
        (np.zeros(800), {}, "pass a list"),
        (io.BytesIO(), {}, "pass a list"),
        ([], {"max_items": 0}, "`max_items` is 0"),
        ([], {"max_frames": float("nan")}, "`max_frames` is nan"),
        ([], {"num_workers": -1}, "`num_workers` is -1"),
    ],
)
def test_a_stream_refuses_what_makes_no_sense(tiny, inputs, options, reason):
    with pytest.raises(ArgumentError, match=reason):
        tiny.stream(inputs, **options)


@pytest.mark.parametrize("given", [("id",), ("id", "a.wav", 16000)])
def test_tuples_that_are_no_pairs_are_refused(tiny, given):
    with pytest.raises(ArgumentError, match=r"not \(id, audio\)"):
        list(tiny.stream([given], on_error="return"))
