"""A Conformer block -> the form in which it runs for inference, if it has one.

Comes in: fairseq2's ``ConformerBlock``, of either generation. Goes out: its
:class:`~seamless_w2vbert.block.LeanBlock`, on CPU packed once and for as long as the
block stays what it is; or nothing, if it holds what that does not know. torch only.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import GLU, Conv1d, Module, SiLU

from seamless_w2vbert.attention import is_compiling
from seamless_w2vbert.block import (
    LeanBlock,
    PackedProduct,
    SharedProduct,
    multiplies_in,
)
from seamless_w2vbert.trial import TOLERANCES

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
    """Return the parts that :class:`LeanBlock` knows how to compute, given what the
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


_packed: WeakKeyDictionary[Module, tuple[_Origin, LeanBlock]] = WeakKeyDictionary()
_packing = Lock()


def packed(block: Module, seqs: Tensor, parts: Parts) -> LeanBlock | None:
    """Return the block in its form for inference. None where it has to be run as it is:
    with gradients, in training, under autocast, on another device, or with parts or
    hooks that are not known here.

    On CUDA that shares the block's parameters. On CPU weights are packed when it is
    first asked for, and again when a parameter has changed; what is written through
    ``.data`` shows in a sample of a parameter's values alone, so after writing but a
    part of one, :func:`forget` the block.

    :param seqs: what it is to be run on.
    :param parts: see :func:`parts`.
    """
    device = seqs.device.type

    if device != "cpu" or block.training:
        _packed.pop(block, None)

    if (
        block.training
        or torch.is_grad_enabled()
        or is_compiling()
        or not _has_products(seqs)
        or _is_autocast(device)
        or not can_pack(block, parts)
    ):
        return None

    if device == "cuda":
        return LeanBlock(block, SharedProduct) if _fits(block, seqs) else None

    with _packing:
        origin, found = _packed.get(block, (None, None))

        if origin is None or not origin.is_still(block):
            _packed.pop(block, None)
            if not _fits(block, seqs):
                return None
            origin = _Origin(block)
            found = LeanBlock(block, PackedProduct)
            _packed[block] = origin, found
            release(
                [
                    cast(Tensor, block.get_submodule(name).weight)
                    for name in (*_PROJECTIONS, *_POINTWISE)
                ]
            )

    return found


def _has_products(seqs: Tensor) -> bool:
    if seqs.is_cpu:
        return multiplies_in(seqs.dtype)

    return seqs.is_cuda and seqs.dtype in TOLERANCES


def _fits(block: Module, seqs: Tensor) -> bool:
    return all(
        parameter.dtype == seqs.dtype and parameter.device == seqs.device
        for parameter in block.parameters()
    )


def forget(block: Module) -> None:
    """Have a block packed anew when it is run next."""
    _packed.pop(block, None)


def _is_autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:  # before torch 2.4
        if device == "cpu":
            return torch.is_autocast_cpu_enabled()
        return torch.is_autocast_enabled()


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
