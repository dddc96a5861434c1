"""A name -> the stock modules to be measured.

Comes in: ``random-600m``, or whatever ``load_conformer_shaw_model`` takes. Goes out:
the modules as fairseq2 makes them, nothing swapped. It exists so that the true size can
be measured offline, at any depth.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from seamless_w2vbert import encoder, stack
from seamless_w2vbert.architecture import Architecture
from seamless_w2vbert.benchmarking.limit import Sizes
from seamless_w2vbert.constants import FBANK_STRIDE, NUM_MEL_BINS
from seamless_w2vbert.errors import ArgumentError
from seamless_w2vbert.model import load_conformer_shaw_model

RANDOM_600M = "random-600m"
"""The architecture of W2v-BERT 2.0 with random weights, built in memory."""

_SEED = 600


def load_stock(
    model: str, num_layers: int | None, dtype: torch.dtype, device: torch.device | str
) -> Module:
    """Return the model as fairseq2 (or seamless_communication) makes it.

    :param model: ``random-600m`` or see :func:`load_conformer_shaw_model`.
    :param num_layers: keep that many of its first layers; None for all.
    :raises ArgumentError: if it has fewer.
    """
    if model == RANDOM_600M:
        sizes = Architecture() if num_layers is None else Architecture(num_layers)
        module = stack.load().build_model(sizes)
        module.load_state_dict(_draw(module, dtype), assign=True)
        return module.to(device).eval()

    module = load_conformer_shaw_model(model, device=device, dtype=dtype)

    if num_layers is not None:
        layers = layers_of(module)
        if num_layers > len(layers):
            raise ArgumentError(
                f"{model} has {len(layers)} layers, fewer than {num_layers}."
            )
        del layers[num_layers:]

    return module


def layers_of(module: Module) -> Any:
    """Return the list of blocks, those of an adapted encoder included."""
    whole = encoder.encoder_of(module)
    return getattr(whole, "inner", whole).layers


def sizes_of(module: Module) -> Sizes:
    """Read the sizes off stock modules."""
    layers = layers_of(module)
    first = layers[0]

    return Sizes(
        num_layers=len(layers),
        model_dim=first.layer_norm.weight.numel(),
        ffn_inner_dim=first.ffn1.inner_proj.weight.size(0),
        kernel_size=first.conv.depthwise_conv.weight.size(2),
        relative_positions=first.self_attn.sdpa.rel_k_embed.weight.size(0),
        feature_dim=FBANK_STRIDE * NUM_MEL_BINS,
        num_heads=first.self_attn.num_heads,
    )


def _draw(module: Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw weights that keep the scale of what goes through them, the same in every
    process and dtype: projections of variance 1 / fan-in, norms near the identity."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = {}

    for name, tensor in sorted(module.state_dict().items()):
        values = torch.randn(tensor.shape, generator=generator)

        if "norm" in name and name.endswith("weight"):
            values.mul_(0.1).add_(1)
        elif name.endswith("bias"):
            values.mul_(0.1)
        elif "rel_k_embed" not in name:
            values.div_(math.sqrt(math.prod(tensor.shape[1:])))

        drawn[name] = values.to(dtype)

    return drawn
