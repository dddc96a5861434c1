"""The shape of a W2v-BERT 2.0 encoder, apart from any library that builds it.

Comes in: numbers read from a checkpoint's tensors or its config. Goes out: one
:class:`Architecture`, from which either stack builds its modules. It exists so
that checkpoints and stacks need not know each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainingHeads:
    """The sizes of the contrastive pretraining heads, as in section 3.2.1 of the
    Seamless paper (https://arxiv.org/abs/2312.05187) and fairseq2's
    ``Wav2Vec2Config``."""

    final_dim: int = 768
    quantized_dim: int = 768
    num_codebooks: int = 2
    num_codebook_entries: int = 320


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Conformer encoder with Shaw relative positions.

    The defaults are those of W2v-BERT 2.0, seamless_communication's
    ``conformer_shaw_600m``.
    """

    num_layers: int = 24
    """The number of Conformer blocks."""

    model_dim: int = 1024
    """The width of the hidden states."""

    num_heads: int = 16
    """The number of attention heads."""

    ffn_inner_dim: int = 4096
    """The inner width of both macaron feed-forward networks."""

    depthwise_conv_kernel_size: int = 31
    """The kernel of the causal depthwise convolution, in frames."""

    max_left_rel_pos: int = 64
    """How far back relative positions are told apart, in frames of 20 ms."""

    max_right_rel_pos: int = 8
    """How far ahead relative positions are told apart, in frames of 20 ms."""

    num_fbank_channels: int = 80
    """Mel bins per fbank frame."""

    fbank_stride: int = 2
    """Fbank frames (10 ms) stacked into one encoder frame."""

    pretraining: PretrainingHeads | None = None
    """The pretraining heads, or None for the bare encoder."""

    @property
    def feature_dim(self) -> int:
        """The width of one stacked fbank frame."""
        return self.num_fbank_channels * self.fbank_stride

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.model_dim // self.num_heads


TINY = Architecture(num_layers=3, model_dim=128, num_heads=8, ffn_inner_dim=512)
"""The architecture of ``tiny-random``: small, with every part of the real one."""
