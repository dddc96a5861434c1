"""fairseq2 0.8: today's generation, where padding is a ``BatchLayout``.

Offers what :class:`stack.protocol.Stack` asks for, and registers ``conformer_shaw``
with fairseq2 as a model family, so that fairseq2's own hub and commands know it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast

import torch
from fairseq2.assets import AssetCard, AssetDownloadManager, get_asset_store
from fairseq2.composition import register_model_family, register_package_assets
from fairseq2.data.audio import AudioDecoder as AudioDecoder
from fairseq2.data.audio import WaveformToFbankConverter as WaveformToFbankConverter
from fairseq2.data.data_pipeline import Collater as Collater
from fairseq2.data.data_pipeline import DataPipeline as DataPipeline
from fairseq2.data.data_pipeline import MemoryBlock as MemoryBlock  # type: ignore[attr-defined]
from fairseq2.models import ModelHubAccessor
from fairseq2.models.conformer import ConformerBlock, ConformerConvolution
from fairseq2.models.transformer import (
    SDPA,
    AttentionBiasCache,
    IdentityBias,
    MultiheadAttention,
    RelativePositionalEncoding,
    ShawRelativePositionSDPA,
    StandardFeedForwardNetwork,
    StandardMultiheadAttention,
)
from fairseq2.models.wav2vec2 import (
    Wav2Vec2Config,
    Wav2Vec2EncoderConfig,
    Wav2Vec2EncoderFactory,
    Wav2Vec2Factory,
    Wav2Vec2Model,
)
from fairseq2.nn import (
    BatchLayout,
    ColumnShardedLinear,
    Linear,
    RowShardedLinear,
    StandardEmbedding,
    StandardLayerNorm,
    init_bert_projection,
)
from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer, get_dependency_resolver
from fairseq2.runtime.lazy import Lazy
from torch import Tensor
from torch.nn import Module, ModuleList

from seamless_w2vbert import packing
from seamless_w2vbert.architecture import TINY, Architecture, PretrainingHeads
from seamless_w2vbert.attention import shaw_attention
from seamless_w2vbert.checkpoints.names import to_fairseq2_names
from seamless_w2vbert.errors import StackError
from seamless_w2vbert.stack.protocol import (
    CardCheckpoint,
    SpeechEncoder,
    lengths_tensor,
    make_packable,
    replace_shaw,
)

NAME: Final = "current"

CONFORMER_SHAW_FAMILY: Final = "conformer_shaw"


# -- running modules -----------------------------------------------------------------


def _layout(seqs: Tensor, lengths: Tensor) -> BatchLayout:
    return BatchLayout.of(seqs, lengths.tolist())


def run_frontend(
    frontend: Module, seqs: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    seqs, layout = frontend(seqs, _layout(seqs, lengths))
    return seqs, lengths_tensor(list(layout.seq_lens))


def run_encoder(
    encoder: Module, seqs: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    output = encoder(seqs, _layout(seqs, lengths))

    # An encoder that shortens its input has to say by how much; fairseq2's own
    # encoders keep the length and return the sequences alone.
    if isinstance(output, tuple):
        seqs, layout = output
        return seqs, lengths_tensor(list(layout.seq_lens))

    return output, lengths


def iter_layers(encoder: Module, seqs: Tensor, lengths: Tensor) -> Iterator[Tensor]:
    layout = _layout(seqs, lengths)
    bias_cache = AttentionBiasCache()

    for layer in cast(ModuleList, encoder.layers):
        seqs = layer(seqs, layout, bias_cache)
        yield seqs


# -- building modules ----------------------------------------------------------------


@dataclass(kw_only=True)
class ConformerShawEncoderConfig(Wav2Vec2EncoderConfig):
    """The configuration of a Conformer encoder with Shaw relative positions, as
    ``ConformerShawEncoderConfig`` of seamless_communication."""

    max_left_rel_pos: int = 64
    """The left clipping value of relative positions, in frames."""

    max_right_rel_pos: int = 8
    """The right clipping value of relative positions, in frames."""


@dataclass(kw_only=True)
class ConformerShawConfig(Wav2Vec2Config):
    """The configuration of W2v-BERT 2.0 with its pretraining heads, as
    ``conformer_shaw_600m`` of seamless_communication."""

    encoder_config: ConformerShawEncoderConfig = field(
        default_factory=lambda: _encoder_config(Architecture())
    )
    final_dim: int = 768
    max_temporal_mask_prob: float = 0.65
    quantized_dim: int = 768
    codebook_sampling_temperature: tuple[float, float, float] = (2.0, 0.1, 0.999995)


def _encoder_config(architecture: Architecture) -> ConformerShawEncoderConfig:
    return ConformerShawEncoderConfig(
        model_dim=architecture.model_dim,
        feature_dim=architecture.feature_dim,
        use_fbank=True,
        layer_norm_features=False,
        feature_extractor_layer_descs=[],
        num_fbank_channels=architecture.num_fbank_channels,
        fbank_stride=architecture.fbank_stride,
        sample_fbank_every_k=1,
        pos_encoder_type="shaw_relative",
        use_conformer=True,
        num_encoder_layers=architecture.num_layers,
        num_encoder_attn_heads=architecture.num_heads,
        ffn_inner_dim=architecture.ffn_inner_dim,
        dropout_p=0.0,
        attn_dropout_p=0.0,
        layer_drop_p=0.0,
        depthwise_conv_kernel_size=architecture.depthwise_conv_kernel_size,
        max_left_rel_pos=architecture.max_left_rel_pos,
        max_right_rel_pos=architecture.max_right_rel_pos,
    )


def _model_config(architecture: Architecture) -> ConformerShawConfig:
    heads = architecture.pretraining or PretrainingHeads()

    return ConformerShawConfig(
        encoder_config=_encoder_config(architecture),
        final_dim=heads.final_dim,
        quantized_dim=heads.quantized_dim,
        num_codebooks=heads.num_codebooks,
        num_codebook_entries=heads.num_codebook_entries,
    )


class ConformerShawEncoderFactory(Wav2Vec2EncoderFactory):
    """Creates W2v-BERT 2.0 encoders: fairseq2's Conformer with Shaw relative
    attention and a causal convolution that is layer-normalised, as
    ``ConformerShawEncoderBuilder`` of seamless_communication."""

    _config: ConformerShawEncoderConfig

    def create_self_attention(
        self, lazy_rel_pos_encoding: Lazy[RelativePositionalEncoding]
    ) -> MultiheadAttention:
        config = self._config

        sdpa = ShawRelativePositionSDPA(
            config.model_dim,
            config.num_encoder_attn_heads,
            IdentityBias(),
            config.max_left_rel_pos,
            max_rhs_rel_pos=config.max_right_rel_pos,
        )

        return StandardMultiheadAttention(
            config.model_dim,
            config.num_encoder_attn_heads,
            sdpa,
            qkv_proj_init_fn=init_bert_projection,
            output_proj_init_fn=init_bert_projection,
        )

    def create_conformer_conv(self) -> ConformerConvolution:
        config = self._config

        return ConformerConvolution(
            config.model_dim,
            config.depthwise_conv_kernel_size,
            causal_depthwise_conv=True,
            norm_type="layer_norm",
        )


class ConformerShawFactory(Wav2Vec2Factory):
    """Creates W2v-BERT 2.0 models with their pretraining heads."""

    def create_encoder_frontend(self) -> Any:
        return self._encoder_factory().create_encoder_frontend()

    def create_encoder(self) -> Any:
        return self._encoder_factory().create_encoder()

    def _encoder_factory(self) -> ConformerShawEncoderFactory:
        return ConformerShawEncoderFactory(self._config.encoder_config)


def create_conformer_shaw_model(config: ConformerShawConfig) -> Wav2Vec2Model:
    """Create a W2v-BERT 2.0 model with its pretraining heads, on the default device
    and in the default dtype, as fairseq2's model families do."""
    return ConformerShawFactory(config).create_model()


def build_model(architecture: Architecture) -> Module:
    with torch.device("meta"):
        if architecture.pretraining is not None:
            return create_conformer_shaw_model(_model_config(architecture))

        factory = ConformerShawEncoderFactory(_encoder_config(architecture))

        return SpeechEncoder(
            factory.create_encoder_frontend(), factory.create_encoder()
        )


# -- attention -----------------------------------------------------------------------


class LinearShawSDPA(SDPA):
    """fairseq2's ``ShawRelativePositionSDPA`` in linear memory."""

    def __init__(self, stock: ShawRelativePositionSDPA) -> None:
        super().__init__()
        self.rel_k_embed = stock.rel_k_embed
        self.max_lhs_rel_pos = stock.max_lhs_rel_pos
        self.max_left = stock.max_lhs_rel_pos
        self.max_rhs_rel_pos = stock.max_rhs_rel_pos
        # In a tuple, so that its parameters do not count twice.
        self._stock = (stock,)

    @property
    def is_plain(self) -> bool:
        """Whether all keys but padding are attended to."""
        return isinstance(self._stock[0].bias, IdentityBias)

    def train(self, mode: bool = True) -> LinearShawSDPA:
        self._stock[0].train(mode)
        return super().train(mode)

    def forward(
        self,
        q: Tensor,
        q_layout: BatchLayout,
        k: Tensor,
        k_layout: BatchLayout,
        v: Tensor,
        bias_cache: AttentionBiasCache,
        *,
        needs_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        (stock,) = self._stock

        if (
            needs_weights
            or q_layout.packed
            or q.size(1) != k.size(1)
            or not self.is_plain
        ):
            return stock(
                q, q_layout, k, k_layout, v, bias_cache, needs_weights=needs_weights
            )

        attended = shaw_attention(
            # (N, S, H, K) -> (N, H, S, K)
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            self.rel_k_embed.weight,
            self.max_left,
            k_layout.position_indices >= 0 if k_layout.padded else None,
        )

        return attended.transpose(1, 2), None


def swap_shaw_attention(model: Module) -> int:
    return replace_shaw(model, ShawRelativePositionSDPA, LinearShawSDPA)


class PackableBlock(ConformerBlock):  # type: ignore[misc]  # it is final
    """fairseq2's ``ConformerBlock``, run in its form for inference where it can be."""

    def forward(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        attn_bias_cache: AttentionBiasCache,
    ) -> Tensor:
        packed = None

        if not seqs_layout.packed and _is_plain(self):
            packed = packing.packed(self, seqs, _PARTS)

        if packed is None:
            return super().forward(seqs, seqs_layout, attn_bias_cache)

        return packed(
            seqs, seqs_layout.position_indices >= 0 if seqs_layout.padded else None
        )


def _is_plain(block: Any) -> bool:
    """Tell whether a block has nothing that its parts do not show."""
    attention = block.self_attn

    return (
        isinstance(attention, StandardMultiheadAttention)
        and not attention._attn_weight_hooks
        and attention.num_query_groups == 1
        and isinstance(attention.sdpa, LinearShawSDPA)
        and attention.sdpa.is_plain
        and not any(
            vars(part).get("sharded") or vars(part).get("cast_fp32")
            for part in block.modules()
        )
    )


_PARTS = packing.parts(
    block=PackableBlock,
    layer_norm=StandardLayerNorm,
    feed_forward=StandardFeedForwardNetwork,
    attention=StandardMultiheadAttention,
    sdpa=LinearShawSDPA,
    embedding=StandardEmbedding,
    convolution=ConformerConvolution,
    linear=(Linear, ColumnShardedLinear, RowShardedLinear),
)


def pack_blocks(model: Module) -> None:
    make_packable(model, ConformerBlock, PackableBlock)


# -- fairseq2's registries -----------------------------------------------------------


def convert_conformer_shaw_state_dict(
    state_dict: dict[str, object], config: ConformerShawConfig
) -> dict[str, object]:
    """Rename a fairseq or Transformers state dict to fairseq2's names."""
    model = cast(dict[str, object], state_dict.get("model", state_dict))
    renamed = to_fairseq2_names(model)

    # fairseq keeps no count of the quantizer's updates; Seamless sets it to zero.
    renamed.setdefault("quantizer.num_updates", torch.zeros((), dtype=torch.int64))

    return renamed


def register_extension(container: DependencyContainer) -> None:
    """Register the ``conformer_shaw`` family, its architectures and its card; the
    ``fairseq2.extension`` entry point of this package."""
    register_model_family(
        container,
        CONFORMER_SHAW_FAMILY,
        kls=Wav2Vec2Model,
        config_kls=ConformerShawConfig,
        factory=create_conformer_shaw_model,
        state_dict_converter=convert_conformer_shaw_state_dict,
    )

    arch = ConfigRegistrar(container, ConformerShawConfig)

    @arch("600m")
    def _600m() -> ConformerShawConfig:
        return _model_config(Architecture())

    @arch("tiny")
    def _tiny() -> ConformerShawConfig:
        return _model_config(TINY)

    register_package_assets(container, "seamless_w2vbert.stack.cards")


get_conformer_shaw_model_hub = ModelHubAccessor(
    CONFORMER_SHAW_FAMILY, Wav2Vec2Model, ConformerShawConfig
)
"""Returns the hub of the family: fairseq2's own way to its configurations and
checkpoints."""


def load_with_seamless(name: str, device: torch.device, dtype: torch.dtype) -> Module:
    raise StackError(
        "seamless_communication runs on fairseq2 0.2 alone; install it in an "
        "environment of its own, with `pip install '.[seamless]'` "
        "and as its project page says."
    )


def find_card(card: object) -> CardCheckpoint | None:
    if isinstance(card, str):
        found = get_asset_store().maybe_retrieve_card(card)
        if found is None:
            return None
        card = found

    if not isinstance(card, AssetCard):
        return None

    resolver = get_dependency_resolver()
    manager = resolver.resolve(AssetDownloadManager)  # type: ignore[type-abstract]
    path = manager.download_model(card.field("checkpoint").as_uri())

    sub_path = card.maybe_get_field("checkpoint_path")
    if sub_path is not None:
        path = path / sub_path.as_(str)

    return CardCheckpoint(card.name, Path(path))
