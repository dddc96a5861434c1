"""CTranslate2's ``Wav2Vec2Bert`` with the same weights, as fairly as it can be had.

Comes in: Transformers' model. Goes out: a folder in CTranslate2's format, and the side
that runs it. CTranslate2 wants an adapter behind the encoder; it gets the smallest that
hands every second frame through unchanged, so that outputs can still be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seamless_w2vbert.benchmarking.sides import MissingSideError, Settings

NOTE = (
    "CTranslate2 cannot run the encoder without an adapter behind it; it has the least "
    "one it takes (convolutions of width 1, attention at half the frames, no "
    "feed-forward to speak of), which hands every second frame through unchanged: "
    "under 1 % of the multiply-adds of 24 layers, and included in its time. It takes "
    "no padding mask. int8: weights quantised by it on loading."
)

_WIDTH = 1024
_FIXED = {"model_dim": _WIDTH, "num_heads": 16, "kernel_size": 31}
"""What its Wav2Vec2Bert has fixed in its code."""

_ADAPTER_INNER = 64
_OPEN_GATE = 30.0
"""The sigmoid of it is 1 in float32."""


def check_sizes(sizes: Mapping[str, int]) -> None:
    """
    :raises MissingSideError: if CTranslate2 computes with other sizes than these.
    """
    for name, value in _FIXED.items():
        if sizes[name] != value:
            raise MissingSideError(
                f"its Wav2Vec2Bert has {name} {value} fixed, and this model has "
                f"{sizes[name]}"
            )


def convert(model: Any, folder: str) -> None:
    """Write ``model``, a ``Wav2Vec2BertModel``, with CTranslate2's own converter. The
    model is used up: its last normalisation moves into the adapter.

    """
    import torch
    from ctranslate2.converters import TransformersConverter

    with torch.no_grad():
        model.adapter = _handing_through(model)

    model.config = model.adapter.config
    # The encoder's output instead of a CTC head's.
    model.config.return_hidden = True
    model.config.save_pretrained(folder)

    class Converter(TransformersConverter):  # type: ignore[misc]
        """Takes the model from memory instead of a folder of another 2.4 GB."""

        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            head = SimpleNamespace(weight=torch.empty(1, _WIDTH))
            return SimpleNamespace(wav2vec2_bert=model, lm_head=head)

        def load_tokenizer(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(get_vocab=lambda: {"<unk>": 0})

    Converter(folder).convert(_converted(folder), force=True)


def _handing_through(model: Any) -> Any:
    """Make an adapter whose output is its input's frames 1, 3, 5 ...

    The adapter normalises what it gets. So the last block's normalisation becomes the
    plain one, on which a second one has no effect, and its scale and shift move into
    the adapter's. Behind it: a convolution of width 1 that is the identity, an open
    gate, and an attention and a feed-forward network that add zero.
    """
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import (
        Wav2Vec2BertAdapter,
    )

    make_adapter: Any = Wav2Vec2BertAdapter
    config = copy.deepcopy(model.config)
    config.add_adapter = True
    config.num_adapter_layers = 1
    config.adapter_kernel_size = 1
    config.adapter_stride = 2
    config.intermediate_size = _ADAPTER_INNER
    config.output_hidden_size = _WIDTH

    adapter: Any = make_adapter(config).eval()
    adapter.config = config
    (layer,) = adapter.layers
    last = model.encoder.layers[-1].final_layer_norm

    for parameter in adapter.parameters():
        parameter.zero_()

    layer.residual_layer_norm.weight.copy_(last.weight)
    layer.residual_layer_norm.bias.copy_(last.bias)
    last.weight.fill_(1)
    last.bias.zero_()

    layer.residual_conv.weight[range(_WIDTH), range(_WIDTH), 0] = 1
    layer.residual_conv.bias[_WIDTH:] = _OPEN_GATE

    return adapter


def _converted(folder: str) -> str:
    return str(Path(folder) / "ctranslate2")


class CTranslate2Runner:
    """Runs what :func:`convert` has left."""

    frames = slice(1, None, 2)

    def __init__(self, settings: Settings) -> None:
        import ctranslate2

        device, _, index = settings.device.partition(":")
        supported = ctranslate2.get_supported_compute_types(device)
        if settings.dtype not in supported:
            raise MissingSideError(
                f"it has no {settings.dtype} here, only {', '.join(sorted(supported))}"
            )

        self._ctranslate2 = ctranslate2
        self._model = ctranslate2.models.Wav2Vec2Bert(
            _converted(settings.folder),
            device=device,
            device_index=int(index or 0),
            compute_type=settings.dtype,
            intra_threads=settings.threads,
        )

    def prepare(self, fbanks: NDArray[np.float32]) -> Any:
        n, frames, bins = fbanks.shape
        # (N, frames, 80) -> (N, frames // 2, 160)
        stacked = fbanks[:, : frames - frames % 2].reshape(n, frames // 2, 2 * bins)
        return self._ctranslate2.StorageView.from_array(np.ascontiguousarray(stacked))

    def run(self, prepared: Any, layer: int | None) -> Any:
        return self._model.encode(prepared, to_cpu=True)

    def output(self, result: Any) -> NDArray[np.float32]:
        array = np.array(result.to(self._ctranslate2.DataType.float32))
        # Its convolutions pad: the first frame is of padding, the last may be.
        return array[:, 1:]
