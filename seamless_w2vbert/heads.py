"""What fine-tuning with Transformers puts on the encoder: adapters and the CTC head.

Comes in: the tensors of a Transformers folder that are no part of the encoder. Goes
out: modules with the same parameter names, on top of fairseq2's encoder. They are the
counterparts of Transformers' ``Wav2Vec2BertAdapter`` and ``Wav2Vec2BertForCTC``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Conv1d, LayerNorm, Linear, Module, ModuleList
from torch.nn.functional import glu, scaled_dot_product_attention

from seamless_w2vbert.errors import ArgumentError, CheckpointError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "swish": torch.nn.functional.silu,
    "selu": torch.nn.functional.selu,
}


_TOKENIZER_FILES = ("vocab.json", "tokenizer.json", "tokenizer.model")


class FeedForward(Module):
    """``Wav2Vec2BertFeedForward`` without dropout."""

    def __init__(self, model_dim: int, inner_dim: int, activation: str) -> None:
        super().__init__()
        self.intermediate_dense = Linear(model_dim, inner_dim)
        self.output_dense = Linear(inner_dim, model_dim)
        self.activation = activation

    def forward(self, seqs: Tensor) -> Tensor:
        inner = _ACTIVATIONS[self.activation](self.intermediate_dense(seqs))
        output: Tensor = self.output_dense(inner)
        return output


class SelfAttention(Module):
    """``Wav2Vec2BertSelfAttention`` as adapters use it: without positions."""

    def __init__(self, model_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear_q = Linear(model_dim, model_dim)
        self.linear_k = Linear(model_dim, model_dim)
        self.linear_v = Linear(model_dim, model_dim)
        self.linear_out = Linear(model_dim, model_dim)

    def forward(self, seqs: Tensor) -> Tensor:
        # (N, S, M) -> (N, H, S, M // H)
        q, k, v = (
            linear(seqs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.linear_q, self.linear_k, self.linear_v)
        )
        attended = scaled_dot_product_attention(q, k, v)
        # (N, H, S, M // H) -> (N, S, M)
        output: Tensor = self.linear_out(attended.transpose(1, 2).flatten(-2))
        return output


class AdapterLayer(Module):
    """``Wav2Vec2BertAdapterLayer`` without dropout: a Transformer layer that shortens
    its input by a strided convolution."""

    def __init__(self, model_dim: int, settings: AdapterSettings) -> None:
        super().__init__()
        kernel, stride = settings.kernel_size, settings.stride

        def convolution() -> Conv1d:
            return Conv1d(
                model_dim, 2 * model_dim, kernel, stride=stride, padding=stride // 2
            )

        self.residual_layer_norm = LayerNorm(model_dim)
        self.residual_conv = convolution()
        self.self_attn_layer_norm = LayerNorm(model_dim)
        self.self_attn_conv = convolution()
        self.self_attn = SelfAttention(model_dim, settings.num_heads)
        self.ffn_layer_norm = LayerNorm(model_dim)
        self.ffn = FeedForward(model_dim, settings.ffn_inner_dim, settings.activation)

    def forward(self, seqs: Tensor) -> Tensor:
        residual = _convolve(self.residual_conv, self.residual_layer_norm(seqs))
        seqs = _convolve(self.self_attn_conv, self.self_attn_layer_norm(seqs))
        seqs = self.self_attn(seqs) + residual
        output: Tensor = self.ffn(self.ffn_layer_norm(seqs)) + seqs
        return output


def _convolve(convolution: Conv1d, seqs: Tensor) -> Tensor:
    # (N, S, M) -> (N, 2 * M, S // stride) -> (N, S // stride, M)
    return glu(convolution(seqs.transpose(1, 2)), dim=1).transpose(1, 2)


class AdapterSettings:
    """The numbers of an adapter that its shapes do not tell."""

    def __init__(self, config: Mapping[str, Any], path: Path) -> None:
        try:
            self.kernel_size = int(config.get("adapter_kernel_size", 3))
            self.stride = int(config.get("adapter_stride", 2))
            self.num_heads = int(config["num_attention_heads"])
            self.ffn_inner_dim = int(config["intermediate_size"])
            self.activation = str(config.get("adapter_act", "relu"))
        except (KeyError, TypeError, ValueError) as ex:
            raise CheckpointError(
                f"{path}: config.json does not describe the adapter: {ex!r}."
            ) from None

        if self.activation not in _ACTIVATIONS:
            raise CheckpointError(
                f"{path}: config.json sets adapter_act to {self.activation!r}; "
                f"supported are {', '.join(_ACTIVATIONS)}."
            )

        if self.kernel_size < 1 or self.stride < 1 or self.num_heads < 1:
            raise CheckpointError(
                f"{path}: config.json sets sizes of the adapter that are not positive."
            )


class Adapter(Module):
    """``Wav2Vec2BertAdapter``: a projection, where widths differ, and its layers."""

    proj: Linear | None
    proj_layer_norm: LayerNorm | None

    def __init__(
        self,
        model_dim: int,
        output_dim: int,
        num_layers: int,
        settings: AdapterSettings,
    ) -> None:
        super().__init__()

        if output_dim != model_dim:
            self.proj = Linear(model_dim, output_dim)
            self.proj_layer_norm = LayerNorm(output_dim)
        else:
            self.proj = self.proj_layer_norm = None

        self.layers = ModuleList(
            AdapterLayer(output_dim, settings) for _ in range(num_layers)
        )

    def forward(self, seqs: Tensor) -> Tensor:
        if self.proj is not None and self.proj_layer_norm is not None:
            seqs = self.proj_layer_norm(self.proj(seqs))

        for layer in self.layers:
            seqs = layer(seqs)

        return seqs


class AdaptedEncoder(Module):
    """An encoder and what Transformers applies to its output. It takes sequences
    without padding, which :func:`encoder.run_encoder` sees to."""

    def __init__(
        self,
        inner: Module,
        adapter: Module | None,
        intermediate_ffn: Module | None,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.adapter = adapter
        self.intermediate_ffn = intermediate_ffn

    def forward(self, seqs: Tensor, padding: Any) -> Any:
        output = self.inner(seqs, padding)
        # fairseq2 0.2 returns the padding mask as well.
        seqs = output[0] if isinstance(output, tuple) else output

        if self.intermediate_ffn is not None:
            seqs = seqs + 0.5 * self.intermediate_ffn(seqs)

        if self.adapter is not None:
            seqs = self.adapter(seqs)

        return (seqs, None) if isinstance(output, tuple) else seqs


class CTCHead(Module):
    """The head of ``Wav2Vec2BertForCTC``, and its tokenizer if the folder has one."""

    def __init__(self, output_dim: int, vocab_size: int, folder: Path) -> None:
        super().__init__()
        self.lm_head = Linear(output_dim, vocab_size)
        self.folder = folder

    def forward(self, seqs: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(seqs)
        return logits

    def decode(self, ids: list[list[int]]) -> list[str]:
        """Turn the most likely token of each frame into text, as Transformers'
        ``Wav2Vec2CTCTokenizer`` does: repeats and blanks fall away.

        :raises ArgumentError: if the folder has no tokenizer, or Transformers is not
            installed.
        """
        if not any((self.folder / name).is_file() for name in _TOKENIZER_FILES):
            raise ArgumentError(
                f"{self.folder}: has no tokenizer ({' or '.join(_TOKENIZER_FILES)}); "
                "its logits are there, but no text can be made of them."
            )

        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ArgumentError(
                "Decoding to text takes Transformers' tokenizers: "
                "`pip install '.[transformers]'`."
            ) from None

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)  # type: ignore[no-untyped-call]
        except (OSError, ValueError, KeyError, TypeError, ImportError) as ex:
            raise ArgumentError(
                f"{self.folder}: Transformers cannot load its tokenizer: {ex}"
            ) from None

        texts: list[str] = tokenizer.batch_decode(ids)

        return texts


def attach(
    model: Module,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    path: Path,
) -> dict[str, Tensor]:
    """Put an adapter and a CTC head on a model where ``tensors`` has them.

    :param model: with ``encoder``; its encoder is wrapped, and it gets a ``ctc_head``.
        What is added is on the meta device.
    :param tensors: what is left of a Transformers checkpoint, by its own names.
    :returns: the tensors of what was added, by their names in the model.
    :raises CheckpointError: if the tensors do not add up.
    """
    frontend: Any = model.encoder_frontend
    model_dim = int(frontend.model_dim_proj.weight.size(0))
    added: dict[str, Tensor] = {}

    def take(prefix: str, target: str) -> dict[str, Tensor]:
        found = {n: t for n, t in tensors.items() if n.startswith(prefix + ".")}
        added.update({target + n: t for n, t in found.items()})
        return found

    adapter_tensors = take("adapter", "encoder.")
    ffn_tensors = take("intermediate_ffn", "encoder.")
    head_tensors = take("lm_head", "ctc_head.")
    output_dim = model_dim

    with torch.device("meta"):
        adapter: Adapter | None = None
        intermediate: FeedForward | None = None

        if adapter_tensors:
            norm = adapter_tensors.get("adapter.layers.0.residual_layer_norm.weight")
            if norm is None or norm.ndim != 1 or norm.numel() == 0:
                raise CheckpointError(
                    f"{path}: adapter.layers.0.residual_layer_norm.weight is missing "
                    "or of another shape."
                )
            output_dim = norm.numel()
            settings = AdapterSettings(config, path)
            if output_dim % settings.num_heads != 0:
                raise CheckpointError(
                    f"{path}: an adapter of width {output_dim} cannot have "
                    f"{settings.num_heads} heads."
                )
            numbers = {n.split(".")[2] for n in adapter_tensors if ".layers." in n}
            adapter = Adapter(model_dim, output_dim, len(numbers), settings)

        if ffn_tensors:
            inner = ffn_tensors.get("intermediate_ffn.intermediate_dense.bias")
            if inner is None or inner.ndim != 1:
                raise CheckpointError(
                    f"{path}: intermediate_ffn.intermediate_dense.bias is missing."
                )
            # Transformers always gives this one ReLU.
            intermediate = FeedForward(model_dim, inner.numel(), "relu")

        if adapter is not None or intermediate is not None:
            wrapped = AdaptedEncoder(model.encoder, adapter, intermediate)  # type: ignore[arg-type]
            model.encoder = wrapped

        if head_tensors:
            bias = head_tensors.get("lm_head.bias")
            if bias is None or bias.ndim != 1:
                raise CheckpointError(f"{path}: lm_head.bias is missing.")
            model.ctc_head = CTCHead(output_dim, bias.numel(), path)

    return added
