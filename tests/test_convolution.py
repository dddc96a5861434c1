"""What is between the two products of a Conformer's convolution."""

from __future__ import annotations

import pytest
import torch
from reference import plain_convolution, relative_difference

from seamless_w2vbert.convolution import causal_convolution


def draw(n, positions, channels, taps):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.requires_grad_()

    norm = ((channels,), normal(channels), normal(channels), 1e-5)
    return normal(n, positions, channels), normal(channels, 1, taps), norm


@pytest.mark.parametrize("positions", [1, 2, 30, 31, 32, 200])
@pytest.mark.parametrize("taps", [1, 5, 31])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_the_formula_and_so_are_its_gradients(positions, taps, has_bias):
    seqs, weight, norm = draw(2, positions, 16, taps)
    bias = torch.linspace(-1, 1, 16, dtype=torch.float64) if has_bias else None
    inputs = (seqs, weight, *norm[1:3])

    actual = causal_convolution(seqs, weight, bias, norm)
    expected = plain_convolution(seqs, weight, bias, norm)

    assert relative_difference(actual, expected) < 1e-12
    probe = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, probe),
        torch.autograd.grad(expected, inputs, probe),
        strict=True,
    ):
        assert relative_difference(one, other) < 1e-10


def test_the_future_is_not_seen():
    seqs, weight, norm = draw(1, 100, 16, 31)
    changed = torch.cat((seqs[:, :60], -seqs[:, 60:]), dim=1)

    with torch.no_grad():
        before, after = (
            causal_convolution(x, weight, None, norm) for x in (seqs, changed)
        )
    assert torch.equal(before[:, :60], after[:, :60])
    assert not torch.isclose(before[:, 60], after[:, 60]).any()
