"""Named tensors -> the architecture that they add up to.

Comes in: tensors under fairseq2's names and, from Transformers, a config. Goes out: an
:class:`Architecture`, or an error that names the tensor or the setting at fault.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamless_w2vbert.architecture import Architecture, PretrainingHeads
from seamless_w2vbert.checkpoints.names import Format
from seamless_w2vbert.constants import NUM_MEL_BINS
from seamless_w2vbert.errors import CheckpointError

_ENCODER = ("encoder_frontend.", "encoder.")
_PRETRAINING = ("masker.", "quantizer.", "final_proj.", "final_target_proj.")

_FIRST_BLOCK = "encoder.layers.0."
_REL_K_EMBED = _FIRST_BLOCK + "self_attn.sdpa.rel_k_embed.weight"
_INNER_PROJ = _FIRST_BLOCK + "ffn1.inner_proj.weight"
_DEPTHWISE_CONV = _FIRST_BLOCK + "conv.depthwise_conv.weight"
_MODEL_DIM_PROJ = "encoder_frontend.model_dim_proj.weight"

_SETTINGS_WE_BUILD = {
    "position_embeddings_type": "relative_key",
    "hidden_act": "swish",
    "layer_norm_eps": 1e-5,
}
"""What Transformers can configure and this architecture has one value of."""

_SAME_ACTIVATION = {"silu": "swish"}


def split(
    tensors: Mapping[str, Tensor], format_: Format
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tell the tensors of the model from those of adapters and task heads.

    Transformers' checkpoints hold one tensor of the pretraining, the mask embedding,
    which is no use without the rest: it counts as other.
    """
    wanted = _ENCODER if format_ == "transformers" else _ENCODER + _PRETRAINING
    model = {name: t for name, t in tensors.items() if name.startswith(wanted)}
    other = {name: t for name, t in tensors.items() if name not in model}

    return model, other


def architecture_of(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, path: Path
) -> Architecture:
    """Read the sizes off the shapes; those that shapes do not tell, off the config.

    :raises CheckpointError: if a tensor that tells a size is missing or of another
        rank, or the config asks for something this architecture does not have.
    """
    config = config or {}

    for key, value in _SETTINGS_WE_BUILD.items():
        found = config.get(key, value)
        if _SAME_ACTIVATION.get(str(found), found) != value:
            raise CheckpointError(
                f"{path}: config.json sets {key} to {found!r}; only {value!r}, which "
                "W2v-BERT 2.0 has, is supported."
            )

    num_positions, head_dim = _shape(tensors, _REL_K_EMBED, 2, path)
    ffn_inner_dim, model_dim = _shape(tensors, _INNER_PROJ, 2, path)
    kernel_size = _shape(tensors, _DEPTHWISE_CONV, 3, path)[2]
    feature_dim = _shape(tensors, _MODEL_DIM_PROJ, 2, path)[1]

    left = _count(config, "left_max_position_embeddings", 64, path)
    right = _count(config, "right_max_position_embeddings", 8, path)

    if num_positions != left + 1 + right:
        raise CheckpointError(
            f"{path}: {_REL_K_EMBED} has {num_positions} relative positions, but "
            f"-{left} to {right} are {left + 1 + right}. A config has to say how "
            "another table is split: save the model as a Transformers folder with "
            "left_max_position_embeddings and right_max_position_embeddings set."
        )

    stride = Architecture.fbank_stride

    if model_dim % head_dim != 0 or feature_dim != stride * NUM_MEL_BINS:
        raise CheckpointError(
            f"{path}: a width of {model_dim} with heads of {head_dim} and features of "
            f"{feature_dim} fit no encoder; features are {stride} frames of "
            f"{NUM_MEL_BINS} mel bins."
        )

    architecture = Architecture(
        num_layers=_num_layers(tensors),
        model_dim=model_dim,
        num_heads=model_dim // head_dim,
        ffn_inner_dim=ffn_inner_dim,
        depthwise_conv_kernel_size=kernel_size,
        max_left_rel_pos=left,
        max_right_rel_pos=right,
        num_fbank_channels=feature_dim // stride,
        pretraining=_pretraining_of(tensors, path),
    )
    _check_config(architecture, config, path)

    return architecture


def _check_config(
    architecture: Architecture, config: Mapping[str, Any], path: Path
) -> None:
    """Refuse a config that says otherwise than the shapes: Transformers would build
    what it says, with other layers under the same numbers."""
    for key, value in {
        "num_hidden_layers": architecture.num_layers,
        "hidden_size": architecture.model_dim,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": architecture.ffn_inner_dim,
        "conv_depthwise_kernel_size": architecture.depthwise_conv_kernel_size,
        "feature_projection_input_dim": architecture.feature_dim,
    }.items():
        if key in config and config[key] != value:
            raise CheckpointError(
                f"{path}: config.json sets {key} to {config[key]!r}, but the tensors "
                f"add up to {value}."
            )


def check(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    """Compare a checkpoint with the state dict of the model that is to take it.

    :raises CheckpointError: naming what is missing, unexpected or of another shape.
    """
    problems = [
        f"{name} is not stored as a plain array"
        for name, t in tensors.items()
        if not _is_plain(t)
    ]
    problems += [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in expected]
    problems += [
        f"{name} is of shape {tuple(tensors[name].shape)}, not {tuple(like.shape)}"
        for name, like in expected.items()
        if name in tensors and tensors[name].shape != like.shape
    ]
    problems += [
        f"{name} is of dtype {tensors[name].dtype}"
        for name, like in expected.items()
        if name in tensors
        and tensors[name].is_floating_point() != like.is_floating_point()
    ]

    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path}: is not a whole W2v-BERT 2.0 encoder: "
            f"{'; '.join(problems[:5])}{more}."
        )


def _count(config: Mapping[str, Any], key: str, default: int, path: Path) -> int:
    value = config.get(key, default)

    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{path}: config.json sets {key} to {value!r}.")

    return value


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and not tensor.is_nested
    )


def _num_layers(tensors: Mapping[str, Tensor]) -> int:
    # Counted, not the highest number: a gap then shows as a missing tensor.
    pattern = re.compile(r"^encoder\.layers\.(\d+)\.")
    return len({match[1] for name in tensors if (match := pattern.match(name))})


def _pretraining_of(
    tensors: Mapping[str, Tensor], path: Path
) -> PretrainingHeads | None:
    if not any(name.startswith(_PRETRAINING) for name in tensors):
        return None

    _, entries, entry_dim = _shape(tensors, "quantizer.entries", 3, path)
    final_dim, quantized_dim = _shape(tensors, "final_target_proj.weight", 2, path)

    if entry_dim == 0 or quantized_dim % entry_dim != 0 or quantized_dim == 0:
        raise CheckpointError(
            f"{path}: quantizer.entries of width {entry_dim} do not add up to the "
            f"{quantized_dim} of final_target_proj.weight."
        )

    num_codebooks = quantized_dim // entry_dim

    return PretrainingHeads(
        final_dim, quantized_dim, num_codebooks, entries // num_codebooks
    )


def _shape(
    tensors: Mapping[str, Tensor], name: str, rank: int, path: Path
) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(
            f"{path}: is not a whole W2v-BERT 2.0 encoder: {name} is missing."
        )

    if not _is_plain(tensors[name]):
        raise CheckpointError(f"{path}: {name} is not stored as a plain array.")

    shape = tuple(tensors[name].shape)

    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{path}: {name} is of shape {shape}; expected {rank}-d.")

    return shape
