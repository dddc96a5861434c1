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
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import GLU, Conv1d, Module, SiLU
from torch.nn.functional import conv2d, glu, layer_norm, silu

from seamless_w2vbert.attention import is_compiling, shaw_attention

_BATCH = 1024
"""The rows that weights are laid out for; others do as well."""

_ROWS = 1024
"""How many frames go through a feed-forward network at a time. What is between its two
products, four times as wide as the rest, stays in the cache, and under the size from
which the C library asks the system for fresh pages every time."""

_SAMPLES = 32
"""How many values at either end of a weight are compared to tell whether it has been
written. The rest is not touched: if weights are mapped from a disk, it stays there."""

_PROJECTIONS = (
    *(f"ffn{n}.{name}" for n in (1, 2) for name in ("inner_proj", "output_proj")),
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "output")),
)

_LEAVES = {"weight", "bias"}

_POINTWISE = ("conv.pointwise_conv1", "conv.pointwise_conv2")

Parts: TypeAlias = Mapping[str, tuple[type[Module], ...]]
"""The parts of a block by name, and the classes that each may be of."""


def parts(
    *,
    block: type[Module],
    layer_norm: type[Module],
    feed_forward: type[Module],
    attention: type[Module],
    sdpa: type[Module],
    embedding: type[Module],
    convolution: type[Module],
    linear: tuple[type[Module], ...],
) -> Parts:
    """Return the parts that :class:`PackedBlock` knows how to compute, given what the
    classes are called in a generation of fairseq2. A block with others, such as
    adapters put into it, or subclasses of these, is left to itself."""
    names = ("ffn1", "self_attn", "conv", "ffn2")

    return {
        "": (block,),
        **{f"{name}_layer_norm": (layer_norm,) for name in names},
        "conv.layer_norm": (layer_norm,),
        "layer_norm": (layer_norm,),
        **dict.fromkeys(("ffn1", "ffn2"), (feed_forward,)),
        "self_attn": (attention,),
        "self_attn.sdpa": (sdpa,),
        "self_attn.sdpa.rel_k_embed": (embedding,),
        **dict.fromkeys(_PROJECTIONS, linear),
        "conv": (convolution,),
        **dict.fromkeys((*_POINTWISE, "conv.depthwise_conv"), (Conv1d,)),
        "conv.pointwise_conv1_activation": (GLU,),
        **dict.fromkeys(
            (
                "conv.depthwise_activation",
                "ffn1.inner_activation",
                "ffn2.inner_activation",
            ),
            (SiLU,),
        ),
    }


@cache
def multiplies_in(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN multiplies by packed weights in ``dtype`` here: bfloat16, for
    one, takes a processor with AVX-512."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False

    try:
        Linear(torch.ones(16, 16, dtype=dtype))(torch.ones(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError):  # cannot, or this torch has no such operator
        return False

    return True


def can_pack(block: Module, parts: Parts) -> bool:
    """Tell whether a block is made of known parts alone, with nothing hooked in."""
    found = dict(block.named_modules())

    return (
        found.keys() >= parts.keys()
        and getattr(block.conv, "causal_depthwise_conv", False) is True
        and not _has_global_hooks()
        and all(
            _is_plain(part, parts.get(name), is_block=part is block)
            for name, part in found.items()
        )
    )


def _is_plain(part: Any, known: tuple[type, ...] | None, *, is_block: bool) -> bool:
    if known is None:  # does nothing but in training, which it may be in by itself
        return isinstance(part, torch.nn.Dropout) and not part.training

    return (
        type(part) in known
        and "forward" not in vars(part)
        and all(
            tensor is None or name in _LEAVES
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items()
        )
        # A block's own hooks are run by whoever calls it.
        and (is_block or not (part._forward_hooks or part._forward_pre_hooks))
    )


def _has_global_hooks() -> bool:
    hooks = torch.nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


class _Origin:
    """What a block was packed from, to tell whether it still is what it was."""

    def __init__(self, block: Module) -> None:
        # Holding on to the memory keeps its addresses from being used again.
        self._parameters = {name: p.detach() for name, p in block.named_parameters()}
        self._versions = list(map(_version_of, block.parameters()))
        # Writes through `.data` leave no trace but the values.
        self._views = [
            _in_memory(tensor)[some]
            for name in (*_PROJECTIONS, *_POINTWISE)
            for leaf in sorted(_LEAVES)
            if (tensor := self._parameters.get(f"{name}.{leaf}")) is not None
            for some in (slice(_SAMPLES), slice(-_SAMPLES, None))
        ]
        self._samples = torch.cat(self._views)

    def is_still(self, block: Module) -> bool:
        parameters = dict(block.named_parameters())

        return (
            parameters.keys() == self._parameters.keys()
            and all(
                parameter.data_ptr() == packed.data_ptr()
                and parameter.dtype == packed.dtype
                and parameter.shape == packed.shape
                for parameter, packed in zip(
                    parameters.values(), self._parameters.values(), strict=True
                )
            )
            and list(map(_version_of, parameters.values())) == self._versions
            and torch.equal(torch.cat(self._views), self._samples)
        )


def _in_memory(tensor: Tensor) -> Tensor:
    """Return a tensor as a vector, in the order in which its values lie in memory."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.as_strided((1 + sum((n - 1) * step for n, step in strides),), (1,))


def _version_of(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_packed: WeakKeyDictionary[Module, PackedBlock] = WeakKeyDictionary()
_packing = Lock()


def packed(block: Module, seqs: Tensor, parts: Parts) -> PackedBlock | None:
    """Return the block in its packed form, made when it is first asked for and again
    when a parameter has changed; None where it has to be run as it is: with gradients,
    in training, under autocast, on another device, or with parts or hooks that are not
    known here.

    What is written through ``.data`` shows in a sample of a parameter's values alone:
    after writing but a part of one, :func:`forget` the block.

    :param seqs: what it is to be run on.
    :param parts: see :func:`parts`.
    """
    if seqs.device.type != "cpu" or block.training:
        _packed.pop(block, None)
        return None

    if (
        torch.is_grad_enabled()
        or _is_autocast()
        or is_compiling()
        or not multiplies_in(seqs.dtype)
        or not can_pack(block, parts)
    ):
        return None

    with _packing:
        found = _packed.get(block)

        if found is None or not found.origin.is_still(block):
            _packed.pop(block, None)
            if any(parameter.dtype != seqs.dtype for parameter in block.parameters()):
                return None
            found = _packed[block] = PackedBlock(block)

    return found


def forget(block: Module) -> None:
    """Have a block packed anew when it is run next."""
    _packed.pop(block, None)


def _is_autocast() -> bool:
    try:
        return torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4
        return torch.is_autocast_cpu_enabled()


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

    def __init__(self, block: Any) -> None:
        """
        :param block: one that :func:`can_pack`.
        """
        attention, convolution = block.self_attn, block.conv
        sdpa = attention.sdpa
        self.origin = _Origin(block)

        # Half of a feed-forward network's output is that of half its last weights.
        self.ffn1 = self._feed_forward(block.ffn1)
        self.ffn2 = self._feed_forward(block.ffn2)
        self.ffn1_norm = _norm(block.ffn1_layer_norm)
        self.ffn2_norm = _norm(block.ffn2_layer_norm)

        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = Linear(
            torch.cat([projection.weight for projection in inputs]),
            torch.cat([_bias(projection) for projection in inputs]),
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
        self.depthwise_bias = convolution.depthwise_conv.bias
        self.depthwise_norm = _norm(convolution.layer_norm)
        self.pointwise2 = _pointwise(convolution.pointwise_conv2)

        self.norm = _norm(block.layer_norm)

        release(
            [block.get_submodule(name).weight for name in (*_PROJECTIONS, *_POINTWISE)]
        )

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
        image = conv2d(
            image,
            self.depthwise,
            self.depthwise_bias,
            padding=(0, past),
            groups=image.size(1),
        )
        # Padded on both sides, of which only the past is wanted.
        hidden = image.squeeze(2).transpose(1, 2)[:, : seqs.size(1)]

        hidden = silu(layer_norm(hidden, *self.depthwise_norm))

        return self.pointwise2.add(hidden, seqs)


def _bias(projection: Any) -> Tensor:
    bias: Tensor | None = projection.bias
    weight: Tensor = projection.weight
    return weight.new_zeros(weight.size(0)) if bias is None else bias


def _norm(module: Any) -> tuple[Any, ...]:
    return module.normalized_shape, module.weight, module.bias, module.eps


def _pointwise(convolution: Any) -> Linear:
    return Linear(convolution.weight.squeeze(-1), convolution.bias)


# -- memory --------------------------------------------------------------------------


def release(tensors: Iterable[Tensor]) -> None:
    """Let the system take the memory of tensors that are unlikely to be read again.

    Nothing is lost: what is mapped from a file is read from it again when needed, and
    what is not is left where it is.
    """
    advice = getattr(mmap, "MADV_PAGEOUT", 21)  # Linux 5.4
    page = mmap.PAGESIZE
    files = _mapped_files()

    for tensor in tensors:
        start = -(-tensor.data_ptr() // page) * page
        stop = (tensor.data_ptr() + tensor.nbytes) // page * page

        if start < stop and any(a <= start and stop <= b for a, b in files):
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


def _mapped_files() -> list[tuple[int, int]]:
    """Return where in memory files are mapped, on Linux."""
    if _libc is None:
        return []

    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []

    fields = [line.split(maxsplit=5) for line in lines]

    return [
        (int(first, 16), int(last, 16))
        for span, _, _, _, inode, *_ in fields
        if inode != "0"
        for first, last in [span.split("-")]
    ]


def _load_libc() -> Any:
    try:
        libc = ctypes.CDLL(None)
        libc.madvise  # noqa: B018
    except (OSError, AttributeError, TypeError):
        return None

    return libc


_libc = _load_libc()
