from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from reference import hidden_states_from_fbanks, relative_difference, transformers_twin

from seamless_w2vbert import (
    ArgumentError,
    SeamlessW2vBertError,
    SpeechEncoderPipeline,
    stack,
)
from seamless_w2vbert.batch import FbankBatch
from seamless_w2vbert.stack.protocol import SpeechEncoder


@pytest.fixture(scope="module")
def fbanks(tiny, clips):
    return [tiny.fbank(tiny.decode(clip)) for clip in clips]


def run(pipeline, fbanks, **kwargs):
    return pipeline.encoder(pipeline.encoder_frontend(pipeline.pad(fbanks)), **kwargs)


def test_every_hidden_state_is_that_of_transformers(tiny, tiny_twin, fbanks):
    expected = hidden_states_from_fbanks(tiny_twin, fbanks)
    output = run(tiny, fbanks, layers=range(4))

    assert output.lengths.tolist() == [len(fbank) // 2 for fbank in fbanks]

    for layer in range(4):
        for row, reference in enumerate(expected[layer]):
            actual = output.hidden_states[layer][row, : len(reference)]
            assert relative_difference(actual, reference) < 1e-5


def test_another_architecture_is_that_of_transformers(
    small_model, small_architecture, fbanks
):
    pipeline = SpeechEncoderPipeline(small_model)
    twin = transformers_twin(small_model, small_architecture)
    expected = hidden_states_from_fbanks(twin, fbanks)
    output = run(pipeline, fbanks, layers=(0, 1, 2))

    for layer in range(3):
        for row, reference in enumerate(expected[layer]):
            actual = output.hidden_states[layer][row, : len(reference)]
            assert relative_difference(actual, reference) < 1e-5


def test_an_embedding_does_not_depend_on_its_batch(tiny, fbanks):
    alone = [run(tiny, [fbank]).last_hidden_state[0] for fbank in fbanks]

    for order in itertools.permutations(range(len(fbanks)), 3):
        output = run(tiny, [fbanks[index] for index in order])
        for row, index in enumerate(order):
            actual = output.last_hidden_state[row, : output.lengths[row]]
            assert relative_difference(actual, alone[index]) < 1e-5


def test_padding_comes_out_as_zeros(tiny, fbanks):
    output = run(tiny, fbanks, layers=range(4))

    for seqs in (*output.hidden_states.values(), output.last_hidden_state):
        for row, length in enumerate(output.lengths.tolist()):
            assert (seqs[row, length:] == 0).all()
            assert (seqs[row, :length] != 0).any(dim=-1).all()


def test_an_odd_last_frame_is_dropped_and_lengths_follow(tiny, fbanks):
    odd = fbanks[0][:51]

    for batch in ([odd], [odd, fbanks[1][:52]], [odd, fbanks[1][:30]]):
        output = run(tiny, batch)
        assert output.lengths[0] == 25
        actual = output.last_hidden_state[0, :25]
        expected = run(tiny, [odd[:50]]).last_hidden_state[0]
        assert relative_difference(actual, expected) < 1e-5


def test_layers_are_numbered_as_in_transformers(tiny, fbanks):
    everything = run(tiny, fbanks, layers=range(4)).hidden_states
    hidden = tiny.encoder_frontend(tiny.pad(fbanks))

    assert torch.equal(everything[0][0], hidden.seqs[0])
    for layer, negative in ((0, -4), (1, -3), (2, -2), (3, -1)):
        output = tiny.encoder(hidden, layers=(negative,))
        assert list(output.hidden_states) == [layer]
        assert torch.equal(output.hidden_states[layer], everything[layer])

    assert list(tiny.encoder(hidden, layers=2).hidden_states) == [2]
    assert torch.equal(tiny.encoder(hidden).last_hidden_state, everything[3])
    assert tiny.encoder(hidden).hidden_states == {}


@pytest.mark.parametrize("layers", [(), 4, -5, (0, 17), ("3",), (1.0,), (True,)])
def test_layers_that_do_not_exist_are_refused(tiny, fbanks, layers):
    with pytest.raises(ArgumentError, match=r"[Ll]ayer"):
        run(tiny, fbanks[:1], layers=layers)


def test_nothing_above_the_highest_layer_is_computed(tiny, fbanks):
    entered = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, n=number: entered.append(n))
        for number, layer in enumerate(tiny.module.encoder.layers, start=1)
    ]

    try:
        output = run(tiny, fbanks[:1], layers=(0, 2))
        assert entered == [1, 2]
        with pytest.raises(ArgumentError, match="add -1 to `layers`"):
            output.last_hidden_state  # noqa: B018

        entered.clear()
        run(tiny, fbanks[:1], layers=(0,))
        assert entered == []

        run(tiny, fbanks[:1])
        assert entered == [1, 2, 3]
    finally:
        for handle in handles:
            handle.remove()


def test_stages_run_without_gradients_and_in_evaluation_mode(tiny, fbanks):
    assert not tiny.module.training
    assert run(tiny, fbanks).last_hidden_state.is_inference()


class Shortener(torch.nn.Module):
    """An encoder that wraps another and halves its length, as UnitY's adaptor does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, seqs, padding):
        if stack.fairseq2_generation() == "0.2":
            from fairseq2.nn.padding import PaddingMask

            seqs, padding = self.inner(seqs, padding)
            seqs = seqs[:, ::2] * self.scale
            seqs = seqs + 0.1 * seqs.roll(1, dims=1)
            if padding is None:
                return seqs, None
            return seqs, PaddingMask((padding.seq_lens + 1) // 2, seqs.size(1))

        from fairseq2.nn import BatchLayout

        seqs = self.inner(seqs, padding)[:, ::2] * self.scale
        # As UnitY's convolution, this sees what stands in the padding.
        seqs = seqs + 0.1 * seqs.roll(1, dims=1)
        return seqs, BatchLayout.of(seqs, [(n + 1) // 2 for n in padding.seq_lens])


class UnitYLike(torch.nn.Module):
    """Names its parts as UnitYModel does, and has a text encoder besides."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.speech_encoder_frontend = model.encoder_frontend
        self.speech_encoder = Shortener(model.encoder)
        self.text_encoder = torch.nn.Linear(2, 2)


def test_an_adaptor_that_shortens_has_its_lengths_respected(tiny, fbanks):
    pipeline = SpeechEncoderPipeline(UnitYLike(tiny.module))
    plain = run(tiny, fbanks, layers=(1, 3))

    for batch in (fbanks, fbanks[:1]):
        output = run(pipeline, batch)
        lengths = [(len(fbank) // 2 + 1) // 2 for fbank in batch]
        assert output.lengths.tolist() == lengths
        assert output.last_hidden_state.size(1) == max(lengths)
        for row, length in enumerate(lengths):
            halved = plain.last_hidden_state[row, : len(batch[row]) // 2 : 2]
            torch.testing.assert_close(
                output.last_hidden_state[row, :length],
                halved + 0.1 * halved.roll(1, dims=0),
                atol=1e-5,
                rtol=0,
            )
            assert (output.last_hidden_state[row, length:] == 0).all()

    # The layers of the encoder within keep the length that it has.
    inner = run(pipeline, fbanks, layers=(1, 3))
    assert torch.equal(inner.hidden_states[3], plain.hidden_states[3])
    assert torch.equal(inner.lengths, plain.lengths)


def test_an_adaptor_streams_with_its_own_lengths(tiny, clips):
    pipeline = SpeechEncoderPipeline(UnitYLike(tiny.module))
    whole = pipeline(clips)

    for row, item in enumerate(pipeline.stream(clips)):
        assert len(item.last_hidden_state) == whole.lengths[row]


def test_a_module_without_the_parts_is_refused():
    with pytest.raises(ArgumentError, match="Linear has neither 'encoder_frontend'"):
        SpeechEncoderPipeline(torch.nn.Linear(2, 2))


def test_an_encoder_without_layers_gives_its_output_alone(tiny, fbanks):
    class Opaque(torch.nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.wrapped = encoder

        def forward(self, seqs, padding):
            return self.wrapped(seqs, padding)

    model = SpeechEncoder(tiny.module.encoder_frontend, Opaque(tiny.module.encoder))
    pipeline = SpeechEncoderPipeline(model)

    output = run(pipeline, fbanks)
    torch.testing.assert_close(
        output.last_hidden_state, run(tiny, fbanks).last_hidden_state
    )
    with pytest.raises(ArgumentError, match="Opaque has no `layers`"):
        run(pipeline, fbanks, layers=(1,))


def test_a_batch_moves_to_the_dtype_of_the_model(tiny, fbanks):
    batch = tiny.pad(fbanks)
    double = FbankBatch(batch.seqs.double(), batch.lengths)
    assert tiny.encoder_frontend(double).seqs.dtype == torch.float32


@pytest.mark.parametrize("layers", [np.int64(2), torch.tensor(2), np.array([2]), {2}])
def test_layers_may_be_any_whole_numbers(tiny, fbanks, layers):
    assert list(run(tiny, fbanks[:1], layers=layers).hidden_states) == [2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_an_error_and_no_embedding(fbanks, bad):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
    with torch.no_grad():
        pipeline.module.encoder.layers[1].ffn1.inner_proj.weight[3, 5] = bad

    assert run(pipeline, fbanks, layers=1).hidden_states[1].isfinite().all()
    for layers in (2, None):
        with pytest.raises(SeamlessW2vBertError, match="output is not finite"):
            run(pipeline, fbanks, layers=layers)


@pytest.mark.parametrize("thing", ["tiny-random", None, 3])
def test_what_is_no_module_is_refused(thing):
    with pytest.raises(ArgumentError, match="is no module"):
        SpeechEncoderPipeline(thing)
