"""What is between a Conformer convolution's two products as one CUDA kernel, for
inference: the depthwise convolution with the past, its layer norm, and SiLU.

Comes in: activations of shape (N, S, M). Goes out: the same. Written in Triton, which
comes with torch on Linux and compiles it on first use.

Stock modules transpose the activations to (N, M, S) for the convolution, transpose them
back for the norm, and go through them seven times in all. Here a program reads the
frames it needs, which its neighbours' caches share, and writes what it made of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamless_w2vbert.trial import TOLERANCES

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system
    triton = None

NUM_WARPS = 8
"""Of a program."""

_MOST_CHANNELS = 4096
"""More do not fit the registers of a program."""

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _convolve(  # type: ignore[no-untyped-def]
        x_ptr,
        weight_ptr,
        bias_ptr,
        gain_ptr,
        offset_ptr,
        y_ptr,
        positions,
        channels,
        eps,
        taps: tl.constexpr,
        block_positions: tl.constexpr,
        block_channels: tl.constexpr,
        has_bias: tl.constexpr,
    ):
        """Compute all channels of a block of positions."""
        blocks = tl.cdiv(positions, block_positions)
        batch = (tl.program_id(0) // blocks).to(tl.int64)
        first = tl.program_id(0) % blocks * block_positions
        x_ptr += batch * positions * channels
        y_ptr += batch * positions * channels

        places = first + tl.arange(0, block_positions)
        columns = tl.arange(0, block_channels)
        real = columns < channels
        y = tl.zeros([block_positions, block_channels], tl.float32)

        for tap in range(taps):
            past = places - (taps - 1) + tap
            x = tl.load(
                x_ptr + past[:, None] * channels + columns[None, :],
                mask=((past >= 0) & (past < positions))[:, None] & real[None, :],
                other=0.0,
            )
            weight = tl.load(
                weight_ptr + tap * channels + columns, mask=real, other=0.0
            )
            y += x.to(tl.float32) * weight.to(tl.float32)[None, :]

        if has_bias:
            bias = tl.load(bias_ptr + columns, mask=real, other=0.0)
            y += bias.to(tl.float32)[None, :]

        gain = tl.load(gain_ptr + columns, mask=real, other=0.0).to(tl.float32)
        offset = tl.load(offset_ptr + columns, mask=real, other=0.0).to(tl.float32)

        mean = tl.sum(y, 1) / channels
        y = tl.where(real[None, :], y - mean[:, None], 0.0)
        deviation = tl.sqrt(tl.sum(y * y, 1) / channels + eps)
        y = y / deviation[:, None] * gain[None, :] + offset[None, :]
        y = y * tl.sigmoid(y)

        tl.store(
            y_ptr + places[:, None] * channels + columns[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=(places < positions)[:, None] & real[None, :],
        )


def takes(seqs_NSM: Tensor, norm: Any) -> bool:
    """Tell whether the kernel is made for activations and a norm like these."""
    _, weight, bias, _ = norm

    return (
        triton is not None
        and seqs_NSM.device.type == "cuda"
        and seqs_NSM.dtype in TOLERANCES
        and seqs_NSM.size(2) <= _MOST_CHANNELS
        and weight is not None
        and bias is not None
        # Within a sequence the kernel counts in 32 bits.
        and seqs_NSM.size(1) * seqs_NSM.size(2) < 2**31
    )


def fused_convolution(
    seqs_NSM: Tensor, weight_M1K: Tensor, bias_M: Tensor | None, norm: Any
) -> Tensor:
    """Convolve depthwise with the past, normalise and activate, without gradients.

    :param seqs_NSM: what :func:`takes` takes.
    :param norm: the arguments of :func:`torch.nn.functional.layer_norm`.
    """
    seqs = seqs_NSM.contiguous()
    n, positions, channels = seqs.shape
    _, gain, offset, eps = norm
    output = torch.empty_like(seqs)
    weight_KM = weight_M1K.squeeze(1).T.contiguous()

    block_channels = triton.next_power_of_2(channels)
    # 64 numbers for each thread.
    block_positions = max(1, 64 * 32 * NUM_WARPS // block_channels)

    # Triton launches on the current device, whatever its tensors are on.
    with torch.cuda.device_of(seqs):  # type: ignore[no-untyped-call]
        _convolve[(triton.cdiv(positions, block_positions) * n,)](
            seqs,
            weight_KM,
            weight_KM if bias_M is None else bias_M,
            gain,
            offset,
            output,
            positions,
            channels,
            eps,
            taps=weight_KM.size(0),
            block_positions=block_positions,
            block_channels=block_channels,
            has_bias=bias_M is not None,
            num_warps=NUM_WARPS,
        )

    return output
