"""A Conformer block -> the same block for inference on CPU, several times less moved.

Comes in: fairseq2's ``ConformerBlock``, of either generation. Goes out:
:class:`PackedBlock`, a function of its hidden states. torch only.

Three things make it fast. Weights are laid out once as oneDNN multiplies by them, which
matters most where sequences are short, and on processors that MKL, which plain
``linear`` calls, is slow on. Activations, residuals and the halving of the feed-forward
networks ride on the products. And sequences stay (N, S, M) throughout: the convolution
reads them as they are.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import conv2d, glu, layer_norm, silu

from seamless_w2vbert.attention import shaw_attention

DTYPES = (torch.float32, torch.bfloat16)
"""What oneDNN multiplies in on CPU."""

_BATCH = 1024
"""The rows that weights are laid out for; others do as well."""

_ROWS = 1024
"""How many frames go through a feed-forward network at a time. What is between its two
products, four times as wide as the rest, stays in the cache, and under the size from
which the C library asks the system for fresh pages every time."""

_PARTS = {
    "ffn1_layer_norm": "StandardLayerNorm",
    "ffn1": "StandardFeedForwardNetwork",
    "ffn1.inner_activation": "SiLU",
    "self_attn_layer_norm": "StandardLayerNorm",
    "self_attn": "StandardMultiheadAttention",
    "self_attn.sdpa": "LinearShawSDPA",
    "conv_layer_norm": "StandardLayerNorm",
    "conv": "ConformerConvolution",
    "conv.pointwise_conv1": "Conv1d",
    "conv.pointwise_conv1_activation": "GLU",
    "conv.depthwise_conv": "Conv1d",
    "conv.layer_norm": "StandardLayerNorm",
    "conv.depthwise_activation": "SiLU",
    "conv.pointwise_conv2": "Conv1d",
    "ffn2_layer_norm": "StandardLayerNorm",
    "ffn2": "StandardFeedForwardNetwork",
    "ffn2.inner_activation": "SiLU",
    "layer_norm": "StandardLayerNorm",
}
"""The parts of a block that this module knows how to compute, by the names of their
classes. A block with others, such as adapters put into it, is left to itself."""

_LINEAR = ("Linear", "ColumnShardedLinear", "RowShardedLinear")

_PROJECTIONS = (
    *(f"ffn{n}.{name}" for n in (1, 2) for name in ("inner_proj", "output_proj")),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "output")),
)


def is_available() -> bool:
    """Tell whether this torch lays weights out for oneDNN."""
    return bool(
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def can_pack(block: Module) -> bool:
    """Tell whether a block is made of known parts alone, with nothing hooked in."""
    parts = dict(block.named_modules())

    for name, expected in _PARTS.items():
        if type(parts.pop(name, None)).__name__ != expected:
            return False

    for name in _PROJECTIONS:
        if type(parts.pop(name, None)).__name__ not in _LINEAR:
            return False

    # Of what is left, attention has its tables, and dropouts do nothing here.
    rest = (
        name
        for name, part in parts.items()
        if name and not name.startswith("self_attn.sdpa.")
        if type(part).__name__ != "Dropout"
    )

    return (
        next(rest, None) is None
        and getattr(block.conv, "causal_depthwise_conv", False) is True
        and not any(_is_hooked(part) for part in block.modules())
    )


def _is_hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def state_of(block: Module) -> tuple[Any, ...]:
    """Return what changes whenever a parameter of the block is written or replaced."""
    return tuple(
        (parameter.data_ptr(), _version_of(parameter), parameter.dtype)
        for parameter in block.parameters()
    )


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_packed: WeakKeyDictionary[Module, PackedBlock] = WeakKeyDictionary()


def packed(block: Module, seqs: Tensor) -> PackedBlock | None:
    """Return the block in its packed form, made when it is first asked for and again
    when a parameter has changed; None where it has to be run as it is: with gradients,
    in training, on another device, or with parts or hooks that are not known here.

    :param seqs: what it is to be run on.
    """
    if (
        torch.is_grad_enabled()
        or block.training
        or seqs.device.type != "cpu"
        or seqs.dtype not in DTYPES
        or not is_available()
        or not can_pack(block)
    ):
        return None

    state = state_of(block)
    found = _packed.get(block)

    if found is None or found.state != state:
        if any(parameter.dtype != seqs.dtype for parameter in block.parameters()):
            return None
        found = _packed[block] = PackedBlock(block, state)

    return found


class Linear:
    """A product with packed weights, in float32 or bfloat16 on CPU."""

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

    def __call__(self, x: Tensor, activation: str = "none") -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self.packed, self.bias, activation, [], ""
        )
        return y

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return the product plus ``residual``."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x, residual, self.packed, self.bias, "add"
        )
        return y


class PackedBlock:
    """A Conformer block whose products are packed, for inference on CPU."""

    def __init__(self, block: Any, state: tuple[Any, ...]) -> None:
        """
        :param block: one that :func:`can_pack`.
        :param state: its :func:`state_of`.
        """
        attention, convolution = block.self_attn, block.conv
        sdpa = attention.sdpa
        self.state = state

        # Half of a feed-forward network's output is that of half its last weights.
        self.ffn1 = self._feed_forward(block.ffn1)
        self.ffn2 = self._feed_forward(block.ffn2)
        self.ffn1_norm = _norm(block.ffn1_layer_norm)
        self.ffn2_norm = _norm(block.ffn2_layer_norm)

        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [projection.bias for projection in inputs]
        self.qkv = Linear(
            torch.cat([projection.weight for projection in inputs]),
            None if biases[0] is None else torch.cat(biases),
        )
        self.attention_norm = _norm(block.self_attn_layer_norm)
        self.attention_output = Linear(
            attention.output_proj.weight, attention.output_proj.bias
        )
        self.num_heads = attention.num_heads
        self.table = sdpa.rel_k_embed.weight
        self.max_left = sdpa.max_left

        self.convolution_norm = _norm(block.conv_layer_norm)
        self.pointwise1 = _pointwise(convolution.pointwise_conv1)
        # (M, 1, kernel) -> (M, 1, 1, kernel)
        self.depthwise = convolution.depthwise_conv.weight.unsqueeze(2)
        self.depthwise_norm = _norm(convolution.layer_norm)
        self.pointwise2 = _pointwise(convolution.pointwise_conv2)

        self.norm = _norm(block.layer_norm)

        for name in _PROJECTIONS:
            release(block.get_submodule(name).weight)

    @staticmethod
    def _feed_forward(ffn: Any) -> tuple[Linear, Linear]:
        return (
            Linear(ffn.inner_proj.weight, ffn.inner_proj.bias),
            Linear(ffn.output_proj.weight, ffn.output_proj.bias, scale=0.5),
        )

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
        self, seqs: Tensor, norm: Any, ffn: tuple[Linear, Linear]
    ) -> Tensor:
        inner, output = ffn
        # (N, S, M) -> (N S, M)
        rows = seqs.flatten(0, 1)
        results = [
            output.add(inner(layer_norm(some, *norm), "swish"), some)
            for some in torch.split(rows, _ROWS)
        ]
        result = results[0] if len(results) == 1 else torch.cat(results)

        return result.view(seqs.shape)

    def _run_attention(self, seqs: Tensor, keep_NS: Tensor | None) -> Tensor:
        projected = self.qkv(layer_norm(seqs, *self.attention_norm))
        # (N, S, 3 M) -> 3 x (N, H, S, K)
        heads_NSTHK = projected.view(*seqs.shape[:2], 3, self.num_heads, -1)
        q, k, v = heads_NSTHK.permute(2, 0, 3, 1, 4)
        attended = shaw_attention(q, k, v, self.table, self.max_left, keep_NS)
        # (N, H, S, K) -> (N, S, M)
        return self.attention_output.add(attended.transpose(1, 2).flatten(2), seqs)

    def _run_convolution(self, seqs: Tensor, keep_NS: Tensor | None) -> Tensor:
        hidden = layer_norm(seqs, *self.convolution_norm)

        if keep_NS is not None:  # padding must not leak in
            hidden = hidden.masked_fill(~keep_NS.unsqueeze(-1), 0)

        hidden = glu(self.pointwise1(hidden), dim=-1)

        # A view: (N, S, M) is what an image of height 1 is in channels-last order.
        image = hidden.transpose(1, 2).unsqueeze(2)
        past = self.depthwise.size(-1) - 1
        image = conv2d(image, self.depthwise, padding=(0, past), groups=image.size(1))
        # Padded on both sides, of which only the past is wanted.
        hidden = image.squeeze(2).transpose(1, 2)[:, : seqs.size(1)]

        hidden = silu(layer_norm(hidden, *self.depthwise_norm))

        return self.pointwise2.add(hidden, seqs)


def _norm(module: Any) -> tuple[Any, ...]:
    return module.normalized_shape, module.weight, module.bias, module.eps


def _pointwise(convolution: Any) -> Linear:
    packed = Linear(convolution.weight.squeeze(-1), convolution.bias)
    release(convolution.weight)

    return packed


# -- memory --------------------------------------------------------------------------


def release(tensor: Tensor) -> None:
    """Let the system take the memory of a tensor that is unlikely to be read again.

    Nothing is lost: what is mapped from a file is read from it again when needed, and
    what is not is left where it is.
    """
    advice = getattr(mmap, "MADV_PAGEOUT", 21)  # Linux 5.4
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page

    if tensor.device.type == "cpu" and stop > start and _libc is not None:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def _load_libc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        libc.madvise  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None

    return libc


_libc = _load_libc()
