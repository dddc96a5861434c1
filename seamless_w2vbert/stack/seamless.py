"""fairseq2 0.2: the generation of seamless_communication, where padding is a
``PaddingMask``.

Offers what :class:`stack.protocol.Stack` asks for. With seamless_communication
importable, models come from its own builder; without it, from the one below, which
makes the same modules with the same parameter names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from fairseq2.assets import AssetCard, AssetNotFoundError, asset_store, download_manager
from fairseq2.data import Collater as Collater
from fairseq2.data import DataPipeline as DataPipeline
from fairseq2.data.audio import AudioDecoder as AudioDecoder
from fairseq2.data.audio import WaveformToFbankConverter as WaveformToFbankConverter
from fairseq2.memory import MemoryBlock as MemoryBlock
from fairseq2.models.conformer import ConformerBlock, ConformerConvolution
from fairseq2.models.wav2vec2.builder import (
    Wav2Vec2Builder,
    Wav2Vec2Config,
    Wav2Vec2EncoderBuilder,
    Wav2Vec2EncoderConfig,
)
from fairseq2.nn import Linear, StandardEmbedding, StandardLayerNorm
from fairseq2.nn.padding import PaddingMask
from fairseq2.nn.transformer import (
    SDPA,
    ShawRelativePositionSDPA,
    StandardFeedForwardNetwork,
    StandardMultiheadAttention,
    TransformerNormOrder,
    create_default_sdpa,
)
from torch import Tensor
from torch.nn import Module

from seamless_w2vbert import packing
from seamless_w2vbert.architecture import Architecture
from seamless_w2vbert.attention import shaw_attention
from seamless_w2vbert.errors import CheckpointError, StackError
from seamless_w2vbert.stack.protocol import (
    CardCheckpoint,
    SpeechEncoder,
    lengths_tensor,
    make_packable,
    replace_shaw,
)

try:
    # Importing it also adds its asset cards to fairseq2's store.
    from seamless_communication.models import conformer_shaw as seamless_conformer_shaw
except ImportError:
    seamless_conformer_shaw = None

NAME: Final = "seamless"


# -- running modules -----------------------------------------------------------------


def _padding_mask(seqs: Tensor, lengths: Tensor) -> PaddingMask | None:
    if bool((lengths == seqs.size(1)).all()):
        return None

    return PaddingMask(lengths.to(seqs.device), batch_seq_len=seqs.size(1))


def _lengths(seqs: Tensor, padding_mask: PaddingMask | None) -> Tensor:
    if padding_mask is None:
        return lengths_tensor([seqs.size(1)] * seqs.size(0))

    return lengths_tensor(padding_mask.seq_lens)


def run_frontend(
    frontend: Module, seqs: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    seqs, padding_mask = frontend(seqs, _padding_mask(seqs, lengths))
    return seqs, _lengths(seqs, padding_mask)


def run_encoder(
    encoder: Module, seqs: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    seqs, padding_mask = encoder(seqs, _padding_mask(seqs, lengths))
    return seqs, _lengths(seqs, padding_mask)


def iter_layers(encoder: Module, seqs: Tensor, lengths: Tensor) -> Iterator[Tensor]:
    padding_mask = _padding_mask(seqs, lengths)

    mask_factory = encoder.self_attn_mask_factory
    if mask_factory is None:
        self_attn_mask = None
    else:
        self_attn_mask = mask_factory(seqs, keys=seqs, training=False)

    for layer in encoder.layers:
        seqs, padding_mask = layer(seqs, padding_mask, self_attn_mask)
        yield seqs


# -- building modules ----------------------------------------------------------------


@dataclass
class ConformerShawEncoderConfig(Wav2Vec2EncoderConfig):
    """The configuration of a Conformer encoder with Shaw relative positions, as
    ``ConformerShawEncoderConfig`` of seamless_communication."""

    max_left_rel_pos: int
    """The left clipping value of relative positions, in frames."""

    max_right_rel_pos: int
    """The right clipping value of relative positions, in frames."""


class ConformerShawEncoderBuilder(Wav2Vec2EncoderBuilder):
    """Builds W2v-BERT 2.0 encoders: fairseq2's Conformer with Shaw relative
    attention and a causal convolution that is layer-normalised, as the builder of
    the same name in seamless_communication."""

    config: ConformerShawEncoderConfig

    def build_sdpa(self) -> SDPA:
        return ShawRelativePositionSDPA(
            self.config.model_dim,
            self.config.num_encoder_attn_heads,
            self.config.max_left_rel_pos,
            max_right_rel_pos=self.config.max_right_rel_pos,
            inner_sdpa=create_default_sdpa(attn_dropout_p=self.config.attn_dropout_p),
            device=self.device,
            dtype=self.dtype,
        )

    def build_conformer_conv(self) -> ConformerConvolution:
        return ConformerConvolution(
            self.config.model_dim,
            self.config.depthwise_conv_kernel_size,
            causal_depthwise_conv=True,
            norm_type="layer_norm",
            device=self.device,
            dtype=self.dtype,
        )


def _base_config(architecture: Architecture) -> Wav2Vec2EncoderConfig:
    return Wav2Vec2EncoderConfig(
        model_dim=architecture.model_dim,
        max_seq_len=4096,
        feature_dim=architecture.feature_dim,
        use_fbank=True,
        first_pass_dropout_p=0.0,
        layer_norm_features=False,
        feature_extractor_layer_descs=[],
        feature_extractor_bias=False,
        feature_extractor_layer_norm_convs=False,
        feature_grad_scale=0.0,
        num_fbank_channels=architecture.num_fbank_channels,
        fbank_stride=architecture.fbank_stride,
        sample_fbank_every_k=1,
        pos_encoder_type="shaw_relative",
        pos_encoder_depth=0,
        pos_conv_kernel_size=0,
        num_pos_conv_groups=0,
        use_conformer=True,
        num_encoder_layers=architecture.num_layers,
        num_encoder_attn_heads=architecture.num_heads,
        ffn_inner_dim=architecture.ffn_inner_dim,
        dropout_p=0.0,
        attn_dropout_p=0.0,
        layer_drop_p=0.0,
        norm_order=TransformerNormOrder.POST,
        depthwise_conv_kernel_size=architecture.depthwise_conv_kernel_size,
    )


def _encoder_builder(architecture: Architecture) -> Wav2Vec2EncoderBuilder:
    base = asdict(_base_config(architecture))
    left, right = architecture.max_left_rel_pos, architecture.max_right_rel_pos
    device = torch.device("meta")

    if seamless_conformer_shaw is None:
        config = ConformerShawEncoderConfig(
            **base, max_left_rel_pos=left, max_right_rel_pos=right
        )
        return ConformerShawEncoderBuilder(config, device=device)

    shaw_config = seamless_conformer_shaw.builder.ShawRelativePositionSDPAConfig(
        max_left_rel_pos=left, max_right_rel_pos=right
    )
    seamless_config = seamless_conformer_shaw.ConformerShawEncoderConfig(
        **base, shaw_rel_pos_sdpa_config=shaw_config
    )
    return seamless_conformer_shaw.ConformerShawEncoderBuilder(
        seamless_config, device=device
    )


def build_model(architecture: Architecture) -> Module:
    builder = _encoder_builder(architecture)
    heads = architecture.pretraining

    if heads is None:
        return SpeechEncoder(builder.build_frontend(), builder.build_encoder())

    # The values that no checkpoint holds are those of Seamless' 600m architecture.
    config = Wav2Vec2Config(
        builder.config,
        final_dim=heads.final_dim,
        final_proj_bias=True,
        temporal_mask_span_len=10,
        max_temporal_mask_prob=0.65,
        spatial_mask_span_len=10,
        max_spatial_mask_prob=0.0,
        quantized_dim=heads.quantized_dim,
        num_codebooks=heads.num_codebooks,
        num_codebook_entries=heads.num_codebook_entries,
        codebook_sampling_temperature=(2.0, 0.1, 0.999995),
        num_distractors=100,
        logit_temp=0.1,
        diversity_loss_weight=0.2,
    )

    if seamless_conformer_shaw is not None:
        loader = seamless_conformer_shaw.load_conformer_shaw_model
        return loader.model_factory(config, device=builder.device, dtype=None)

    return Wav2Vec2Builder(config, builder, device=builder.device).build_model()


# -- attention -----------------------------------------------------------------------


class LinearShawSDPA(SDPA):
    """fairseq2's ``ShawRelativePositionSDPA`` in linear memory."""

    def __init__(self, stock: ShawRelativePositionSDPA) -> None:
        super().__init__()
        self.rel_k_embed = stock.rel_k_embed
        self.max_left_rel_pos = stock.max_left_rel_pos
        self.max_left = stock.max_left_rel_pos
        self.max_right_rel_pos = stock.max_right_rel_pos
        # In a tuple, so that its parameters do not count twice.
        self._stock = (stock,)

    def train(self, mode: bool = True) -> LinearShawSDPA:
        self._stock[0].train(mode)
        return super().train(mode)

    def forward(
        self,
        seqs: Tensor,
        keys: Tensor,
        key_padding_mask: PaddingMask | None,
        values: Tensor,
        *,
        attn_mask: Any = None,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        (stock,) = self._stock
        dropout = getattr(stock.inner_sdpa, "attn_dropout_p", 0.0)

        if (
            needs_weights
            or attn_mask is not None
            or seqs.size(2) != keys.size(2)
            or (self.training and dropout > 0.0)
        ):
            return stock(
                seqs,
                keys,
                key_padding_mask,
                values,
                attn_mask=attn_mask,
                needs_weights=needs_weights,
            )

        attended = shaw_attention(
            seqs,
            keys,
            values,
            self.rel_k_embed.weight,
            self.max_left,
            None if key_padding_mask is None else key_padding_mask.materialize(),
        )

        return attended, None


def swap_shaw_attention(model: Module) -> int:
    return replace_shaw(model, ShawRelativePositionSDPA, LinearShawSDPA)


class PackableBlock(ConformerBlock):  # type: ignore[misc]  # it is final
    """fairseq2's ``ConformerBlock``, run in its form for inference where it can be."""

    def forward(
        self,
        seqs: Tensor,
        padding_mask: PaddingMask | None,
        self_attn_mask: Any = None,
    ) -> tuple[Tensor, PaddingMask | None]:
        packed = None

        if self_attn_mask is None and _is_plain(self):
            packed = packing.packed(self, seqs, _PARTS)

        if packed is None:
            return super().forward(seqs, padding_mask, self_attn_mask)

        keep = None if padding_mask is None else padding_mask.materialize()

        return packed(seqs, keep), padding_mask


def _is_plain(block: Any) -> bool:
    """Tell whether a block has nothing that its parts do not show."""
    attention = block.self_attn

    return (
        isinstance(attention, StandardMultiheadAttention)
        and not attention._attn_weight_hooks
        and attention.num_key_value_heads == attention.num_heads
        and attention.attn_mask_factory is None
    )


_PARTS = packing.parts(
    block=PackableBlock,
    layer_norm=StandardLayerNorm,
    feed_forward=StandardFeedForwardNetwork,
    attention=StandardMultiheadAttention,
    sdpa=LinearShawSDPA,
    embedding=StandardEmbedding,
    convolution=ConformerConvolution,
    linear=(Linear,),
)


def pack_blocks(model: Module) -> None:
    make_packable(model, ConformerBlock, PackableBlock)


# -- fairseq2's registries -----------------------------------------------------------


def load_with_seamless(name: str, device: torch.device, dtype: torch.dtype) -> Module:
    if seamless_conformer_shaw is None:
        raise StackError(
            "seamless_communication cannot be imported here; its project page says how "
            "to install it."
        )

    card: Any = name

    if Path(name).exists():
        card = AssetCard(
            {
                "name": Path(name).name,
                "model_type": "wav2vec2",
                "model_arch": "conformer_shaw_600m",
                "checkpoint": Path(name).resolve().as_uri(),
            }
        )

    try:
        return seamless_conformer_shaw.load_conformer_shaw_model(
            card, device=device, dtype=dtype
        )
    except Exception as ex:
        raise CheckpointError(
            f"{name}: seamless_communication cannot load it: {ex}"
        ) from None


def find_card(card: object) -> CardCheckpoint | None:
    if isinstance(card, str):
        try:
            card = asset_store.retrieve_card(card)
        except (AssetNotFoundError, ValueError):
            return None

    if not isinstance(card, AssetCard):
        return None

    uri = card.field("checkpoint").as_uri()
    path = download_manager.download_checkpoint(uri, card.name)

    return CardCheckpoint(card.name, Path(path))
