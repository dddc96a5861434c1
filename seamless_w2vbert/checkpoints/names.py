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
