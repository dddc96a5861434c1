"""The three names of every tensor of W2v-BERT 2.0, as data.

fairseq2's names are the ones this package works with. The other two formats are told
apart by their names alone and renamed by one table each. Checked against
seamless_communication's converter and Transformers' ``Wav2Vec2BertModel``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, TypeVar

T = TypeVar("T")

Format = Literal["fairseq", "fairseq2", "transformers"]

# In each table: a pattern for whole prefixes, and fairseq2's name for it.

_SHARED_BLOCK: Final = {
    # `encoder.layers.N.` + left -> `encoder.layers.N.` + right
    "conv_module.layer_norm": "conv_layer_norm",
    "conv_module.pointwise_conv1": "conv.pointwise_conv1",
    "conv_module.pointwise_conv2": "conv.pointwise_conv2",
    "conv_module.depthwise_conv": "conv.depthwise_conv",
    "final_layer_norm": "layer_norm",
}

_FAIRSEQ_BLOCK: Final = {
    **_SHARED_BLOCK,
    "ffn1.layer_norm": "ffn1_layer_norm",
    "ffn1.w_1": "ffn1.inner_proj",
    "ffn1.w_2": "ffn1.output_proj",
    "ffn2.layer_norm": "ffn2_layer_norm",
    "ffn2.w_1": "ffn2.inner_proj",
    "ffn2.w_2": "ffn2.output_proj",
    "self_attn.out_proj": "self_attn.output_proj",
    "self_attn.linear_q": "self_attn.q_proj",
    "self_attn.linear_k": "self_attn.k_proj",
    "self_attn.linear_v": "self_attn.v_proj",
    "self_attn.linear_out": "self_attn.output_proj",
    "self_attn.rel_k_embedding": "self_attn.sdpa.rel_k_embed",
    "conv_module.layer_norm2": "conv.layer_norm",
}

_FAIRSEQ_TOP: Final = {
    "layer_norm": "encoder_frontend.post_extract_layer_norm",
    "post_extract_proj": "encoder_frontend.model_dim_proj",
    "mask_emb": "masker.temporal_mask_embed",
    "quantizer.vars": "quantizer.entries",
    "quantizer.weight_proj": "quantizer.entry_proj",
    "project_q": "final_target_proj",
}

_TRANSFORMERS_BLOCK: Final = {
    **_SHARED_BLOCK,
    "ffn1.intermediate_dense": "ffn1.inner_proj",
    "ffn1.output_dense": "ffn1.output_proj",
    "ffn2.intermediate_dense": "ffn2.inner_proj",
    "ffn2.output_dense": "ffn2.output_proj",
    "self_attn.linear_q": "self_attn.q_proj",
    "self_attn.linear_k": "self_attn.k_proj",
    "self_attn.linear_v": "self_attn.v_proj",
    "self_attn.linear_out": "self_attn.output_proj",
    "self_attn.distance_embedding": "self_attn.sdpa.rel_k_embed",
    "conv_module.depthwise_layer_norm": "conv.layer_norm",
}

_TRANSFORMERS_TOP: Final = {
    "feature_projection.layer_norm": "encoder_frontend.post_extract_layer_norm",
    "feature_projection.projection": "encoder_frontend.model_dim_proj",
    "masked_spec_embed": "masker.temporal_mask_embed",
}

TRANSFORMERS_PREFIX: Final = "wav2vec2_bert."
"""What Transformers' task heads (``Wav2Vec2BertForCTC``) put before encoder names."""

UNUSED: Final = frozenset(
    # Of fairseq's training that no encoder uses; seamless_communication drops them.
    {
        "mlm_proj.weight",
        "mlm_proj.bias",
        "encoder.layer_norm.weight",
        "encoder.layer_norm.bias",
    }
)

_TABLES: Final = {
    "fairseq": (_FAIRSEQ_TOP, _FAIRSEQ_BLOCK),
    "transformers": (_TRANSFORMERS_TOP, _TRANSFORMERS_BLOCK),
}

_TO_TRANSFORMERS_TOP: Final = {
    ours: theirs for theirs, ours in _TRANSFORMERS_TOP.items()
}
_TO_TRANSFORMERS_BLOCK: Final = {
    ours: theirs for theirs, ours in _TRANSFORMERS_BLOCK.items()
}

_SPEECH_ENCODERS: Final = (
    # Where the models that hold a W2v-BERT 2.0 keep it: their prefix, and what stands
    # for it in a checkpoint of the encoder alone. What follows the blocks (a last
    # LayerNorm, projections, the adaptor) is no part of it and matches nothing here.
    # seamless_communication's UnitY, under fairseq2's names:
    (re.compile(r"^speech_encoder_frontend\."), "encoder_frontend."),
    (re.compile(r"^speech_encoder\.inner\.(?=layers\.)"), "encoder."),
    # Transformers' SeamlessM4Tv2:
    (re.compile(r"^speech_encoder\.(?=feature_projection\.|encoder\.layers\.)"), ""),
    # UnitY as fairseq trained it, in each of its three nestings:
    (
        re.compile(
            r"^(s2t_model\.encoder|speech_encoder|encoder)\.w2v_encoder\.w2v_model\."
            r"(?!encoder\.layer_norm\.)"
        ),
        "",
    ),
)

_BLOCK_NAME: Final = re.compile(r"^(encoder\.layers\.\d+\.)(.+)$")


def format_of(names: Iterable[str]) -> Format | None:
    """Tell a checkpoint's format from the names in it, None if it is none of ours."""
    for name in names:
        if name.startswith("encoder_frontend."):
            return "fairseq2"
        if name.startswith("post_extract_proj."):
            return "fairseq"
        if name.removeprefix(TRANSFORMERS_PREFIX).startswith("feature_projection."):
            return "transformers"

    return None


def fairseq2_name(name: str, format_: Format) -> str:
    """Return fairseq2's name for ``name``; a name of no encoder tensor stays."""
    if format_ == "fairseq2":
        return name

    top, block = _TABLES[format_]

    if format_ == "transformers":
        name = name.removeprefix(TRANSFORMERS_PREFIX)

    if match := _BLOCK_NAME.match(name):
        prefix, rest = match.groups()
        return prefix + _rename(rest, block)

    return _rename(name, top)


def transformers_name(name: str) -> str:
    """Return ``Wav2Vec2BertModel``'s name for fairseq2's ``name``, which has to be one
    of the encoder's or the mask embedding's; the inverse of :func:`fairseq2_name`."""
    if match := _BLOCK_NAME.match(name):
        prefix, rest = match.groups()
        return prefix + _rename(rest, _TO_TRANSFORMERS_BLOCK)

    return _rename(name, _TO_TRANSFORMERS_TOP)


def to_transformers_names(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename fairseq2's tensors of an encoder, and of the mask embedding if it is
    among them, to ``Wav2Vec2BertModel``'s names."""
    return {transformers_name(name): tensor for name, tensor in state_dict.items()}


def speech_encoder_names(names: Iterable[str]) -> dict[str, str]:
    """Find the speech encoder in a UnitY or SeamlessM4T v2 model.

    :returns: the names in ``names`` that are of its speech encoder, each with the name
        that the tensor has in a checkpoint of the encoder alone, in the same format.
    """
    found = {}

    for name in names:
        for prefix, replacement in _SPEECH_ENCODERS:
            if prefix.match(name):
                found[name] = prefix.sub(replacement, name)

    return found


def _rename(name: str, table: Mapping[str, str]) -> str:
    module, dot, parameter = name.rpartition(".")

    if name in table:  # a parameter that is its own module, as `mask_emb`
        return table[name]

    return table.get(module, module) + dot + parameter


def to_fairseq2_names(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename a whole state dict, and drop what no encoder uses.

    :returns: the same tensors under fairseq2's names; as they were if the format
        is not known.
    """
    format_ = format_of(state_dict) or "fairseq2"

    return {
        fairseq2_name(name, format_): tensor
        for name, tensor in state_dict.items()
        if format_ != "fairseq" or name not in UNUSED
    }
