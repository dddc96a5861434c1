"""Independent sources to compare with: Transformers' model and feature extractor,
soundfile and soxr called directly, checkpoints written under their real names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.nn import Module
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
)

from seamless_w2vbert.architecture import Architecture

DATA = Path(__file__).parent / "data"
SPEECH = DATA / "speech.flac"

# fairseq2's name -> Transformers', a regular expression each.
TO_TRANSFORMERS = [
    (r"^encoder_frontend\.post_extract_layer_norm\.", "feature_projection.layer_norm."),
    (r"^encoder_frontend\.model_dim_proj\.", "feature_projection.projection."),
    (r"^masker\.temporal_mask_embed$", "masked_spec_embed"),
    (r"\.(ffn[12])\.inner_proj\.", r".\1.intermediate_dense."),
    (r"\.(ffn[12])\.output_proj\.", r".\1.output_dense."),
    (r"\.self_attn\.([qkv])_proj\.", r".self_attn.linear_\1."),
    (r"\.self_attn\.output_proj\.", ".self_attn.linear_out."),
    (r"\.self_attn\.sdpa\.rel_k_embed\.", ".self_attn.distance_embedding."),
    (r"(layers\.\d+)\.layer_norm\.", r"\1.final_layer_norm."),
    (r"(\d)\.conv\.layer_norm\.", r"\1.conv_module.depthwise_layer_norm."),
    (r"(\d)\.conv\.", r"\1.conv_module."),
    (r"(\d)\.conv_layer_norm\.", r"\1.conv_module.layer_norm."),
]

# fairseq2's name -> fairseq's, read off seamless_communication's conversion backwards.
TO_FAIRSEQ = [
    (r"^encoder_frontend\.post_extract_layer_norm\.", "layer_norm."),
    (r"^encoder_frontend\.model_dim_proj\.", "post_extract_proj."),
    (r"^masker\.temporal_mask_embed$", "mask_emb"),
    (r"^quantizer\.entries$", "quantizer.vars"),
    (r"^quantizer\.entry_proj\.", "quantizer.weight_proj."),
    (r"^final_target_proj\.", "project_q."),
    (r"\.(ffn[12])_layer_norm\.", r".\1.layer_norm."),
    (r"\.(ffn[12])\.inner_proj\.", r".\1.w_1."),
    (r"\.(ffn[12])\.output_proj\.", r".\1.w_2."),
    (r"\.self_attn\.output_proj\.", ".self_attn.out_proj."),
    (r"\.self_attn\.sdpa\.rel_k_embed\.", ".self_attn.rel_k_embedding."),
    (r"(layers\.\d+)\.layer_norm\.", r"\1.final_layer_norm."),
    (r"(\d)\.conv\.layer_norm\.", r"\1.conv_module.layer_norm2."),
    (r"(\d)\.conv\.", r"\1.conv_module."),
    (r"(\d)\.conv_layer_norm\.", r"\1.conv_module.layer_norm."),
]


def rename(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def transformers_config(architecture: Architecture, **overrides) -> Wav2Vec2BertConfig:
    return Wav2Vec2BertConfig(
        hidden_size=architecture.model_dim,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        intermediate_size=architecture.ffn_inner_dim,
        feature_projection_input_dim=architecture.feature_dim,
        conv_depthwise_kernel_size=architecture.depthwise_conv_kernel_size,
        left_max_position_embeddings=architecture.max_left_rel_pos,
        right_max_position_embeddings=architecture.max_right_rel_pos,
        **{"mask_time_prob": 0.0, "layerdrop": 0.0, **overrides},
    )


def transformers_twin(model: Module, architecture: Architecture) -> Wav2Vec2BertModel:
    """Transformers' model with the weights of ``model``."""
    twin = Wav2Vec2BertModel(transformers_config(architecture)).eval()
    twin.load_state_dict(
        {
            rename(name, TO_TRANSFORMERS): tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(("encoder_frontend.", "encoder."))
        }
    )
    return twin


def feature_extractor() -> SeamlessM4TFeatureExtractor:
    """As the repository facebook/w2v-bert-2.0 configures it."""
    return SeamlessM4TFeatureExtractor(
        feature_size=80, num_mel_bins=80, sampling_rate=16000, stride=2, padding_value=1
    )


@torch.inference_mode()
def hidden_states_from_audio(
    twin: Wav2Vec2BertModel, waveforms: list[np.ndarray]
) -> list[list[Tensor]]:
    """Hidden states of each layer for each 16 kHz waveform, unpadded."""
    inputs = feature_extractor()(
        waveforms, sampling_rate=16000, return_tensors="pt", padding=True
    )
    return _unpadded(twin, inputs["input_features"], inputs["attention_mask"])


@torch.inference_mode()
def hidden_states_from_fbanks(
    twin: Wav2Vec2BertModel, fbanks: list[Tensor]
) -> list[list[Tensor]]:
    """The same for ready-made fbanks of shape (frames, 80)."""
    width = max(len(fbank) for fbank in fbanks) // 2
    features = torch.ones(len(fbanks), width, 160)
    mask = torch.zeros(len(fbanks), width, dtype=torch.long)

    for row, fbank in enumerate(fbanks):
        length = len(fbank) // 2
        features[row, :length] = fbank[: 2 * length].reshape(length, 160)
        mask[row, :length] = 1

    return _unpadded(twin, features, mask)


def _unpadded(
    twin: Wav2Vec2BertModel, features: Tensor, mask: Tensor
) -> list[list[Tensor]]:
    output = twin(features, attention_mask=mask, output_hidden_states=True)
    lengths = mask.sum(dim=1).tolist()
    return [
        [seqs[row, :length] for row, length in enumerate(lengths)]
        for seqs in output.hidden_states
    ]


def read_mono_16k(path: Path) -> np.ndarray:
    """What a careful user would do by hand: soundfile, channel mean, soxr."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1, dtype=np.float32)
    return mono if rate == 16000 else soxr.resample(mono, rate, 16000, quality="HQ")


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    assert actual.shape == expected.shape
    difference = (actual.float() - expected.float()).abs().max()
    return float(difference / expected.abs().max())


def mean_cosine(actual: Tensor, expected: Tensor) -> float:
    """The cosine of frames, averaged."""
    cosine = torch.nn.functional.cosine_similarity(
        actual.double(), expected.double(), dim=-1
    )
    return float(cosine.mean())


def write_fairseq(model: Module, path: Path) -> None:
    """Write ``model`` as fairseq did, with what a training leaves in the file."""
    state = {rename(n, TO_FAIRSEQ): t for n, t in model.state_dict().items()}
    state.pop("quantizer.num_updates", None)
    width = state["post_extract_proj.bias"].numel()
    state["encoder.layer_norm.weight"] = torch.ones(width)
    state["encoder.layer_norm.bias"] = torch.zeros(width)
    state["mlm_proj.weight"] = torch.zeros(4, width)
    state["mlm_proj.bias"] = torch.zeros(4)
    torch.save({"model": state, "optimizer_history": [{"num_updates": 1}]}, path)


def write_fairseq2(model: Module, path: Path) -> None:
    """Write ``model`` as fairseq2 0.2's trainers do."""
    torch.save({"model": model.state_dict(), "fs2": True}, path)


def write_transformers(
    model: Module, architecture: Architecture, folder: Path, shard: str = "5GB"
) -> None:
    """Write ``model`` with Transformers' own ``save_pretrained``."""
    twin = transformers_twin(model, architecture)
    twin.save_pretrained(folder, safe_serialization=True, max_shard_size=shard)


def edit_config(folder: Path, **values) -> None:
    """Change settings of a Transformers folder."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def plain(q, k, v, table, left, keep=None):
    """The formula as it is written, every pair of positions looked up."""
    positions = torch.arange(q.size(2))
    relative = positions - positions.unsqueeze(1)
    relative = relative.clamp(-left, table.size(0) - 1 - left) + left
    scores = q @ k.transpose(2, 3) + torch.einsum("nhsk,stk->nhst", q, table[relative])
    scores = scores / q.size(-1) ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
    return scores.softmax(dim=-1) @ v


def plain_convolution(seqs, weight, bias, norm):
    """A Conformer's causal convolution, tap by tap, with its norm and SiLU."""
    taps = weight.size(2)
    past = torch.nn.functional.pad(seqs, (0, 0, taps - 1, 0))
    convolved = sum(
        past[:, tap : tap + seqs.size(1)] * weight[:, 0, tap] for tap in range(taps)
    )
    if bias is not None:
        convolved = convolved + bias
    normalised = torch.nn.functional.layer_norm(convolved, *norm)
    return normalised * torch.sigmoid(normalised)
