"""Shaw relative attention as one function: exact for any length, in linear memory.

Comes in: queries, keys, values and the table of relative keys. Goes out: the attended
values. torch only; it knows nothing of fairseq2.

Stock implementations look a vector up for every pair of positions, an S x S x K table.
There are only left + 1 + right different vectors: ``q @ table.T`` holds every score
that relative positions can add, and each pair's score is one of its columns. Queries
are taken a block at a time, so that no S x S matrix is ever whole.

Three ways lead to the same numbers. Without gradients, :func:`_infer` is for CPU: it
adds to plain scores, in place, along their diagonal alone; :mod:`.fused_attention` is
one kernel for CUDA. :func:`_attend_in_blocks` runs everywhere, and is differentiable.
docs/attention.md draws them.

Tensor names carry their dimensions: N batch, H heads, G heads of a group, S positions,
B positions of a block, K the width of a head, R = left + 1 + right relative positions,
P = S + R - 1 positions with the padding that lets each have a whole window.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from seamless_w2vbert import fused_attention
from seamless_w2vbert.trial import is_right

_MAX_SCORES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""How many scores one block of queries may have over all heads and sequences: on CPU
16 MB in float32, where that fits a cache; 256 MB where launches cost more."""

_ROWS = 256
"""How many queries :func:`_infer` takes at a time, unless a sequence is very long."""

_TILE = 2**18
"""How many scores of a block fit the second-level cache of a core: 1 MB in float32."""


def shaw_attention(
    q_NHSK: Tensor,
    k_NHSK: Tensor,
    v_NHSK: Tensor,
    table_RK: Tensor,
    max_left: int,
    keep_NS: Tensor | None = None,
) -> Tensor:
    """Attend with relative keys clipped to ``-max_left .. R - 1 - max_left``.

    Shaw et al., 2018 (https://arxiv.org/abs/1803.02155), with keys alone, as fairseq2's
    ``ShawRelativePositionSDPA`` and Transformers' ``relative_key``: the score of
    positions i and j is ``q_i . (k_j + table[clip(j - i) + max_left]) / sqrt(K)``.
    Differentiable in all four tensors.

    :param q_NHSK: queries; keys and values are of the same shape.
    :param table_RK: the relative keys, from far left to far right.
    :param max_left: how many rows of the table look back.
    :param keep_NS: which keys may be attended to, bool; None for all.
    :returns: (N, H, S, K). Of queries that are padding at the end of a sequence, and
        of sequences without a key, what is returned is finite and means nothing.
    """
    n, _, positions, _ = q_NHSK.shape
    relative = table_RK.size(0)

    if not 0 <= max_left < relative:
        raise ValueError(
            f"`max_left` must lie in the table of {relative} relative positions, but "
            f"is {max_left}."
        )

    if positions == 0:
        return v_NHSK

    inputs = (q_NHSK, k_NHSK, v_NHSK, table_RK)
    has_gradients = any(tensor.requires_grad for tensor in inputs)
    if is_compiling() or (torch.is_grad_enabled() and has_gradients):
        return _attend_in_blocks(*inputs, max_left, keep_NS)

    if q_NHSK.device.type == "cpu":
        lengths = _lengths(keep_NS, n, positions)
        if lengths is not None:
            return _infer(*inputs, max_left, lengths)
    elif fused_attention.takes(q_NHSK, table_RK) and _has_fused(
        q_NHSK.device, q_NHSK.dtype, q_NHSK.size(3)
    ):
        return fused_attention.fused_attention(*inputs, max_left, keep_NS)

    return _attend_in_blocks(*inputs, max_left, keep_NS)


def is_compiling() -> bool:
    """Tell whether torch.compile is at it, to which plain operators are of more use."""
    return bool(getattr(torch.compiler, "is_compiling", bool)())


@cache
def _has_fused(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Tell whether the fused kernel runs here, and right: it is compiled for the device
    by whatever is installed, so its first result is compared before it is used."""
    generator = torch.Generator().manual_seed(0)
    n, heads, positions, relative, max_left = 2, 2, 300, 73, 64
    q, k, v = (
        torch.randn(n, heads, positions, width, generator=generator) for _ in range(3)
    )
    table = torch.randn(relative, width, generator=generator)
    lengths_N1 = torch.tensor([[positions], [positions // 2]])
    keep = torch.arange(positions) < lengths_N1
    expected = _attend_in_blocks(q, k, v, table, max_left, keep)
    expected = expected.masked_fill(~keep[:, None, :, None], 0)

    def run() -> Tensor:
        return fused_attention.fused_attention(
            q.to(device, dtype),
            k.to(device, dtype),
            v.to(device, dtype),
            table.to(device, dtype),
            max_left,
            keep.to(device),
        )

    return is_right("attention", run, expected, device, dtype)


def _lengths(keep_NS: Tensor | None, n: int, positions: int) -> list[int] | None:
    """Return how many keys each sequence keeps, or None if they are not its first."""
    if keep_NS is None:
        return [positions] * n

    lengths_N = keep_NS.sum(dim=1)
    first_NS = torch.arange(positions, device=keep_NS.device) < lengths_N.unsqueeze(1)

    return lengths_N.tolist() if torch.equal(first_NS, keep_NS) else None


def _infer(
    q_NHSK: Tensor,
    k_NHSK: Tensor,
    v_NHSK: Tensor,
    table_RK: Tensor,
    max_left: int,
    lengths: list[int],
) -> Tensor:
    """Attend on CPU, with no work on padding and nothing kept for gradients.

    Softmax does not see what is added to a whole row, so scores are relative to that of
    the far left. What is left to add is a constant on the right of a row, and the
    window: R consecutive columns, one further right in each row, which is a view.
    """
    n, heads, positions, width = q_NHSK.shape
    relative = table_RK.size(0)
    # (N, S, H, K) in memory, which is what comes next after attention.
    output_NHSK = q_NHSK.new_zeros(n, positions, heads, width).transpose(1, 2)
    window_KR = ((table_RK - table_RK[:1]) * width**-0.5).T

    for index, length in enumerate(lengths):
        q_HSK = q_NHSK[index, :, :length]
        # A window's width of nothing around the keys: each row has a whole window.
        around = (0, 0, max_left, relative - 1 - max_left)
        k_HPK = pad(k_NHSK[index, :, :length], around)
        v_HPK = pad(v_NHSK[index, :, :length], around)
        padded = k_HPK.size(1)

        rows = max(1, min(_ROWS, length, max(_ROWS // 4, 8 * _TILE // padded)))
        threads = torch.get_num_threads()
        group = min(heads, threads * max(1, _TILE // (rows * padded)))
        scores = q_NHSK.new_empty(group * rows * padded)
        weights = torch.empty_like(scores)
        above_BB = q_NHSK.new_ones(rows, rows).triu(1)

        for head in range(0, heads, group):
            k_GKP = k_HPK[head : head + group].transpose(1, 2)
            v_GPK = v_HPK[head : head + group]

            for start in range(0, length, rows):
                q_GBK = q_HSK[head : head + group, start : start + rows]
                shape = (*q_GBK.shape[:2], padded)
                size = shape[0] * shape[1] * padded
                scores_GBP = scores[:size].view(shape)

                torch.baddbmm(
                    scores_GBP,
                    q_GBK,
                    k_GKP,
                    beta=0,
                    alpha=width**-0.5,
                    out=scores_GBP,
                )
                _add_window(scores_GBP, q_GBK @ window_KR, start, above_BB)
                scores_GBP[..., :max_left] = float("-inf")
                scores_GBP[..., max_left + length :] = float("-inf")

                weights_GBP = weights[:size].view(shape)
                torch.softmax(scores_GBP, dim=-1, out=weights_GBP)
                output_NHSK[
                    index, head : head + group, start : start + q_GBK.size(1)
                ] = weights_GBP @ v_GPK

    return output_NHSK


def _add_window(
    scores_GBP: Tensor, window_GBR: Tensor, start: int, above_BB: Tensor
) -> None:
    """Add the scores of relative positions to those of a block of queries, in place.

    :param window_GBR: less the score of the far left.
    :param start: the position of the first query.
    :param above_BB: ones above the diagonal.
    """
    _, rows, padded = scores_GBP.shape
    relative = window_GBR.size(2)
    far_right_GB1 = window_GBR[..., -1:]

    # Row b has its window at the padded positions start + b and on.
    scores_GBP.as_strided(
        window_GBR.shape,
        (rows * padded, padded + 1, 1),
        scores_GBP.storage_offset() + start,
    ).add_(window_GBR)

    # What is right of it: a triangle, then columns that every row has.
    right = start + relative - 1
    scores_GBP[..., right : right + rows].addcmul_(
        above_BB[:rows, :rows], far_right_GB1
    )
    scores_GBP[..., right + rows :].add_(far_right_GB1)


def _attend_in_blocks(
    q_NHSK: Tensor,
    k_NHSK: Tensor,
    v_NHSK: Tensor,
    table_RK: Tensor,
    max_left: int,
    keep_NS: Tensor | None,
) -> Tensor:
    """Attend anywhere, differentiably: stock attention with a bias for each block."""
    n, heads, positions, width = q_NHSK.shape
    max_right = table_RK.size(0) - 1 - max_left
    most = _MAX_SCORES.get(q_NHSK.device.type, _MAX_SCORES["cpu"])
    block = max(1, min(positions, max(16, most // max(1, n * heads * positions))))
    scores_NHSR = (q_NHSK @ table_RK.T) * width**-0.5

    if keep_NS is not None:  # of nothing at all softmax makes NaN
        keep_NS = keep_NS | ~keep_NS.any(dim=1, keepdim=True)

    def attend(start: int) -> Tensor:
        stop = min(start + block, positions)
        bias_NHBS = _relative_bias(
            scores_NHSR[:, :, start:stop], start, positions, max_left, max_right
        )
        if keep_NS is not None:
            bias_NHBS = bias_NHBS.masked_fill(~keep_NS[:, None, None], float("-inf"))

        return scaled_dot_product_attention(
            q_NHSK[:, :, start:stop], k_NHSK, v_NHSK, attn_mask=bias_NHBS
        )

    if positions <= block:
        return attend(0)

    run = attend
    if torch.is_grad_enabled():
        # What gradients need of a block is computed again when they do: all blocks
        # together would be an S x S matrix.
        run = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)

    return torch.cat([run(start) for start in range(0, positions, block)], dim=2)


def _relative_bias(
    scores_NHBR: Tensor, start: int, positions: int, max_left: int, max_right: int
) -> Tensor:
    """Spread the scores of relative positions over the keys that they belong to.

    Row b of the result is, for key j, ``scores[b, clip(j - start - b) + max_left]``.
    In a row padded with its outermost scores that is a stretch of its own, one further
    left than the row above: a view with the row stride shortened by one.
    """
    n, heads, block, relative = scores_NHBR.shape
    # Keys that some row of the block tells apart from those further out.
    first = max(0, start - max_left)
    last = min(positions, start + block + max_right)
    near = last - first

    # Column c of the padded row b is the score of relative position c - (block - 1)
    # + first - start, whatever b is, and row b wants it from column block - 1 - b on.
    columns = torch.arange(near + block - 1, device=scores_NHBR.device)
    columns = columns - (block - 1) + first - start
    columns = columns.clamp(-max_left, max_right) + max_left
    padded_NHBC = scores_NHBR[..., columns].contiguous()  # in memory of its own
    width = padded_NHBC.size(-1)

    near_NHBS = padded_NHBC.as_strided(
        (n, heads, block, near),
        (heads * block * width, block * width, width - 1, 1),
        block - 1,
    )

    left_NHBS = scores_NHBR[..., :1].expand(-1, -1, -1, first)
    right_NHBS = scores_NHBR[..., relative - 1 :].expand(-1, -1, -1, positions - last)

    return torch.cat((left_NHBS, near_NHBS, right_NHBS), dim=-1)
