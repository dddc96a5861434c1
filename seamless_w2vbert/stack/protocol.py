"""What a stack module offers: the names and signatures that both generations share.

Comes in: tensors and lengths. Goes out: tensors and lengths. It exists so that the
rest of the package never meets a ``PaddingMask`` (0.2) or a ``BatchLayout`` (0.8).

``lengths`` is everywhere an int64 tensor of shape (N,) on the CPU, in frames of the
``seqs`` beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Module

from seamless_w2vbert import packing
from seamless_w2vbert.architecture import Architecture


@dataclass(frozen=True)
class CardCheckpoint:
    """Where the checkpoint of a fairseq2 asset card lies on this machine."""

    name: str
    path: Path


class Stack(Protocol):
    """The shape of :mod:`stack.seamless` and :mod:`stack.current`."""

    NAME: str
    """``"seamless"`` or ``"current"``."""

    AudioDecoder: Any
    WaveformToFbankConverter: Any
    Collater: Any
    DataPipeline: Any
    MemoryBlock: Any
    """fairseq2's classes of these names."""

    def run_frontend(
        self, frontend: Module, seqs: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply an ``encoder_frontend``."""

    def run_encoder(
        self, encoder: Module, seqs: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Apply a whole encoder, an adaptor that shortens sequences included."""

    def iter_layers(
        self, encoder: Module, seqs: Tensor, lengths: Tensor
    ) -> Iterator[Tensor]:
        """Yield the output of each layer of ``encoder.layers`` in turn, so that the
        caller can stop early."""

    def build_model(self, architecture: Architecture) -> Module:
        """Build the model on the meta device, with fairseq2's parameter names: a
        ``Wav2Vec2Model`` where ``architecture.pretraining`` is given, else a module
        with ``encoder_frontend`` and ``encoder`` alone."""

    def swap_shaw_attention(self, model: Module) -> int:
        """Put :func:`attention.shaw_attention` in the place of every
        ``ShawRelativePositionSDPA``, with the same parameters under the same names.

        :returns: how many there are, those put in earlier included.
        """

    def pack_blocks(self, model: Module) -> None:
        """Have every ``ConformerBlock`` run in its form for inference where it can be,
        see :func:`packing.packed`."""

    def load_with_seamless(
        self, name: str, device: torch.device, dtype: torch.dtype
    ) -> Module:
        """Load a card or a checkpoint file of the 600m architecture with
        seamless_communication's own loader.

        :raises StackError: where seamless_communication cannot be imported.
        :raises CheckpointError: where it cannot load the checkpoint.
        """

    def find_card(self, card: object) -> CardCheckpoint | None:
        """Look an asset card up by name (or take an ``AssetCard``), download its
        checkpoint if need be, and return None where no such card exists."""


class SpeechEncoder(Module):
    """An encoder and its frontend, for checkpoints without pretraining heads."""

    encoder_frontend: Module
    encoder: Module

    def __init__(self, encoder_frontend: Module, encoder: Module) -> None:
        super().__init__()
        self.encoder_frontend = encoder_frontend
        self.encoder = encoder


def replace_shaw(model: Module, stock: type[Module], replacement: type[Module]) -> int:
    """Put ``replacement(child)`` in the place of every ``stock`` child that has no
    relative values, and return how many replacements there are then."""
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, stock) and child.rel_v_embed is None
    ]

    for module, name, child in found:
        setattr(module, name, replacement(child))

    return sum(isinstance(module, replacement) for module in model.modules())


def make_packable(model: Module, stock: type[Module], packable: type[Module]) -> None:
    """Make every ``stock`` module one of the subclass ``packable``, and have those that
    are so already packed anew."""
    for module in model.modules():
        if type(module) is stock:
            module.__class__ = packable
        elif type(module) is packable:
            packing.forget(module)


def lengths_tensor(lengths: list[int] | Tensor) -> Tensor:
    """Return ``lengths`` in the form that every stack function takes and gives."""
    return torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
