"""How fast linear algebra alone could run the encoder on this machine.

Comes in: the sizes of a model and of an input. Goes out: the seconds that its
multiply-adds would take at the rate of the best matrix product that torch can be made
to do at these sizes in this dtype.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

_MIN_CALLS, _MIN_SECONDS = 3, 0.03
"""A product is timed for at least this many calls and this long; the best counts."""

_KEPT = 3
"""How many of the fastest ways are timed again in later runs."""


@dataclass(frozen=True)
class Sizes:
    """What of a model decides about its multiply-adds, and who can run it."""

    num_layers: int
    model_dim: int
    ffn_inner_dim: int
    kernel_size: int
    relative_positions: int
    feature_dim: int
    num_heads: int

    def multiply_adds(self, batch: int, frames: int) -> int:
        """Count those of the whole encoder, frontend included.

        Per frame and layer: two feed-forward networks (4 M F), the projections of
        attention (4 M^2) and of the convolution (3 M^2), the depthwise convolution, the
        scores of relative positions, and attention itself (2 S M).

        :param frames: S, the encoder frames (20 ms) of each recording.
        """
        width = self.model_dim
        layer = (
            4 * width * self.ffn_inner_dim
            + 7 * width**2
            + width * self.kernel_size
            + width * self.relative_positions
            + 2 * width * frames
        )
        return batch * frames * (self.num_layers * layer + self.feature_dim * width)

    @property
    def products(self) -> list[tuple[int, int]]:
        """The matrix products of a block by input and output width; the first is also
        what three projections that share an input can be made into."""
        width, inner = self.model_dim, self.ffn_inner_dim
        return [
            (width, 3 * width),
            (width, width),
            (width, 2 * width),
            (width, inner),
            (inner, width),
        ]


class Limit:
    """Times the products of one model in one dtype."""

    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self._sizes = sizes
        self._dtype = dtype
        self._device = torch.device(device)
        self._ways: dict[int, list[_Way]] = {}

    @torch.inference_mode()
    def measure(self, batch: int, frames: int) -> dict[str, Any]:
        """Find the best rate now; in the first run for an input all ways are tried.

        :returns: ``seconds`` for the model's multiply-adds, and how they came about.
        """
        rows = batch * frames
        ways = self._ways.get(rows) or list(self._all_ways(rows))
        if not ways:
            raise RuntimeError(f"torch has no matrix product in {self._dtype} here")

        timed = sorted(((way, self._rate(way, rows)) for way in ways), key=_by_rate)
        self._ways[rows] = [way for way, _ in timed[:_KEPT]]

        best, rate = timed[0]
        multiply_adds = self._sizes.multiply_adds(batch, frames)

        return {
            "seconds": multiply_adds / rate,
            "multiply_adds": multiply_adds,
            "gflop_per_second": 2e-9 * rate,
            "product": f"{rows}x{best.width_in}x{best.width_out}",
            "way": best.name,
        }

    def _rate(self, way: _Way, rows: int) -> float:
        """Return the multiply-adds in a second."""
        best, spent, calls = float("inf"), 0.0, 0

        while calls < _MIN_CALLS or spent < _MIN_SECONDS:
            self._synchronize()
            start = time.perf_counter()
            way.run()
            self._synchronize()
            seconds = time.perf_counter() - start
            best, spent, calls = min(best, seconds), spent + seconds, calls + 1

        return rows * way.width_in * way.width_out / best

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _all_ways(self, rows: int) -> Iterator[_Way]:
        for width_in, width_out in self._sizes.products:
            x, weight, bias = (
                torch.randn(*shape, device=self._device).to(self._dtype)
                for shape in ((rows, width_in), (width_out, width_in), (width_out,))
            )
            for name, make in _WAYS.items():
                if self._device.type != "cpu" and name != "linear":
                    continue
                # Not every build of torch has every way in every dtype; a product that
                # cannot be had is no limit.
                with suppress(RuntimeError, AttributeError, TypeError):
                    run = make(x, weight, bias)
                    run()
                    yield _Way(name, width_in, width_out, run)


@dataclass(frozen=True)
class _Way:
    name: str
    width_in: int
    width_out: int
    run: Callable[[], object]


def _by_rate(timed: tuple[_Way, float]) -> float:
    return -timed[1]


_Make = Callable[[Tensor, Tensor, Tensor], Callable[[], object]]


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    return lambda: linear(x, weight, bias)


def _as_image(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # (T, M) -> (1, M, 1, T), channels last: the same memory
    image = x[None, None].permute(0, 3, 1, 2)
    kernel = weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    return image, kernel


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    image, kernel = _as_image(x, weight)
    return lambda: conv2d(image, kernel, bias)


def _packed_convolution(
    x: Tensor, weight: Tensor, bias: Tensor
) -> Callable[[], object]:
    image, kernel = _as_image(x, weight)
    ops, one, zero = torch.ops.mkldnn, [1, 1], [0, 0]
    packed = ops._reorder_convolution_weight(
        kernel, zero, one, one, 1, list(image.shape)
    )
    return lambda: ops._convolution_pointwise(
        image, packed, bias, zero, one, one, 1, "none", [], ""
    )


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight, len(x))
    return lambda: ops._linear_pointwise(x, packed, bias, "none", [], "")


def _mkl_packed_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], object]:
    ops = torch.ops.mkl
    packed = ops._mkl_reorder_linear_weight(weight, len(x))
    return lambda: ops._mkl_linear(x, packed, weight, bias, len(x))


_WAYS: dict[str, _Make] = {
    "linear": _linear,
    "oneDNN 1x1 convolution": _convolution,
    "oneDNN 1x1 convolution, packed weights": _packed_convolution,
    "oneDNN linear, packed weights": _packed_linear,
    "MKL linear, packed weights": _mkl_packed_linear,
}
