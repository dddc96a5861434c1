"""Runs the fused kernels in Triton's interpreter, on CPU, against plain formulas.

A program of its own: the interpreter has to be chosen before Triton is imported.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from reference import plain, plain_convolution
from triton.runtime import interpreter

from seamless_w2vbert.fused_attention import fused_attention
from seamless_w2vbert.fused_convolution import fused_convolution
from seamless_w2vbert.trial import TOLERANCES

_patch = interpreter._patch_lang_tensor


def _patch_for_todays_numpy(tensor):
    """NumPy 2.4 no longer makes a number of an array of one element by itself."""
    _patch(tensor)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_for_todays_numpy


def check(case, actual, expected):
    share = (actual - expected).abs().max() / expected.abs().max()
    if not share <= TOLERANCES[actual.dtype] / 10:
        sys.exit(f"{case}, {actual.dtype}: off by {share:.1e}")


def check_attention():
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
                    check(shape, actual[row, :, :length], expected[row, :, :length])
                    if actual[row, :, length:].any():
                        sys.exit(f"{shape}, {dtype}: padding is not zero")


def check_convolution():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):  # what float16 can hold
        return torch.randn(*shape, generator=generator).half().float()

    # n, positions, channels, taps; blocks are of 16 K numbers
    for shape in ((2, 40, 1024, 31), (3, 300, 96, 5), (1, 2, 48, 31), (2, 9, 2048, 1)):
        n, positions, channels, taps = shape
        # Every second of the channels, so that they do not lie side by side.
        seqs = draw(n, positions, 2 * channels)[..., ::2]
        weight = draw(channels, 1, taps)
        gain, offset, bias = draw(3, channels)

        for given in (None, bias):
            x, w, g, o = (each.double() for each in (seqs, weight, gain, offset))
            b = None if given is None else given.double()
            expected = plain_convolution(x, w, b, ((channels,), g, o, 1e-5))

            for dtype in (torch.float32, torch.float16):
                x, w, g, o = (each.to(dtype) for each in (seqs, weight, gain, offset))
                b = None if given is None else given.to(dtype)
                actual = fused_convolution(x, w, b, ((channels,), g, o, 1e-5))
                check(shape, actual, expected)


if __name__ == "__main__":
    check_attention()
    check_convolution()
    print("exact")
