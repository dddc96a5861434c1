"""Shaw relative attention as one CUDA kernel, for inference.

Comes in: what :func:`seamless_w2vbert.attention.shaw_attention` takes. Goes out: the
same. Written in Triton, which comes with torch on Linux and compiles it on first use.

It is FlashAttention (https://arxiv.org/abs/2205.14135) with a bias that is looked up
only near the diagonal: a tile of keys that are all further left than the window, or all
further right, adds one number to each row. Tiles behind a sequence's end are not
visited. Shapes are named as in :mod:`seamless_w2vbert.attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamless_w2vbert.trial import TOLERANCES

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system
    triton = None

WIDTHS = (16, 32, 64, 128)
"""Of a head; the kernel's matrix products want a power of two."""

NUM_WARPS = 8
"""Of a program. With four, its registers do not hold what is near the diagonal."""

_LOG2_E = 1.4426950408889634

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _visit(  # type: ignore[no-untyped-def]
        q,
        scores_ptr,
        k_ptr,
        v_ptr,
        keep_ptr,
        scores_stride,
        k_stride,
        v_stride,
        first,
        last,
        length,
        positions,
        queries,
        largest,
        total,
        attended,
        scale,
        log2_e,
        column,
        relative: tl.constexpr,
        max_left: tl.constexpr,
        width: tl.constexpr,
        block_keys: tl.constexpr,
        is_near: tl.constexpr,
        has_keep: tl.constexpr,
    ):
        """Attend to the tiles of keys from ``first`` to ``last``, online."""
        dims = tl.arange(0, width)
        here = queries < positions

        if not is_near:
            bias = tl.load(
                scores_ptr + queries * scores_stride + column, mask=here, other=0.0
            ).to(tl.float32)

        for start in range(first, last, block_keys):
            keys = start + tl.arange(0, block_keys)
            valid = keys < length
            if has_keep:
                kept = tl.load(keep_ptr + keys, mask=valid, other=0)
                valid = valid & (kept != 0)

            k = tl.load(
                k_ptr + keys[None, :] * k_stride + dims[:, None],
                mask=(keys < length)[None, :],
                other=0.0,
            )
            scores = tl.dot(q, k, allow_tf32=False) * scale

            if is_near:
                offsets = keys[None, :] - queries[:, None] + max_left
                offsets = tl.minimum(tl.maximum(offsets, 0), relative - 1)
                near = tl.load(
                    scores_ptr + queries[:, None] * scores_stride + offsets,
                    mask=here[:, None],
                    other=0.0,
                )
                scores += near.to(tl.float32) * log2_e
            else:
                scores += bias[:, None] * log2_e

            scores = tl.where(valid[None, :], scores, -1.0e30)

            highest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.where(
                valid[None, :], tl.math.exp2(scores - highest[:, None]), 0.0
            )
            correction = tl.math.exp2(largest - highest)
            v = tl.load(
                v_ptr + keys[:, None] * v_stride + dims[None, :],
                mask=(keys < length)[:, None],
                other=0.0,
            )
            total = total * correction + tl.sum(weights, 1)
            attended = attended * correction[:, None]
            attended += tl.dot(weights.to(v.dtype), v, allow_tf32=False)
            largest = highest

        return largest, total, attended

    @triton.jit  # type: ignore[untyped-decorator]
    def _attend(  # type: ignore[no-untyped-def]
        q_ptr,
        k_ptr,
        v_ptr,
        scores_ptr,
        keep_ptr,
        lengths_ptr,
        output_ptr,
        q_batch,
        q_head,
        q_stride,
        k_batch,
        k_head,
        k_stride,
        v_batch,
        v_head,
        v_stride,
        output_batch,
        output_head,
        output_stride,
        heads,
        positions,
        scale,
        log2_e,
        relative: tl.constexpr,
        max_left: tl.constexpr,
        width: tl.constexpr,
        block_queries: tl.constexpr,
        block_keys: tl.constexpr,
        has_keep: tl.constexpr,
    ):
        """Compute a block of queries of one head."""
        # One dimension: the others of a grid end at 65,535.
        blocks = tl.cdiv(positions, block_queries)
        first_query = tl.program_id(0) % blocks * block_queries
        row = tl.program_id(0) // blocks
        batch = (row // heads).to(tl.int64)
        head = (row % heads).to(tl.int64)
        length = tl.load(lengths_ptr + batch)

        if first_query < length:
            queries = first_query + tl.arange(0, block_queries)
            dims = tl.arange(0, width)
            here = (queries < length)[:, None]

            q_ptr += batch * q_batch + head * q_head
            k_ptr += batch * k_batch + head * k_head
            v_ptr += batch * v_batch + head * v_head
            output_ptr += batch * output_batch + head * output_head
            scores_ptr += (batch * positions * heads + head) * relative
            keep_ptr += batch * positions

            q = tl.load(
                q_ptr + queries[:, None] * q_stride + dims[None, :],
                mask=here,
                other=0.0,
            )
            largest = tl.zeros([block_queries], tl.float32) - 1.0e30
            total = tl.zeros([block_queries], tl.float32)
            attended = tl.zeros([block_queries, width], tl.float32)

            # The tiles that are left of every window in the block, and right of it.
            near = (first_query - max_left + 1) // block_keys * block_keys
            near = tl.minimum(tl.maximum(near, 0), length)
            right = first_query + block_queries + relative - 2 - max_left
            right = (right + block_keys - 1) // block_keys * block_keys
            far = tl.minimum(right, length)

            for part in tl.static_range(3):
                if part == 0:
                    first, last, column = 0, near, 0
                elif part == 1:
                    first, last, column = near, far, 0
                else:
                    first, last, column = right, length, relative - 1

                largest, total, attended = _visit(
                    q,
                    scores_ptr,
                    k_ptr,
                    v_ptr,
                    keep_ptr,
                    heads * relative,
                    k_stride,
                    v_stride,
                    first,
                    last,
                    length,
                    positions,
                    queries,
                    largest,
                    total,
                    attended,
                    scale,
                    log2_e,
                    column,
                    relative,
                    max_left,
                    width,
                    block_keys,
                    part == 1,
                    has_keep,
                )

            attended = attended / total[:, None]
            tl.store(
                output_ptr + queries[:, None] * output_stride + dims[None, :],
                attended.to(output_ptr.dtype.element_ty),
                mask=here,
            )


def takes(q_NHSK: Tensor, table_RK: Tensor) -> bool:
    """Tell whether the kernel is made for queries and relative keys like these."""
    _, heads, positions, width = q_NHSK.shape
    stride = max(q_NHSK.stride(2), heads * table_RK.size(0))

    return (
        triton is not None
        and q_NHSK.device.type == "cuda"
        and q_NHSK.dtype in TOLERANCES
        and width in WIDTHS
        # Within a sequence the kernel counts in 32 bits.
        and stride * positions < 2**31
    )


def block_sizes(dtype: torch.dtype, width: int) -> tuple[int, int]:
    """Return how many queries and keys a program takes at a time: what its registers
    and 99 KB of shared memory, which any GPU since 2020 has, can hold."""
    wide = (dtype == torch.float32) + (width > 64)
    return ((128, 64), (64, 32), (32, 32))[wide]


def fused_attention(
    q_NHSK: Tensor,
    k_NHSK: Tensor,
    v_NHSK: Tensor,
    table_RK: Tensor,
    max_left: int,
    keep_NS: Tensor | None = None,
) -> Tensor:
    """Attend as :func:`seamless_w2vbert.attention.shaw_attention` does, without
    gradients. Rows of padding at the end of a sequence are zeros.

    :param q_NHSK: what :func:`takes` takes.
    """
    n, heads, positions, width = q_NHSK.shape
    relative = table_RK.size(0)
    scale = width**-0.5
    q, k, v = (
        x if x.stride(3) == 1 else x.contiguous() for x in (q_NHSK, k_NHSK, v_NHSK)
    )

    # As queries lie in memory if they come out of a projection.
    scores_NSHR = (q.transpose(1, 2) @ (table_RK * scale).T).contiguous()
    output_NSHK = torch.zeros(
        n, positions, heads, width, dtype=q.dtype, device=q.device
    )
    output_NHSK = output_NSHK.transpose(1, 2)

    if keep_NS is None:
        lengths_N = torch.full((n,), positions, dtype=torch.int32, device=q.device)
        keep = lengths_N  # not read
    else:
        # Up to the last key that is kept; all without waiting for the device.
        places_S = torch.arange(1, positions + 1, device=q.device)
        lengths_N = (keep_NS * places_S).amax(dim=1).to(torch.int32)
        keep = keep_NS.to(torch.uint8).contiguous()

    block_queries, block_keys = block_sizes(q.dtype, width)

    # Triton launches on the current device, whatever its tensors are on.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        _attend[(triton.cdiv(positions, block_queries) * n * heads,)](
            q,
            k,
            v,
            scores_NSHR,
            keep,
            lengths_N,
            output_NHSK,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *output_NHSK.stride()[:3],
            heads,
            positions,
            scale * _LOG2_E,
            _LOG2_E,
            relative=relative,
            max_left=max_left,
            width=width,
            block_queries=block_queries,
            block_keys=block_keys,
            has_keep=keep_NS is not None,
            num_warps=NUM_WARPS,
        )

    return output_NHSK
