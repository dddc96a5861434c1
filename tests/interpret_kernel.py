"""Runs the fused kernel in Triton's interpreter, on CPU, against the plain formula.

A program of its own: the interpreter has to be chosen before Triton is imported.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from seamless_w2vbert.fused_attention import TOLERANCES, fused_attention

_patch = interpreter._patch_lang_tensor


def _patch_for_todays_numpy(tensor):
    """NumPy 2.4 no longer makes a number of an array of one element by itself."""
    _patch(tensor)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_for_todays_numpy


def plain(q, k, v, table, left, keep):
    positions = torch.arange(q.size(2))
    relative = (positions - positions.unsqueeze(1)).clamp(
        -left, table.size(0) - 1 - left
    )
    keys = k.unsqueeze(2) + table[relative + left]
    scores = torch.einsum("nhsk,nhstk->nhst", q, keys) / q.size(-1) ** 0.5
    scores = scores.masked_fill(~keep[:, None, None], float("-inf"))
    return scores.softmax(dim=-1) @ v


def main():
    generator = torch.Generator().manual_seed(0)
    # n, heads, positions, width, relative positions, of which to the left
    for shape in (
        (2, 1, 130, 16, 73, 64),
        (1, 2, 200, 16, 9, 3),
        (1, 1, 65, 32, 1, 0),
        (2, 1, 1, 16, 73, 64),
    ):
        n, heads, positions, width, relative, left = shape
        # As a projection lays them out: (N, S, 3, H, K).
        made = torch.randn(n, positions, 3, heads, width, generator=generator)
        q, k, v = made.permute(2, 0, 3, 1, 4)
        table = torch.randn(relative, width, generator=generator)

        whole = torch.full((n,), positions)
        ragged = torch.randint(1, positions + 1, (n,), generator=generator)
        places = torch.arange(positions)
        scattered = torch.rand(n, positions, generator=generator) < 0.5
        scattered[:, -1] = True

        for keep, given in (
            (places < whole.unsqueeze(1), None),
            (places < ragged.unsqueeze(1), True),
            (scattered, True),
        ):
            inputs = [tensor.double() for tensor in (q, k, v, table)]
            expected = plain(*inputs, left, keep)
            last = (keep * (places + 1)).amax(dim=1)

            # Each has blocks of its own size.
            for dtype in (torch.float32, torch.float16):
                actual = fused_attention(
                    *(tensor.to(dtype) for tensor in (q, k, v, table)),
                    left,
                    keep if given else None,
                )
                for row, length in enumerate(last.tolist()):
                    difference = actual[row, :, :length] - expected[row, :, :length]
                    share = difference.abs().max() / expected.abs().max()
                    if not share <= TOLERANCES[dtype] / 10:
                        sys.exit(f"{shape}, {dtype}: off by {share:.1e}")
                    if actual[row, :, length:].any():
                        sys.exit(f"{shape}, {dtype}: padding is not zero")

    print("exact")


if __name__ == "__main__":
    main()
