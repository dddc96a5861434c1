"""A Conformer convolution between its two products: depthwise, norm, activation.

Comes in: activations of shape (N, S, M). Goes out: the same, each frame made of itself
and those before it. torch only; it knows nothing of fairseq2.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import conv2d, layer_norm, silu

from seamless_w2vbert import fused_convolution
from seamless_w2vbert.trial import is_right

Norm: TypeAlias = tuple[tuple[int, ...], Tensor | None, Tensor | None, float]
"""The arguments of :func:`torch.nn.functional.layer_norm`."""


def causal_convolution(
    seqs_NSM: Tensor, weight_M1K: Tensor, bias_M: Tensor | None, norm: Norm
) -> Tensor:
    """Convolve each channel with its past, normalise, and apply SiLU, as fairseq2's
    ``ConformerConvolution`` with ``causal_depthwise_conv`` and ``norm_type`` of
    ``"layer_norm"`` does between its pointwise convolutions. Differentiable.

    :param weight_M1K: the last of K taps is that of the frame itself.
    :returns: (N, S, M).
    """
    if (
        not torch.is_grad_enabled()
        and fused_convolution.takes(seqs_NSM, norm)
        and _has_fused(
            seqs_NSM.device, seqs_NSM.dtype, weight_M1K.size(0), weight_M1K.size(2)
        )
    ):
        return fused_convolution.fused_convolution(seqs_NSM, weight_M1K, bias_M, norm)

    return _convolve_plainly(seqs_NSM, weight_M1K, bias_M, norm)


def _convolve_plainly(
    seqs_NSM: Tensor, weight_M1K: Tensor, bias_M: Tensor | None, norm: Norm
) -> Tensor:
    # A view: (N, S, M) is what an image of height 1 is in channels-last order.
    image = seqs_NSM.transpose(1, 2).unsqueeze(2)
    image = conv2d(
        image,
        weight_M1K.unsqueeze(2),
        bias_M,
        padding=(0, weight_M1K.size(2) - 1),
        groups=image.size(1),
    )
    # Padded on both sides, of which only the past is wanted.
    hidden = image.squeeze(2).transpose(1, 2)[:, : seqs_NSM.size(1)]

    return silu(layer_norm(hidden, *norm))


@cache
def _has_fused(
    device: torch.device, dtype: torch.dtype, channels: int, taps: int
) -> bool:
    """Tell whether the fused kernel runs here, and right: it is compiled for the device
    by whatever is installed, so its first result is compared before it is used."""
    generator = torch.Generator().manual_seed(0)
    seqs = torch.randn(2, 40, channels, generator=generator)
    weight = torch.randn(channels, 1, taps, generator=generator)
    gain, offset = torch.randn(2, channels, generator=generator)
    eps = 1e-5
    expected = _convolve_plainly(seqs, weight, None, ((channels,), gain, offset, eps))

    def run() -> Tensor:
        x, w, g, o = (each.to(device, dtype) for each in (seqs, weight, gain, offset))
        return fused_convolution.fused_convolution(x, w, None, ((channels,), g, o, eps))

    return is_right("convolution", run, expected, device, dtype)
