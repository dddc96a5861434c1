from __future__ import annotations

import json

import pytest
import torch
from reference import edit_config, relative_difference, transformers_config
from safetensors.torch import load_file, save_file
from transformers import (
    Wav2Vec2BertForCTC,
    Wav2Vec2BertModel,
    Wav2Vec2CTCTokenizer,
)

from seamless_w2vbert import ArgumentError, CheckpointError, SpeechEncoderPipeline
from seamless_w2vbert.architecture import Architecture

SMALL = Architecture(num_layers=2, model_dim=48, num_heads=3, ffn_inner_dim=96)

ADAPTERS = {
    "none": {},
    "plain": {"add_adapter": True},
    "two layers, projected": {
        "add_adapter": True,
        "num_adapter_layers": 2,
        "output_hidden_size": 24,
    },
    "feed-forward before": {
        "add_adapter": True,
        "use_intermediate_ffn_before_adapter": True,
        "adapter_act": "gelu",
    },
}


def save(model_class, folder, **overrides):
    """A fine-tuned model with weights large enough to matter."""
    model = model_class(transformers_config(SMALL, vocab_size=6, **overrides)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) / 5
            parameter.copy_(noise + ("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def run_transformers(model, fbank):
    """Transformers on one utterance, without padding."""
    frames = len(fbank) // 2
    return model(fbank[: 2 * frames].reshape(1, frames, 160))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapted_encoder_gives_what_transformers_gives(tmp_path, clips, adapter):
    model = save(Wav2Vec2BertModel, tmp_path, **ADAPTERS[adapter])
    pipeline = SpeechEncoderPipeline.from_pretrained(tmp_path)
    output = pipeline(clips)

    for row, clip in enumerate(clips):
        fbank = pipeline.fbank(pipeline.decode(clip))
        expected = run_transformers(model, fbank).last_hidden_state[0]
        assert output.lengths[row] == len(expected)
        actual = output.last_hidden_state[row, : len(expected)]
        assert relative_difference(actual, expected) < 1e-5


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_ctc_logits_are_those_of_transformers(tmp_path, clips, adapter):
    model = save(Wav2Vec2BertForCTC, tmp_path, **ADAPTERS[adapter])
    pipeline = SpeechEncoderPipeline.from_pretrained(tmp_path)
    output = pipeline(clips)
    logits = pipeline.logits(output)

    for row, clip in enumerate(clips):
        fbank = pipeline.fbank(pipeline.decode(clip))
        expected = run_transformers(model, fbank).logits[0]
        length = output.lengths[row]
        assert relative_difference(logits[row, :length], expected) < 1e-5
        assert (logits[row, length:] == 0).all()


def test_inner_layers_of_an_adapted_encoder_keep_their_numbers(tmp_path, clips):
    model = save(Wav2Vec2BertModel, tmp_path, add_adapter=True)
    pipeline = SpeechEncoderPipeline.from_pretrained(tmp_path)
    fbank = pipeline.fbank(pipeline.decode(clips[0]))
    frames = len(fbank) // 2
    with torch.inference_mode():
        expected = model(
            fbank[: 2 * frames].reshape(1, frames, 160), output_hidden_states=True
        )
    output = pipeline(clips[:1], layers=(0, 1, 2))

    assert pipeline.num_layers == 2
    for layer in range(3):
        actual = output.hidden_states[layer][0]
        assert relative_difference(actual, expected.hidden_states[layer][0]) < 1e-5


@pytest.fixture
def speller(tmp_path):
    """A CTC model and a character tokenizer in one folder."""
    model = save(Wav2Vec2BertForCTC, tmp_path)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "|": 5}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token="<pad>", word_delimiter_token="|"
    )
    tokenizer.save_pretrained(tmp_path)
    return model, tokenizer, tmp_path


def test_greedy_decoding_gives_the_text_of_transformers(speller, clips):
    model, tokenizer, folder = speller
    pipeline = SpeechEncoderPipeline.from_pretrained(folder)
    texts = pipeline.transcribe(clips, sampling_rate=16000)

    assert len(texts) == len(clips)
    assert any(texts)
    for text, clip in zip(texts, clips, strict=True):
        fbank = pipeline.fbank(pipeline.decode(clip))
        ids = run_transformers(model, fbank).logits.argmax(dim=-1)
        assert text == tokenizer.batch_decode(ids)[0]


def test_without_a_tokenizer_the_logits_are_there_and_the_text_is_not(tmp_path, clips):
    save(Wav2Vec2BertForCTC, tmp_path)
    pipeline = SpeechEncoderPipeline.from_pretrained(tmp_path)
    assert pipeline.logits(pipeline(clips)).size(2) == 6
    with pytest.raises(ArgumentError, match="has no tokenizer"):
        pipeline.transcribe(clips)


def test_a_model_without_a_ctc_head_says_so(tiny, clips):
    for call in (lambda: tiny.logits(tiny(clips)), lambda: tiny.transcribe(clips)):
        with pytest.raises(ArgumentError, match="has no CTC head"):
            call()


def test_a_step_goes_behind_the_logits(speller, clips):
    _, _, folder = speller
    pipeline = SpeechEncoderPipeline.from_pretrained(folder)
    pipeline.insert_after("logits", lambda logits: logits.log_softmax(dim=-1))
    probabilities = pipeline.logits(pipeline(clips)).exp().sum(dim=-1)
    torch.testing.assert_close(probabilities, torch.ones_like(probabilities))


def test_half_precision_heads_load(speller, clips):
    _, _, folder = speller
    half = SpeechEncoderPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.logits(half(clips)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("adapter.layers.0.ffn.output_dense.bias"), "is missing"),
        (
            lambda s: s.update(
                {"adapter.layers.0.self_attn.linear_q.bias": torch.ones(7)}
            ),
            "is of shape",
        ),
        (
            lambda s: s.pop("adapter.layers.0.residual_layer_norm.weight"),
            "residual_layer_norm.weight is missing",
        ),
        (lambda s: s.update({"adapter.extra": torch.ones(1)}), "is unexpected"),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(tmp_path, change, message):
    save(Wav2Vec2BertModel, tmp_path, add_adapter=True)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(CheckpointError, match=message):
        SpeechEncoderPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "setting",
    [
        {"adapter_act": "tanhshrink"},
        {"adapter_stride": 0},
        {"adapter_kernel_size": "three"},
        {"num_attention_heads": 7},
    ],
)
def test_an_adapter_that_the_config_does_not_fit_is_refused(tmp_path, setting):
    save(Wav2Vec2BertModel, tmp_path, add_adapter=True)
    edit_config(tmp_path, **setting)
    with pytest.raises(CheckpointError):
        SpeechEncoderPipeline.from_pretrained(tmp_path)
