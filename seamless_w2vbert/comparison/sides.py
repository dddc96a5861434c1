"""What is compared: an implementation that runs stage by stage, or stored embeddings.

Comes in: a model, a Transformers model, a file of arrays. Goes out: a :class:`Side`
with one method per stage, so that each can be fed with its own input or the other's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import soundfile
import soxr
import torch
from torch import Tensor

from seamless_w2vbert import encoder, stack
from seamless_w2vbert.audio import Waveform
from seamless_w2vbert.batch import FbankBatch, HiddenBatch
from seamless_w2vbert.checkpoints.names import transformers_name
from seamless_w2vbert.constants import (
    FBANK_STRIDE,
    NUM_MEL_BINS,
    PAD_VALUE,
    SAMPLING_RATE,
)
from seamless_w2vbert.dumping.reader import Dump, open_dump
from seamless_w2vbert.errors import ArgumentError, AudioError, CheckpointError
from seamless_w2vbert.model import has_half_layer_norm, use_float32_layer_norm
from seamless_w2vbert.pipeline import SpeechEncoderPipeline


class Side(Protocol):
    """One implementation. Tensors are of a single file, without padding."""

    name: str
    """What the report calls it."""

    num_layers: int

    def waveform(self, path: str) -> Tensor:
        """Decode to (samples,), mono at 16 kHz."""

    def fbank(self, samples: Tensor, file: str) -> Tensor:
        """(samples,) -> (frames, 80); ``file`` is for messages."""

    def pad(self, fbanks: list[Tensor]) -> Tensor:
        """[(frames, 80)] -> (N, S, 80), padding included."""

    def frontend(self, fbank: Tensor) -> Tensor:
        """(frames, 80) -> (frames // 2, model_dim)"""

    def layer(self, number: int, hidden: Tensor) -> Tensor:
        """The input of one block to its output, (frames, model_dim) both."""

    def final(self, hidden: Tensor) -> Tensor:
        """The last block's output to the encoder's."""

    def hidden_states(self, fbank: Tensor) -> tuple[list[Tensor], Tensor]:
        """Every hidden state from 0 on, and the encoder's output, in one run."""


class PackageSide:
    """This package, or seamless_communication's model run by this package."""

    def __init__(self, pipeline: SpeechEncoderPipeline, name: str) -> None:
        self.name = name
        self.pipeline = pipeline
        self.num_layers = pipeline.num_layers
        self.dtype = pipeline.dtype
        self._encoder: Any = encoder.encoder_of(pipeline.module)

    def waveform(self, path: str) -> Tensor:
        return self.pipeline.decode(path).samples

    def fbank(self, samples: Tensor, file: str) -> Tensor:
        return self.pipeline.fbank(Waveform(samples, source=file))

    def pad(self, fbanks: list[Tensor]) -> Tensor:
        return self.pipeline.pad(fbanks).seqs

    def frontend(self, fbank: Tensor) -> Tensor:
        return self._hidden(fbank).seqs[0]

    def _hidden(self, fbank: Tensor) -> HiddenBatch:
        batch = FbankBatch(fbank.unsqueeze(0), torch.tensor([len(fbank)]))
        return self.pipeline.encoder_frontend(batch)

    @torch.inference_mode()
    def layer(self, number: int, hidden: Tensor) -> Tensor:
        layered = getattr(self._encoder, "inner", self._encoder)
        alone = SimpleNamespace(
            layers=[layered.layers[number - 1]],
            self_attn_mask_factory=getattr(layered, "self_attn_mask_factory", None),
        )
        lengths = torch.tensor([len(hidden)])
        seqs = hidden.to(self.pipeline.device, self.dtype).unsqueeze(0)
        (output,) = stack.load().iter_layers(cast(Any, alone), seqs, lengths)
        return output[0]

    @torch.inference_mode()
    def final(self, hidden: Tensor) -> Tensor:
        # Only an adaptor stands behind the last block, and it cannot be run alone.
        norm = getattr(self._encoder, "layer_norm", None)
        if norm is None or hasattr(self._encoder, "inner"):
            return hidden
        return cast(Tensor, norm(hidden.to(self.pipeline.device, self.dtype)))

    def hidden_states(self, fbank: Tensor) -> tuple[list[Tensor], Tensor]:
        output = self.pipeline.encoder(
            self._hidden(fbank), layers=range(self.num_layers + 1)
        )
        states = [output.hidden_states[n][0] for n in range(self.num_layers + 1)]
        final = states[-1] if output.final is None else output.final[0][0]
        return states, final


class TransformersSide:
    """Transformers' ``Wav2Vec2BertModel`` and feature extractor.

    Transformers does not decode files; soundfile, the mean of the channels and soxr
    stand in, as its users write it.
    """

    def __init__(self, model: Any, extractor: Any, name: str) -> None:
        self.name = name
        self.model = model.eval()
        if model.dtype == torch.float16 and not has_half_layer_norm(model.device):
            use_float32_layer_norm(model)
        self.extractor = extractor
        self.num_layers = model.config.num_hidden_layers
        self.dtype = model.dtype

    def waveform(self, path: str) -> Tensor:
        try:
            samples, rate = soundfile.read(
                os.fsencode(path), dtype="float32", always_2d=True
            )
        except (soundfile.LibsndfileError, OSError) as ex:
            raise AudioError(f"{path}: cannot be decoded as audio ({ex}).") from None

        mono = samples.mean(axis=1, dtype=np.float32)
        if rate != SAMPLING_RATE:
            mono = soxr.resample(mono, rate, SAMPLING_RATE, quality="HQ")

        return torch.from_numpy(mono)

    def fbank(self, samples: Tensor, file: str) -> Tensor:
        # Without padding: an odd last frame is dropped, as it is of no use.
        features = self.extractor(
            samples.numpy(),
            sampling_rate=SAMPLING_RATE,
            padding=False,
            pad_to_multiple_of=None,
            return_tensors="np",
        )["input_features"]
        # (1, S // 2, 160) -> (S, 80)
        return torch.from_numpy(np.asarray(features[0]).reshape(-1, NUM_MEL_BINS))

    def pad(self, fbanks: list[Tensor]) -> Tensor:
        padded = self.extractor.pad(
            {"input_features": [fbank.numpy() for fbank in fbanks]},
            padding=True,
            pad_to_multiple_of=FBANK_STRIDE,
            return_tensors="np",
        )
        return torch.from_numpy(np.asarray(padded["input_features"]))

    def _stack(self, fbank: Tensor) -> Tensor:
        frames = len(fbank) - len(fbank) % FBANK_STRIDE
        # (S, 80) -> (1, S // 2, 160)
        stacked = fbank[:frames].reshape(1, -1, FBANK_STRIDE * NUM_MEL_BINS)
        return stacked.to(self.model.device, self.dtype)

    @torch.inference_mode()
    def frontend(self, fbank: Tensor) -> Tensor:
        return cast(Tensor, self.model.feature_projection(self._stack(fbank))[0][0])

    @torch.inference_mode()
    def layer(self, number: int, hidden: Tensor) -> Tensor:
        seqs = hidden.to(self.model.device, self.dtype).unsqueeze(0)
        return cast(Tensor, self.model.encoder.layers[number - 1](seqs)[0][0])

    @torch.inference_mode()
    def final(self, hidden: Tensor) -> Tensor:
        return hidden

    @torch.inference_mode()
    def hidden_states(self, fbank: Tensor) -> tuple[list[Tensor], Tensor]:
        output = self.model(self._stack(fbank), output_hidden_states=True)
        states = [seqs[0] for seqs in output.hidden_states]
        return states, output.last_hidden_state[0]


class StoredSide:
    """Embeddings that were computed before: an array of (frames, dim) per file and
    layer, under the names that ``seamless-w2vbert embed`` gives them."""

    def __init__(self, arrays: Mapping[str, Any], name: str) -> None:
        self.name = name
        self._arrays = arrays

    def layers_of(self, path: str) -> dict[int | None, Tensor]:
        """Return what is stored for a file by layer; None is a layer without number.

        :raises ArgumentError: if there is nothing.
        """
        names = {path, os.path.basename(path), Path(path).stem}
        found: dict[int | None, Tensor] = {}

        for key in self._arrays:
            stem, mark, number = key.rpartition("#")
            if mark and number.isdigit() and stem in names:
                found[int(number)] = _tensor(self._arrays[key])
            elif key in names:
                found[None] = _tensor(self._arrays[key])

        if not found:
            known = ", ".join(list(self._arrays)[:3]) or "nothing"
            raise ArgumentError(f"{self.name}: has no {path}; it has {known} ...")

        return found


class DumpSide(StoredSide):
    """A dump of embeddings. Utterances are found by the file they came from, or by
    their ids."""

    def __init__(self, dump: Dump, name: str) -> None:
        super().__init__({}, name)
        self._dump = dump

    def layers_of(self, path: str) -> dict[int | None, Tensor]:
        index = self._dump.index
        of_file = pc.is_in(
            index["source"], pa.array([path, os.path.abspath(path)], pa.string())
        )
        ids = index.filter(of_file)["id"].to_pylist()
        names = [*ids, path, os.path.basename(path)]
        id = next((name for name in names if name in self._dump), None)

        if id is None:
            raise ArgumentError(f"{self.name}: has no {path}.")

        return {
            layer: _tensor(self._dump.layer(layer)[id])
            for layer in self._dump.settings["layers"]
        }


def _tensor(array: Any) -> Tensor:
    tensor = torch.from_numpy(np.array(array))

    if tensor.ndim not in (1, 2):
        raise ArgumentError(f"An array of shape {tuple(tensor.shape)} is no embedding.")

    return tensor if tensor.ndim == 2 else tensor.unsqueeze(0)


# -- making sides --------------------------------------------------------------------


def transformers_twin(
    side: PackageSide, source: str | os.PathLike[str] | None
) -> TransformersSide:
    """Return Transformers' model with the weights of ``side``, or as its own loader
    reads them where ``source`` is a Transformers folder."""
    if source is not None and (Path(source) / "config.json").is_file():
        return load_transformers(source, side.dtype)

    transformers = _import_transformers()
    layers: Any = getattr(side._encoder, "inner", side._encoder).layers
    state_dict = {
        transformers_name(name): tensor
        for part in ("encoder_frontend", "encoder")
        for name, tensor in getattr(side.pipeline.module, part)
        .state_dict(prefix=f"{part}.")
        .items()
    }
    first = layers[0]
    attention, sdpa = first.self_attn, first.self_attn.sdpa
    positions, _ = sdpa.rel_k_embed.weight.shape
    right = getattr(sdpa, "max_right_rel_pos", None) or sdpa.max_rhs_rel_pos

    config = transformers.Wav2Vec2BertConfig(
        hidden_size=first.layer_norm.weight.numel(),
        num_hidden_layers=len(layers),
        num_attention_heads=attention.num_heads,
        intermediate_size=first.ffn1.inner_proj.weight.size(0),
        feature_projection_input_dim=FBANK_STRIDE * NUM_MEL_BINS,
        conv_depthwise_kernel_size=first.conv.depthwise_conv.weight.size(2),
        left_max_position_embeddings=positions - 1 - right,
        right_max_position_embeddings=right,
        mask_time_prob=0.0,
    )

    with torch.device("meta"):
        model = transformers.Wav2Vec2BertModel(config)

    try:
        model.load_state_dict(state_dict, assign=True)
    except RuntimeError as ex:
        raise CheckpointError(
            f"{side.name}: Transformers has no place for its weights: {ex}"
        ) from None

    return TransformersSide(model, _extractor(transformers, None), "Transformers")


def load_transformers(
    folder: str | os.PathLike[str], dtype: torch.dtype
) -> TransformersSide:
    """Load a Transformers folder with Transformers."""
    transformers = _import_transformers()

    try:
        model = transformers.AutoModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True
        )
        extractor = _extractor(transformers, folder)
    except (OSError, ValueError, KeyError) as ex:
        raise CheckpointError(f"{folder}: Transformers cannot load it: {ex}") from None

    return TransformersSide(model, extractor, f"Transformers, {os.fspath(folder)}")


def _extractor(transformers: Any, folder: str | os.PathLike[str] | None) -> Any:
    if folder is not None and (Path(folder) / "preprocessor_config.json").is_file():
        return transformers.AutoFeatureExtractor.from_pretrained(folder)

    # As facebook/w2v-bert-2.0 configures it.
    return transformers.SeamlessM4TFeatureExtractor(
        feature_size=NUM_MEL_BINS,
        num_mel_bins=NUM_MEL_BINS,
        sampling_rate=SAMPLING_RATE,
        stride=FBANK_STRIDE,
        padding_value=PAD_VALUE,
    )


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ArgumentError(
            "Comparing with Transformers needs it installed: "
            "`pip install '.[transformers]'`."
        ) from None

    return transformers


def open_stored(path: str) -> StoredSide | None:
    """Open a file or folder of arrays; None if ``path`` is something else.

    A dump; a ``.npz`` of arrays by name; or a folder of ``.npy`` files named after the
    audio files (``a.wav.npy`` or ``a.npy``).
    """
    file = Path(path)

    if (file / "dump.json").is_file():
        return DumpSide(open_dump(path), path)

    if file.suffix == ".npz" and file.is_file():
        with np.load(file, allow_pickle=False) as opened:
            return StoredSide(dict(opened), path)

    if file.is_dir() and not (file / "config.json").exists():
        arrays = {
            str(array.relative_to(file).with_suffix("")): np.load(array, mmap_mode="r")
            for array in sorted(file.rglob("*.npy"))
        }
        if arrays:
            return StoredSide(arrays, path)

    return None
