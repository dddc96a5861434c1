"""A Conformer block -> what it computes for inference, with several times less moved.

Comes in: fairseq2's ``ConformerBlock``, of either generation, made of known parts.
Goes out: :class:`LeanBlock`, a function of its hidden states. torch only.

Residuals, activations and the halving of the feed-forward networks ride on the
products, and sequences stay (N, S, M) throughout: the convolution reads them as they
are. On CPU weights are laid out once as oneDNN multiplies by them, which matters most
where sequences are short, and on processors that MKL, which plain ``linear`` calls, is
slow on. On CUDA they are used as they are, and what is between the convolution's two
products is one kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import glu, layer_norm, linear, silu

from seamless_w2vbert.attention import shaw_attention
from seamless_w2vbert.convolution import Norm, causal_convolution

_BATCH = 1024
"""The rows that weights are laid out for; others do as well."""

_ROWS = 1024
"""How many frames go through a feed-forward network at a time on CPU. What is between
its two products, four times as wide as the rest, stays in the cache, and under the size
from which the C library asks the system for fresh pages every time."""


# -- products ------------------------------------------------------------------------


class Product(Protocol):
    """A product with the weights of a projection."""

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, scale: float = 1.0
    ) -> None: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def swish(self, x: Tensor) -> Tensor:
        """Return the product, activated."""

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the product, scaled, plus ``residual``."""


class PackedProduct(Product):
    """With packed weights, in float32 or bfloat16 on CPU."""

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, scale: float = 1.0
    ) -> None:
        if scale != 1.0:
            weight_OI = weight_OI * scale
            bias_O = None if bias_O is None else bias_O * scale

        self.packed = torch.ops.mkldnn._reorder_linear_weight(
            weight_OI.contiguous(), _BATCH
        )
        self.bias = bias_O

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, "none")

    def swish(self, x: Tensor) -> Tensor:
        return self._multiply(x, "swish")

    def _multiply(self, x: Tensor, activation: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, activation, [], ""
        )
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.packed, self.bias, "add"
        )
        return y


class SharedProduct(Product):
    """With the weights as they are, anywhere."""

    def __init__(
        self, weight_OI: Tensor, bias_O: Tensor | None = None, scale: float = 1.0
    ) -> None:
        self.weight = weight_OI
        self.bias = bias_O
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def swish(self, x: Tensor) -> Tensor:
        return silu(self(x), inplace=True)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.add(residual, self(x), alpha=self.scale)


@cache
def multiplies_in(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies by packed weights in ``dtype`` here: bfloat16, for
    one, takes a processor with AVX-512."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False

    try:
        PackedProduct(torch.ones(16, 16, dtype=dtype))(torch.ones(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError):  # cannot, or this torch has no such operator
        return False

    return True


# -- the block -----------------------------------------------------------------------


class LeanBlock:
    """A Conformer block for inference."""

    def __init__(self, block: Any, product: type[Product]) -> None:
        """
        :param block: one that :func:`seamless_w2vbert.packing.can_pack`.
        :param product: how it multiplies.
        """
        attention, convolution = block.self_attn, block.conv
        sdpa = attention.sdpa
        self.ffn1 = _feed_forward(block.ffn1, product)
        self.ffn2 = _feed_forward(block.ffn2, product)
        self.ffn1_norm = _norm(block.ffn1_layer_norm)
        self.ffn2_norm = _norm(block.ffn2_layer_norm)

        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        if product is PackedProduct:  # it copies them anyway
            weight = torch.cat([projection.weight for projection in inputs])
            bias = torch.cat([_bias(projection) for projection in inputs])
            self.qkv: tuple[Product, ...] = (product(weight, bias),)
        else:
            self.qkv = tuple(product(each.weight, each.bias) for each in inputs)
        self.attention_norm = _norm(block.self_attn_layer_norm)
        self.attention_output = product(
            attention.output_proj.weight, attention.output_proj.bias
        )
        self.num_heads = attention.num_heads
        self.table = sdpa.rel_k_embed.weight
        self.max_left = sdpa.max_left

        self.convolution_norm = _norm(block.conv_layer_norm)
        self.pointwise1 = _pointwise(convolution.pointwise_conv1, product)
        self.depthwise = convolution.depthwise_conv.weight
        self.depthwise_bias = convolution.depthwise_conv.bias
        self.depthwise_norm = _norm(convolution.layer_norm)
        self.pointwise2 = _pointwise(convolution.pointwise_conv2, product)

        self.norm = _norm(block.layer_norm)

    def __call__(self, seqs_NSM: Tensor, keep_NS: Tensor | None) -> Tensor:
        """Run the block.

        :param keep_NS: where the sequences are no padding, bool; None for everywhere.
        """
        seqs = self._run_feed_forward(seqs_NSM, self.ffn1_norm, self.ffn1)
        seqs = self._run_attention(seqs, keep_NS)
        seqs = self._run_convolution(seqs, keep_NS)
        seqs = self._run_feed_forward(seqs, self.ffn2_norm, self.ffn2)

        return layer_norm(seqs, *self.norm)

    def _run_feed_forward(
        self, seqs: Tensor, norm: Norm, ffn: tuple[Product, Product]
    ) -> Tensor:
        inner, output = ffn
        # (N, S, M) -> (N S, M)
        rows = seqs.flatten(0, 1)
        results = [
            output.add(inner.swish(layer_norm(some, *norm)), some)
            for some in (torch.split(rows, _ROWS) if rows.is_cpu else (rows,))
        ]
        result = results[0] if len(results) == 1 else torch.cat(results)

        return result.view(seqs.shape)

    def _run_attention(self, seqs: Tensor, keep_NS: Tensor | None) -> Tensor:
        hidden = layer_norm(seqs, *self.attention_norm)
        # Each (N, S, T M) -> T x (N, H, S, K), with all three from one or one from each
        q, k, v = (
            heads_NHSK
            for product in self.qkv
            for heads_NHSK in product(hidden)
            .view(*seqs.shape[:2], 3 // len(self.qkv), self.num_heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        attended = shaw_attention(q, k, v, self.table, self.max_left, keep_NS)
        # (N, H, S, K) -> (N, S, M)
        return self.attention_output.add(attended.transpose(1, 2).flatten(2), seqs)

    def _run_convolution(self, seqs: Tensor, keep_NS: Tensor | None) -> Tensor:
        hidden = layer_norm(seqs, *self.convolution_norm)

        if keep_NS is not None:  # padding must not leak in
            hidden = hidden.masked_fill(~keep_NS.unsqueeze(-1), 0)

        hidden = glu(self.pointwise1(hidden), dim=-1)
        hidden = causal_convolution(
            hidden, self.depthwise, self.depthwise_bias, self.depthwise_norm
        )

        return self.pointwise2.add(hidden, seqs)


def _feed_forward(ffn: Any, product: type[Product]) -> tuple[Product, Product]:
    # A feed-forward network adds half of its output.
    return (
        product(ffn.inner_proj.weight, ffn.inner_proj.bias),
        product(ffn.output_proj.weight, ffn.output_proj.bias, scale=0.5),
    )


def _bias(projection: Any) -> Tensor:
    bias: Tensor | None = projection.bias
    weight: Tensor = projection.weight
    return weight.new_zeros(weight.size(0)) if bias is None else bias


def _norm(module: Any) -> Norm:
    return module.normalized_shape, module.weight, module.bias, module.eps


def _pointwise(convolution: Any, product: type[Product]) -> Product:
    return product(convolution.weight.squeeze(-1), convolution.bias)
