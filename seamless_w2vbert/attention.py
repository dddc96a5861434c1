"""Shaw relative attention as one function: exact for any length, in linear memory.

Comes in: queries, keys, values and the table of relative keys. Goes out: the attended
values. torch only; it knows nothing of fairseq2.

Stock implementations look a vector up for every pair of positions, an S x S x K table.
There are only left + 1 + right different vectors: ``q @ table.T`` holds every score
that relative positions can add, and each pair's score is one of its columns. Queries
are taken a block at a time, so that no S x S matrix is ever whole.

Tensor names carry their dimensions: N batch, H heads, S positions, B positions of a
block, K the width of a head, R = left + 1 + right relative positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_MAX_SCORES = 4 * 2**20
"""How many scores one block of queries may have over all heads: 16 MB in float32."""


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
    :param keep_NS: which keys may be attended to, bool, at least one in each sequence;
        None for all.
    :returns: (N, H, S, K).
    """
    n, heads, positions, width = q_NHSK.shape
    relative = table_RK.size(0)
    max_right = relative - 1 - max_left

    if not 0 <= max_left < relative:
        raise ValueError(
            f"`max_left` must lie in the table of {relative} relative positions, but "
            f"is {max_left}."
        )

    block = min(positions, max(16, _MAX_SCORES // max(1, n * heads * positions)))
    scores_NHSR = (q_NHSK @ table_RK.T) * width**-0.5
    outputs = []

    for start in range(0, positions, block):
        stop = min(start + block, positions)
        bias_NHBS = _relative_bias(
            scores_NHSR[:, :, start:stop], start, positions, max_left, max_right
        )
        if keep_NS is not None:
            bias_NHBS = bias_NHBS.masked_fill(~keep_NS[:, None, None], float("-inf"))

        outputs.append(
            scaled_dot_product_attention(
                q_NHSK[:, :, start:stop], k_NHSK, v_NHSK, attn_mask=bias_NHBS
            )
        )

    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


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
    padded_NHBC = scores_NHBR[..., columns].contiguous()
    width = padded_NHBC.size(-1)

    near_NHBS = padded_NHBC.as_strided(
        (n, heads, block, near),
        (heads * block * width, block * width, width - 1, 1),
        padded_NHBC.storage_offset() + block - 1,
    )

    left_NHBS = scores_NHBR[..., :1].expand(-1, -1, -1, first)
    right_NHBS = scores_NHBR[..., relative - 1 :].expand(-1, -1, -1, positions - last)

    return torch.cat((left_NHBS, near_NHBS, right_NHBS), dim=-1)
