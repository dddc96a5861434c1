from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    TO_FAIRSEQ,
    TO_TRANSFORMERS,
    edit_config,
    feature_extractor,
    rename,
    transformers_config,
    write_fairseq,
    write_fairseq2,
    write_transformers,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    SeamlessM4TConfig,
    SeamlessM4TForSpeechToText,
    SeamlessM4Tv2Config,
    SeamlessM4Tv2ForSpeechToText,
    SeamlessM4Tv2Model,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForAudioFrameClassification,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertForSequenceClassification,
    Wav2Vec2BertForXVector,
    Wav2Vec2BertModel,
)

from seamless_w2vbert import CheckpointError, load_conformer_shaw_model, stack
from seamless_w2vbert.architecture import Architecture, PretrainingHeads
from seamless_w2vbert.checkpoints import convert, names
from seamless_w2vbert.checkpoints.convert import convert_checkpoint
from seamless_w2vbert.errors import ArgumentError

MASK_EMBED = "masker.temporal_mask_embed"
HEADS = ("masker.", "quantizer.", "final_proj.", "final_target_proj.")


def is_encoder(name: str) -> bool:
    return name.startswith(("encoder_frontend.", "encoder."))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_bits(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert bits(actual[name]) == bits(tensor), name


def read_folder(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a Transformers folder, by safetensors' own reader."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors.update(load_file(file))
    return tensors


def read_pt(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def encoder_and_mask(model) -> dict[str, torch.Tensor]:
    """What Transformers has of a model, under its names."""
    return {
        rename(name, TO_TRANSFORMERS): tensor
        for name, tensor in model.state_dict().items()
        if is_encoder(name) or name == MASK_EMBED
    }


def load_auto(folder: Path, kind=AutoModel):
    """Load with Transformers, which may find nothing missing and nothing unknown."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.fixture
def fairseq_file(small_model, tmp_path):
    path = tmp_path / "fairseq.pt"
    write_fairseq(small_model, path)
    return path


@pytest.fixture
def fairseq2_file(small_model, tmp_path):
    path = tmp_path / "fairseq2.pt"
    write_fairseq2(small_model, path)
    return path


@pytest.fixture
def folder(small_model, small_architecture, tmp_path):
    """A Transformers folder without a mask embedding."""
    path = tmp_path / "transformers"
    write_transformers(small_model, small_architecture, path)
    return path


@pytest.fixture
def masked_folder(small_model, small_architecture, tmp_path):
    """A Transformers folder with one, as ``facebook/w2v-bert-2.0``."""
    config = transformers_config(small_architecture, mask_time_prob=0.05)
    model = Wav2Vec2BertModel(config)
    model.load_state_dict(encoder_and_mask(small_model))
    model.save_pretrained(tmp_path / "masked")
    return tmp_path / "masked"


# -- to Transformers -----------------------------------------------------------------


@pytest.mark.parametrize("source", ["fairseq_file", "fairseq2_file", "masked_folder"])
def test_transformers_loads_the_folder_as_it_is(source, small_model, tmp_path, request):
    src = request.getfixturevalue(source)

    conversion = convert_checkpoint(src, tmp_path / "out", "transformers")

    model = load_auto(tmp_path / "out")
    assert type(model) is Wav2Vec2BertModel
    assert model.config.architectures == ["Wav2Vec2BertModel"]
    assert_same_bits(dict(model.state_dict()), encoder_and_mask(small_model))
    assert conversion.num_tensors == len(encoder_and_mask(small_model))
    assert conversion.initialised == ()

    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.to_dict() == feature_extractor().to_dict()

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_config_holds_the_sizes_of_the_tensors(
    fairseq_file, small_architecture, tmp_path
):
    convert_checkpoint(fairseq_file, tmp_path / "out", "transformers")

    config = Wav2Vec2BertConfig.from_pretrained(tmp_path / "out")
    expected = transformers_config(small_architecture, mask_time_prob=0.05)
    for key in (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "feature_projection_input_dim",
        "conv_depthwise_kernel_size",
        "left_max_position_embeddings",
        "right_max_position_embeddings",
        "position_embeddings_type",
        "hidden_act",
        "layer_norm_eps",
        "mask_time_prob",
    ):
        assert getattr(config, key) == getattr(expected, key), key


def test_an_encoder_without_a_mask_embedding_gets_none(small_model, tmp_path):
    state = {n: t for n, t in small_model.state_dict().items() if is_encoder(n)}
    torch.save(state, tmp_path / "encoder.pt")

    convert_checkpoint(tmp_path / "encoder.pt", tmp_path / "out", "transformers")

    assert "masked_spec_embed" not in load_auto(tmp_path / "out").state_dict()


def test_pretraining_heads_are_named_as_dropped(fairseq_file, small_model, tmp_path):
    conversion = convert_checkpoint(fairseq_file, tmp_path / "out", "transformers")

    expected = {
        rename(name, TO_FAIRSEQ)
        for name in small_model.state_dict()
        if name.startswith(HEADS) and name not in (MASK_EMBED, "quantizer.num_updates")
    }
    expected |= {f"mlm_proj.{p}" for p in ("weight", "bias")}
    expected |= {f"encoder.layer_norm.{p}" for p in ("weight", "bias")}
    assert set(conversion.dropped) == expected
    assert conversion.num_tensors + len(conversion.dropped) == len(
        read_pt(fairseq_file)["model"]
    )


def test_large_checkpoints_are_sharded_as_transformers_shards_them(
    fairseq_file, small_model, tmp_path
):
    convert_checkpoint(
        fairseq_file, tmp_path / "out", "transformers", max_shard_bytes=100_000
    )

    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(p.stat().st_size < 110_000 for p in (tmp_path / "out").glob("model-*"))
    expected = encoder_and_mask(small_model)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    size = sum(t.numel() * t.element_size() for t in expected.values())
    assert index["metadata"]["total_size"] == size
    assert_same_bits(dict(load_auto(tmp_path / "out").state_dict()), expected)


# -- to fairseq2 ---------------------------------------------------------------------


@pytest.mark.parametrize("source", ["fairseq_file", "fairseq2_file"])
def test_pretraining_heads_are_carried_to_fairseq2(
    source, small_model, tmp_path, request
):
    src, dst = request.getfixturevalue(source), tmp_path / "out.pt"

    conversion = convert_checkpoint(src, dst, "fairseq2")

    content = read_pt(dst)
    assert content["fs2"] is True
    assert_same_bits(content["model"], dict(small_model.state_dict()))
    # fairseq keeps no count of the quantizer's updates.
    counted = source == "fairseq2_file"
    assert conversion.initialised == (() if counted else ("quantizer.num_updates",))
    assert content.get("initialised", []) == list(conversion.initialised)


@pytest.mark.parametrize("source", ["folder", "masked_folder"])
def test_heads_that_the_source_lacks_are_made_and_named(
    source, small_model, small_architecture, tmp_path, request
):
    src, dst = request.getfixturevalue(source), tmp_path / "out.pt"

    conversion = convert_checkpoint(src, dst, "fairseq2")

    wanted = replace(small_architecture, pretraining=PretrainingHeads())
    expected = stack.load().build_model(wanted).state_dict()
    content = read_pt(dst)
    assert content["model"].keys() == expected.keys()
    for name, tensor in content["model"].items():
        assert tensor.shape == expected[name].shape, name
        assert tensor.isfinite().all(), name
        if is_encoder(name):
            assert bits(tensor) == bits(small_model.state_dict()[name])

    heads = {name for name in expected if name.startswith(HEADS)}
    if source == "masked_folder":
        heads -= {MASK_EMBED}
        mask_embed = small_model.state_dict()[MASK_EMBED]
        assert bits(content["model"][MASK_EMBED]) == bits(mask_embed)
    assert set(conversion.initialised) == set(content["initialised"]) == heads


def test_made_up_heads_are_of_the_scale_that_fairseq2_draws(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "out.pt", "fairseq2")

    state = read_pt(tmp_path / "out.pt")["model"]
    assert 0 <= state["quantizer.entries"].min() < 0.01
    assert 0.99 < state["quantizer.entries"].max() <= 1
    assert state["quantizer.entry_proj.weight"].std() == pytest.approx(1, abs=0.02)
    assert not state["quantizer.entry_proj.bias"].any()
    bound = 768**-0.5
    assert state["final_target_proj.weight"].abs().max() == pytest.approx(
        bound, rel=0.01
    )
    assert state["quantizer.num_updates"] == 0


def test_made_up_heads_are_the_same_every_time(folder, tmp_path):
    for name in ("one.pt", "two.pt"):
        convert_checkpoint(folder, tmp_path / name, "fairseq2")
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()


def test_a_made_up_tensor_stays_known_as_such(folder, tmp_path):
    first = convert_checkpoint(folder, tmp_path / "one.pt", "fairseq2")
    again = convert_checkpoint(tmp_path / "one.pt", tmp_path / "two.pt", "fairseq2")
    assert again.initialised == first.initialised
    assert read_pt(tmp_path / "two.pt")["initialised"] == list(first.initialised)

    back = convert_checkpoint(tmp_path / "two.pt", tmp_path / "back", "transformers")
    assert MASK_EMBED in back.dropped
    assert_same_bits(read_folder(tmp_path / "back"), read_folder(folder))


@pytest.mark.parametrize("source", ["fairseq_file", "folder"])
def test_the_loader_of_this_package_takes_the_file(
    source, small_model, tmp_path, request
):
    src = request.getfixturevalue(source)
    convert_checkpoint(src, tmp_path / "out.pt", "fairseq2")

    model = load_conformer_shaw_model(tmp_path / "out.pt")

    assert type(model).__name__ == "Wav2Vec2Model"
    for name, tensor in small_model.state_dict().items():
        if is_encoder(name):
            assert torch.equal(model.state_dict()[name], tensor), name


def test_fairseq2s_own_loader_takes_the_file(
    small_model, small_architecture, fairseq_file, tmp_path
):
    convert_checkpoint(fairseq_file, tmp_path / "out.pt", "fairseq2")

    if stack.fairseq2_generation() == "0.8":
        from seamless_w2vbert.stack import current

        model = current.get_conformer_shaw_model_hub().load_custom_model(
            tmp_path / "out.pt", current._model_config(small_architecture)
        )
    else:
        # What fairseq2 0.2's ModelLoader does with a file.
        from fairseq2.models.utils.checkpoint import load_checkpoint

        content = load_checkpoint(tmp_path / "out.pt", restrict=True)
        model = stack.load().build_model(small_architecture).to_empty(device="cpu")
        model.load_state_dict(content["model"], strict=True)

    assert_same_bits(dict(model.state_dict()), dict(small_model.state_dict()))


def test_seamless_communication_takes_the_file_as_its_own(
    small_model, fairseq_file, tmp_path
):
    loader = pytest.importorskip("seamless_communication.models.conformer_shaw.loader")
    convert_checkpoint(fairseq_file, tmp_path / "out.pt", "fairseq2")
    content = torch.load(tmp_path / "out.pt")
    converted = loader.convert_conformer_shaw_checkpoint(content, None)
    assert_same_bits(converted["model"], dict(small_model.state_dict()))


def test_torch_maps_the_file_at_aligned_offsets(fairseq_file, tmp_path):
    convert_checkpoint(fairseq_file, tmp_path / "out.pt", "fairseq2")

    mapped = torch.load(str(tmp_path / "out.pt"), mmap=True, weights_only=True)

    assert_same_bits(mapped["model"], read_pt(tmp_path / "out.pt")["model"])
    assert all(t.data_ptr() % 64 == 0 for t in mapped["model"].values())


@pytest.mark.parametrize("pretraining", [None, PretrainingHeads(48, 64, 4, 7)])
def test_the_expected_tensors_are_those_of_fairseq2s_modules(pretraining):
    architecture = Architecture(3, 40, 5, 88, 7, 64, 8, 6, 2, pretraining)
    state = stack.load().build_model(architecture).state_dict()
    expected = convert.expected_shapes(architecture)
    assert expected == {name: tuple(t.shape) for name, t in state.items()}


# -- names and dtypes ----------------------------------------------------------------


def test_names_survive_the_way_to_transformers_and_back(small_model):
    for name in small_model.state_dict():
        if is_encoder(name) or name == MASK_EMBED:
            theirs = names.transformers_name(name)
            assert theirs == rename(name, TO_TRANSFORMERS)
            assert names.fairseq2_name(theirs, "transformers") == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_round_trip_keeps_every_bit(dtype, small_model, tmp_path):
    """NaNs with a payload, infinities and denormals as well."""
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in copy.deepcopy(small_model.state_dict()).items()
    }
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    odd = state["encoder.layers.0.layer_norm.bias"].view(integer)
    low = torch.arange(len(odd), dtype=integer)
    odd[:] = low + (0x7FC00000 if integer == torch.int32 else 0x7FC0)
    odd[:20] = low[:20]
    write_it = {"model": state, "fs2": True}
    torch.save(write_it, tmp_path / "one.pt")

    convert_checkpoint(tmp_path / "one.pt", tmp_path / "two", "transformers")
    convert_checkpoint(tmp_path / "two", tmp_path / "three.pt", "fairseq2")
    convert_checkpoint(tmp_path / "three.pt", tmp_path / "four", "transformers")

    both = {n: t for n, t in state.items() if is_encoder(n) or n == MASK_EMBED}
    back = read_pt(tmp_path / "three.pt")["model"]
    assert_same_bits({name: back[name] for name in both}, both)
    assert {t.dtype for n, t in back.items() if n != "quantizer.num_updates"} == {dtype}
    two, four = (tmp_path / n / "model.safetensors" for n in ("two", "four"))
    assert two.read_bytes() == four.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", ["fairseq_file", "masked_folder"])
def test_the_dtype_asked_for_is_that_of_torchs_cast(
    source, dtype, small_model, tmp_path, request
):
    src = request.getfixturevalue(source)
    convert_checkpoint(src, tmp_path / "out", "transformers", dtype=dtype)
    convert_checkpoint(src, tmp_path / "out.pt", "fairseq2", dtype=dtype)

    expected = {n: t.to(dtype) for n, t in encoder_and_mask(small_model).items()}
    assert_same_bits(read_folder(tmp_path / "out"), expected)
    assert Wav2Vec2BertConfig.from_pretrained(tmp_path / "out").dtype == dtype
    state = read_pt(tmp_path / "out.pt")["model"]
    assert state["quantizer.num_updates"].dtype == torch.int64
    for name, tensor in state.items():
        assert tensor.dtype == dtype or name == "quantizer.num_updates"
        if is_encoder(name):
            assert bits(tensor) == bits(small_model.state_dict()[name].to(dtype))


def test_a_value_that_float16_cannot_hold_is_refused(folder, tmp_path):
    state = load_file(folder / "model.safetensors")
    state["encoder.layers.1.ffn1_layer_norm.weight"][3] = 70_000.0
    save_file(state, folder / "model.safetensors")
    before = sorted(tmp_path.iterdir())

    with pytest.raises(CheckpointError, match=r"ffn1_layer_norm\.weight holds values"):
        convert_checkpoint(folder, tmp_path / "o", "transformers", dtype=torch.float16)

    assert sorted(tmp_path.iterdir()) == before
    convert_checkpoint(folder, tmp_path / "o", "transformers", dtype=torch.bfloat16)


# -- adapters, task heads, tokenizers ------------------------------------------------

TASKS = {
    Wav2Vec2BertForCTC: {"vocab_size": 7, "add_adapter": True},
    Wav2Vec2BertForSequenceClassification: {"num_labels": 5, "classifier_proj_size": 6},
    Wav2Vec2BertForAudioFrameClassification: {
        "num_labels": 3,
        "use_weighted_layer_sum": True,
    },
    Wav2Vec2BertForXVector: {"tdnn_dim": (8, 8, 8, 8, 12), "xvector_output_dim": 9},
    Wav2Vec2BertModel: {
        "add_adapter": True,
        "use_intermediate_ffn_before_adapter": True,
        "output_hidden_size": 32,
    },
}


@pytest.fixture(params=TASKS, ids=lambda kind: kind.__name__)
def task(request, small_architecture, tmp_path):
    kind, settings_ = request.param, TASKS[request.param]
    torch.manual_seed(1)
    model = kind(transformers_config(small_architecture, **settings_))
    model.save_pretrained(tmp_path / "task")
    (tmp_path / "task" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "task" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    (tmp_path / "task" / "training_args.bin").write_bytes(b"pickle")
    return model, tmp_path / "task"


def test_a_task_head_is_carried_to_transformers_with_its_files(task, tmp_path):
    model, folder = task

    conversion = convert_checkpoint(
        folder, tmp_path / "out", "transformers", dtype=torch.bfloat16
    )

    loaded = load_auto(tmp_path / "out", type(model))
    expected = {n: t.bfloat16().float() for n, t in model.state_dict().items()}
    assert_same_bits({n: t.float() for n, t in loaded.state_dict().items()}, expected)
    assert conversion.dropped == ()
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert after == {**before, "dtype": "bfloat16"}
    assert set(conversion.copied) == {"vocab.json", "tokenizer_config.json"}
    for name in conversion.copied:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert conversion.left == ("training_args.bin",)


def test_a_task_head_is_named_where_fairseq2_has_no_place(task, tmp_path):
    _, folder = task

    conversion = convert_checkpoint(folder, tmp_path / "out.pt", "fairseq2")

    encoder = {
        name
        for name in load_file(folder / "model.safetensors")
        if ".".join(name.removeprefix("wav2vec2_bert.").split(".")[:2])
        in ("feature_projection.layer_norm", "feature_projection.projection")
        or "encoder.layers." in name
    }
    everything = set(load_file(folder / "model.safetensors"))
    assert set(conversion.dropped) == everything - encoder != set()
    assert conversion.num_tensors == len(encoder)
    assert set(conversion.left) == {
        "training_args.bin",
        "vocab.json",
        "tokenizer_config.json",
    }


def test_the_feature_extractor_of_the_source_is_kept(folder, tmp_path):
    (folder / "preprocessor_config.json").write_text('{"processor_class": "Mine"}')
    convert_checkpoint(folder, tmp_path / "out", "transformers")
    content = (tmp_path / "out" / "preprocessor_config.json").read_text()
    assert content == '{"processor_class": "Mine"}'


# -- the speech encoder of a larger model --------------------------------------------

M4T = {
    "vocab_size": 20,
    "t2u_vocab_size": 20,
    "char_vocab_size": 20,
    "hidden_size": 48,
    "encoder_layers": 1,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_layers": 1,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 3,
    "speech_encoder_intermediate_size": 96,
    "t2u_encoder_layers": 1,
    "t2u_encoder_ffn_dim": 32,
    "t2u_encoder_attention_heads": 2,
    "t2u_decoder_layers": 1,
    "t2u_decoder_ffn_dim": 32,
    "t2u_decoder_attention_heads": 2,
    "t2u_variance_predictor_embed_dim": 48,
    "t2u_variance_predictor_hidden_dim": 16,
    "upsample_initial_channel": 16,
    "unit_hifi_gan_vocab_size": 10,
    "unit_embed_dim": 16,
    "lang_embed_dim": 8,
    "spkr_embed_dim": 8,
    "vocoder_num_langs": 2,
    "vocoder_num_spkrs": 2,
    "max_position_embeddings": 64,
    "t2u_max_position_embeddings": 64,
}


@pytest.mark.parametrize("kind", [SeamlessM4Tv2Model, SeamlessM4Tv2ForSpeechToText])
@pytest.mark.parametrize("to", ["transformers", "fairseq2"])
def test_the_blocks_of_seamless_m4t_v2_compute_the_same_alone(kind, to, tmp_path):
    torch.manual_seed(2)
    whole = kind(SeamlessM4Tv2Config(**M4T)).eval()
    with torch.no_grad():  # no LayerNorm an identity, no bias zero
        for parameter in whole.speech_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    whole.save_pretrained(tmp_path / "m4t")

    if to == "transformers":
        conversion = convert_checkpoint(tmp_path / "m4t", tmp_path / "out", to)
    else:
        conversion = convert_checkpoint(tmp_path / "m4t", tmp_path / "out.pt", to)
        convert_checkpoint(tmp_path / "out.pt", tmp_path / "out", "transformers")

    alone = load_auto(tmp_path / "out")
    features = torch.randn(2, 30, 160)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 21:] = 0
    blocks = []
    for layer in whole.speech_encoder.encoder.layers:
        layer.register_forward_hook(lambda *args: blocks.append(args[2][0]))
    with torch.inference_mode():
        whole.speech_encoder(features, attention_mask=mask)
        hidden = alone(features, attention_mask=mask, output_hidden_states=True)
    assert len(blocks) == 2
    for expected, actual in zip(blocks, hidden.hidden_states[1:], strict=True):
        for row, length in ((0, 30), (1, 21)):
            torch.testing.assert_close(actual[row, :length], expected[row, :length])

    assert conversion.extracted
    kept = len(alone.state_dict())
    assert conversion.num_tensors == kept
    stored = read_folder(tmp_path / "m4t")
    assert len(conversion.dropped) == len(stored) - kept
    for name in (
        "speech_encoder.encoder.layer_norm.weight",
        "speech_encoder.inner_layer_norm.bias",
        "speech_encoder.intermediate_ffn.intermediate_dense.weight",
        "speech_encoder.adapter.layers.0.self_attn.linear_q.weight",
        "text_decoder.layers.0.ffn.fc1.weight",
    ):
        assert name in conversion.dropped


UNITY_REST = [
    "speech_encoder.inner_layer_norm.weight",
    "speech_encoder.proj1.weight",
    "speech_encoder.proj2.bias",
    "speech_encoder.adaptor_layers.0.residual_conv.weight",
    "speech_encoder.adaptor_layers.0.self_attn.q_proj.weight",
    "speech_encoder.adaptor_layers.0.ffn.inner_proj.weight",
    "speech_encoder.layer_norm.weight",
    "text_decoder_frontend.embed.weight",
    "text_decoder.layers.0.self_attn.q_proj.weight",
    "final_proj.weight",
    "t2u_model.encoder.layers.0.ffn.inner_proj.weight",
]


@pytest.mark.parametrize("to", ["transformers", "fairseq2"])
def test_the_speech_encoder_of_a_fairseq2_unity_model_is_taken(
    to, small_model, tmp_path
):
    state = {
        name.replace("encoder_frontend.", "speech_encoder_frontend.").replace(
            "encoder.layers.", "speech_encoder.inner.layers."
        ): tensor
        for name, tensor in small_model.state_dict().items()
        if is_encoder(name)
    }
    state.update({name: torch.ones(3) for name in UNITY_REST})
    torch.save({"model": state, "fs2": True}, tmp_path / "unity.pt")
    dst = tmp_path / ("out" if to == "transformers" else "out.pt")

    conversion = convert_checkpoint(tmp_path / "unity.pt", dst, to)

    assert (conversion.source, conversion.extracted) == ("fairseq2", True)
    assert set(conversion.dropped) == set(UNITY_REST)
    model = load_conformer_shaw_model(dst)
    for name, tensor in small_model.state_dict().items():
        if is_encoder(name):
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("nesting", ["encoder", "speech_encoder", "s2t_model.encoder"])
def test_the_speech_encoder_of_a_fairseq_unity_model_is_taken(
    nesting, small_model, tmp_path
):
    prefix = f"{nesting}.w2v_encoder.w2v_model."
    state = {
        prefix + rename(name, TO_FAIRSEQ): tensor
        for name, tensor in small_model.state_dict().items()
        if is_encoder(name) or name == MASK_EMBED
    }
    rest = {
        f"{prefix}encoder.layer_norm.weight",
        f"{nesting}.adaptor.proj.0.weight",
        f"{nesting}.adaptor.layers.0.residual_pool.1.weight",
        "decoder.layers.0.self_attn.out_proj.weight",
    }
    state.update({name: torch.ones(3) for name in rest})
    torch.save({"model": state}, tmp_path / "unity.pt")

    conversion = convert_checkpoint(
        tmp_path / "unity.pt", tmp_path / "o", "transformers"
    )

    assert (conversion.source, conversion.extracted) == ("fairseq", True)
    assert set(conversion.dropped) == rest
    assert_same_bits(read_folder(tmp_path / "o"), encoder_and_mask(small_model))


def test_seamless_m4t_v1_is_refused(tmp_path):
    v1 = SeamlessM4TForSpeechToText(SeamlessM4TConfig(**M4T))
    v1.save_pretrained(tmp_path / "v1")
    with pytest.raises(CheckpointError, match=r"v1: .*linear_pos and batch norm"):
        convert_checkpoint(tmp_path / "v1", tmp_path / "out", "transformers")


@pytest.mark.parametrize(
    "name",
    [
        "speech_encoder.inner.layers.0.self_attn.sdpa.r_proj.weight",
        "speech_encoder.inner.layers.0.self_attn.sdpa.u_bias",
        "speech_encoder.inner.layers.0.conv.batch_norm.running_mean",
    ],
)
def test_a_fairseq2_unity_model_of_v1_is_refused(name, tmp_path):
    state = {"speech_encoder_frontend.model_dim_proj.weight": torch.ones(4, 160)}
    torch.save({"model": {**state, name: torch.ones(4)}}, tmp_path / "v1.pt")
    with pytest.raises(CheckpointError, match=r"v1\.pt: .*another architecture"):
        convert_checkpoint(tmp_path / "v1.pt", tmp_path / "out.pt", "fairseq2")


def test_a_speech_encoder_that_attends_in_chunks_is_refused(tmp_path):
    config = SeamlessM4Tv2Config(**M4T, speech_encoder_chunk_size=100)
    SeamlessM4Tv2ForSpeechToText(config).save_pretrained(tmp_path / "m4t")
    with pytest.raises(CheckpointError, match="speech_encoder_chunk_size to 100"):
        convert_checkpoint(tmp_path / "m4t", tmp_path / "out", "transformers")


# -- all or nothing ------------------------------------------------------------------


@pytest.mark.parametrize("to", ["transformers", "fairseq2"])
def test_an_existing_output_is_replaced_only_by_force(
    to, fairseq_file, folder, tmp_path
):
    dst = tmp_path / ("old" if to == "transformers" else "old.pt")
    if to == "transformers":
        shutil.copytree(folder, dst)
        (dst / "vocab.json").write_text("{}")
    else:
        dst.write_bytes(b"precious")

    with pytest.raises(CheckpointError, match=r"old.*exists.*--force"):
        convert_checkpoint(fairseq_file, dst, to)

    convert_checkpoint(fairseq_file, dst, to, force=True)
    assert load_conformer_shaw_model(dst) is not None
    assert not (dst / "vocab.json").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_force_does_not_delete_what_is_no_model(fairseq_file, folder, tmp_path):
    for name in ("notes.txt", "subfolder"):
        dst = tmp_path / f"with-{name}"
        shutil.copytree(folder, dst)
        (dst / name).mkdir()
        with pytest.raises(CheckpointError, match=f"holds more than a model .{name}"):
            convert_checkpoint(fairseq_file, dst, "transformers", force=True)

    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file and will not"):
        convert_checkpoint(fairseq_file, tmp_path / "file", "transformers", force=True)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match="is no file and will not"):
        convert_checkpoint(fairseq_file, tmp_path / "folder.pt", "fairseq2", force=True)


def test_the_source_is_never_the_output(fairseq_file, folder, tmp_path):
    link = tmp_path / "link.pt"
    link.symlink_to(fairseq_file)
    hard = tmp_path / "hard.pt"
    os.link(fairseq_file, hard)
    before = fairseq_file.read_bytes()

    for src, dst, to in [
        (fairseq_file, fairseq_file, "fairseq2"),
        (fairseq_file, link, "fairseq2"),
        (link, fairseq_file, "fairseq2"),
        (fairseq_file, hard, "fairseq2"),
        (folder, folder, "transformers"),
        (folder, folder / "inside", "transformers"),
        (folder, folder / "inside.pt", "fairseq2"),
        (folder / "model.safetensors", folder, "transformers"),
    ]:
        with pytest.raises(CheckpointError, match=str(dst)):
            convert_checkpoint(src, dst, to, force=True)

    assert fairseq_file.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_wrong_arguments_are_told_apart_from_bad_files(fairseq_file, tmp_path):
    for dst, to, options in [
        ("out", "fairseq2", {}),
        ("out.pt", "transformers", {}),
        ("out", "onnx", {}),
        ("out", "transformers", {"dtype": torch.int8}),
        ("out", "transformers", {"max_shard_bytes": 0}),
    ]:
        with pytest.raises(ArgumentError):
            convert_checkpoint(fairseq_file, tmp_path / dst, to, **options)

    with pytest.raises(CheckpointError, match=r"gone: there is no such file"):
        convert_checkpoint(tmp_path / "gone", tmp_path / "out", "transformers")
    with pytest.raises(CheckpointError, match="there is no folder"):
        convert_checkpoint(fairseq_file, tmp_path / "no" / "out", "transformers")


@pytest.mark.parametrize("to", ["transformers", "fairseq2"])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_things_as_they_were(
    to, force, fairseq_file, folder, tmp_path, monkeypatch
):
    dst = tmp_path / ("out" if to == "transformers" else "out.pt")
    if force:
        convert_checkpoint(folder, dst, to)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"out.*No space left on device"):
        convert_checkpoint(fairseq_file, dst, to, force=force)

    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


LIMITED = """
import resource, sys
from seamless_w2vbert.checkpoints.convert import convert_checkpoint
from seamless_w2vbert.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for dst, to in ((sys.argv[2], "transformers"), (sys.argv[3], "fairseq2")):
    try:
        convert_checkpoint(sys.argv[1], dst, to)
    except CheckpointError as ex:
        print(ex)
"""


def test_a_write_that_fails_half_way_names_the_file(fairseq_file, tmp_path):
    outputs = (tmp_path / "out", tmp_path / "out.pt")
    command = [sys.executable, "-c", LIMITED, fairseq_file, *outputs]
    result = subprocess.run(command, capture_output=True, text=True, check=True)

    for line, dst in zip(result.stdout.splitlines(), outputs, strict=True):
        assert line == f"{dst}: cannot be written: File too large."
    assert list(tmp_path.iterdir()) == [fairseq_file]


KILLED = """
import signal, sys, time
from seamless_w2vbert.checkpoints import convert, write
# A shell that starts the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
pieces = write._pieces
def slow(*arguments):
    for piece in pieces(*arguments):
        print("writing", flush=True)
        yield piece
        time.sleep(0.1)
write._pieces = slow
convert.convert_checkpoint(sys.argv[1], sys.argv[2], "fairseq2")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_conversion_leaves_no_output(how, fairseq_file, tmp_path):
    command = [sys.executable, "-c", KILLED, fairseq_file, tmp_path / "out.pt"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(how)
    process.communicate()

    left = set(tmp_path.iterdir()) - {fairseq_file}
    assert tmp_path / "out.pt" not in left
    if how == signal.SIGINT:
        assert not left
    assert all(p.name.startswith(".out.pt.") and p.suffix == ".tmp" for p in left)


# -- hostile -------------------------------------------------------------------------


class Exploit:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, target) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def refused(src, tmp_path, match: str) -> None:
    for dst, to in (("out", "transformers"), ("out.pt", "fairseq2")):
        with pytest.raises(CheckpointError, match=match) as error:
            convert_checkpoint(src, tmp_path / dst, to)
        assert src.name in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / dst).exists()


def test_code_in_a_pickle_is_refused_and_not_run(small_model, tmp_path):
    path, target = tmp_path / "evil.pt", tmp_path / "executed"
    state = {"model": small_model.state_dict(), "initialised": Exploit(target)}
    torch.save(state, path)
    refused(path, tmp_path, r"evil\.pt: refused")
    path.write_bytes(pickle.dumps({"model": Exploit(target)}))
    refused(path, tmp_path, r"evil\.pt: ")
    assert not target.exists()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", 7, "a\0b"])
def test_a_shard_index_may_not_leave_its_folder(folder, tmp_path, name):
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(state, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, tmp_path, r"model\.safetensors\.index\.json|a.b")


@pytest.mark.parametrize("expand", [1, 10**12])
def test_a_shape_over_a_few_bytes_is_refused(small_model, tmp_path, expand):
    state = dict(small_model.state_dict())
    if expand == 1:  # of the right shape, with a stride of zero
        tensor = torch.zeros(1).expand(96, 48)
    else:
        tensor = torch.zeros(1).expand(expand, 48)
    for name in state:
        if "ffn" in name and name.endswith("inner_proj.weight"):
            state[name] = tensor
    torch.save({"model": state}, tmp_path / "absurd.pt")
    refused(tmp_path / "absurd.pt", tmp_path, "of shape")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.to_sparse(), "is not stored as a plain array|cannot be read"),
        (lambda t: t.to(torch.complex64), "is of dtype|cannot be converted"),
        (lambda t: t.to("meta"), "is not stored as a plain array"),
        (lambda t: t.to(torch.int64), "is of dtype"),
        (lambda t: t[:0], "is of shape"),
        (lambda t: t[None], "is of shape"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(small_model, tmp_path, change, match):
    state = dict(small_model.state_dict())
    name = "encoder.layers.0.ffn1.output_proj.weight"
    state[name] = change(state[name])
    torch.save({"model": state}, tmp_path / "odd.pt")
    refused(tmp_path / "odd.pt", tmp_path, match)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("left_max_position_embeddings", "many"),
        ("left_max_position_embeddings", None),
        ("left_max_position_embeddings", [64]),
        ("right_max_position_embeddings", -8),
        ("hidden_size", 10**30),
        ("hidden_size", True),
        ("num_attention_heads", 1),
        ("num_hidden_layers", {"a": 1}),
        ("model_type", "bert"),
        ("model_type", 3),
        ("hidden_act", ["swish"]),
        ("layer_norm_eps", "1e-5"),
        ("position_embeddings_type", {}),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(
    folder, tmp_path, setting, value
):
    edit_config(folder, **{setting: value})
    refused(folder, tmp_path, rf"(config\.json.*)?{setting}|config\.json: is of a")


def test_a_config_of_bottomless_nesting_is_refused(folder, tmp_path):
    (folder / "config.json").write_text("[" * 200_000)
    refused(folder, tmp_path, "cannot be read")


def test_positions_that_fairseq2_cannot_tell_stay_with_transformers(folder, tmp_path):
    edit_config(
        folder, left_max_position_embeddings=60, right_max_position_embeddings=12
    )
    with pytest.raises(CheckpointError, match="-60 to 12"):
        convert_checkpoint(folder, tmp_path / "out.pt", "fairseq2")
    convert_checkpoint(folder, tmp_path / "out", "transformers")


def test_two_names_of_one_tensor_are_refused(fairseq_file, folder, tmp_path):
    content = read_pt(fairseq_file)
    name = "encoder.layers.0.self_attn.{}.weight"
    content["model"][name.format("linear_out")] = torch.ones(48, 48)
    torch.save(content, fairseq_file)
    refused(fairseq_file, tmp_path, "two names of one tensor")

    state = load_file(folder / "model.safetensors")
    state["wav2vec2_bert.encoder.layers.0.final_layer_norm.bias"] = torch.ones(48)
    save_file(state, folder / "model.safetensors")
    refused(folder, tmp_path, "two names of one tensor")


@pytest.mark.parametrize("ending", ["layers.1.layer_norm.bias", "final_proj.weight"])
def test_a_missing_tensor_is_named(fairseq2_file, tmp_path, ending):
    content = read_pt(fairseq2_file)
    del content["model"][next(n for n in content["model"] if n.endswith(ending))]
    torch.save(content, fairseq2_file)
    refused(fairseq2_file, tmp_path, rf"{ending} is missing")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", tmp_path, "is not a W2v-BERT 2.0 checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", tmp_path, "cannot be read|refused")


@pytest.fixture(scope="module")
def damaged(small_model, small_architecture, tmp_path_factory):
    """A small checkpoint in both kinds of file, to be damaged."""
    path = tmp_path_factory.mktemp("damaged")
    architecture = replace(small_architecture, num_layers=1, pretraining=None)
    state = {
        name: tensor
        for name, tensor in small_model.state_dict().items()
        if is_encoder(name) and ".layers.1." not in name
    }
    torch.save({"model": state}, path / "a.pt")
    convert_checkpoint(path / "a.pt", path / "a", "transformers")
    return path, architecture


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_damaged_file_converts_or_is_refused_by_name(damaged, data):
    path, _ = damaged
    pickled = data.draw(st.booleans(), label="pickled")
    good = path / "a.pt" if pickled else path / "a" / "model.safetensors"
    content = bytearray(good.read_bytes())
    edges = st.integers(0, 6000) | st.integers(len(content) - 12000, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(edges)] = data.draw(st.integers(0, 255))
    bad = path / "bad.pt"
    if not pickled:
        shutil.copytree(path / "a", path / "bad", dirs_exist_ok=True)
        bad = path / "bad" / "model.safetensors"
    bad.write_bytes(content)
    src = bad if pickled else bad.parent

    message = src.name
    try:
        convert_checkpoint(src, path / "out.pt", "fairseq2", force=True)
    except CheckpointError as ex:
        message = str(ex)
    assert src.name in message
    assert not [p for p in path.iterdir() if p.name.startswith(".")]


def test_a_compressed_archive_is_not_read_as_if_it_were_not(fairseq2_file, tmp_path):
    squeezed = tmp_path / "squeezed.pt"
    with (
        zipfile.ZipFile(fairseq2_file) as old,
        zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))

    refused(squeezed, tmp_path, "is a compressed archive")


# -- memory --------------------------------------------------------------------------

PEAK = """
import sys
from seamless_w2vbert.checkpoints.convert import convert_checkpoint
convert_checkpoint(*sys.argv[1:])
assert "fairseq2" not in sys.modules
# VmHWM is this program's ru_maxrss; the latter starts at that of the parent's.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024 / 1e6)
"""


def peak_of_converting(src: Path, dst: Path, to: str) -> float:
    """The peak memory of a conversion in a process of its own, in MB."""
    command = [sys.executable, "-c", PEAK, str(src), str(dst), to]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout)


def write_full_size(folder: Path) -> None:
    """Write a whole W2v-BERT 2.0 in Transformers' format, 2.3 GB: noise where each
    tensor begins, and holes for the rest."""
    folder.mkdir()
    config = Wav2Vec2BertConfig(architectures=["Wav2Vec2BertModel"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = Wav2Vec2BertModel(config).state_dict()

    random = np.random.default_rng(0)
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + 4 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for entry in header.values():
            start, end = entry["data_offsets"]
            noise = random.standard_normal(min(1024, (end - start) // 4))
            file.seek(8 + len(text) + start)
            file.write(noise.astype(np.float32).tobytes())


def same_tensors(one: Path, other: Path) -> bool:
    """Compare two safetensors files, a tensor at a time."""
    tables = []
    for path in (one, other):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        size = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        tables.append((data[8 + size :], header))
    (data, header), (other_data, other_header) = tables
    return header.keys() == other_header.keys() and all(
        np.array_equal(
            data[slice(*entry["data_offsets"])],
            other_data[slice(*other_header[name]["data_offsets"])],
        )
        for name, entry in header.items()
    )


@pytest.mark.full_size
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_full_size_checkpoint_converts_in_a_gigabyte(tmp_path):
    try:
        write_full_size(tmp_path / "one")
        weights = tmp_path / "one" / "model.safetensors"
        assert weights.stat().st_size > 2.3e9

        to_fairseq2 = peak_of_converting(
            tmp_path / "one", tmp_path / "two.pt", "fairseq2"
        )
        back = peak_of_converting(
            tmp_path / "two.pt", tmp_path / "three", "transformers"
        )
        assert same_tensors(weights, tmp_path / "three" / "model.safetensors")
        print(f"peaks, MB: {to_fairseq2:.0f}, {back:.0f}")
        assert max(to_fairseq2, back) < 1000
    finally:
        (tmp_path / "two.pt").unlink(missing_ok=True)
        for name in ("one", "three"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)


@pytest.mark.parametrize("target", ["fairseq2", "transformers"])
def test_a_model_of_the_same_file_keeps_what_it_has_learnt(
    tmp_path, small_model, target
):
    """Pages of the source are given back to the system while it is converted; those
    that a model in this process has changed must not be among them."""
    path = tmp_path / "conformer_shaw.pt"
    write_fairseq(small_model, path)
    trained = load_conformer_shaw_model(path)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.fill_(0.125)

    suffix = ".pt" if target == "fairseq2" else ""
    convert_checkpoint(path, tmp_path / f"converted{suffix}", target)

    assert all(bool((p == 0.125).all()) for p in trained.parameters())
