"""A checkpoint in one format -> the same weights in another, and an account of them.

Comes in: a checkpoint of fairseq, fairseq2 or Transformers, or a UnitY/SeamlessM4T v2
model that has one inside. Goes out: a Transformers folder or a fairseq2 ``.pt`` file,
written piece by piece, so that memory does not grow with the model; and a
:class:`Conversion` that names every tensor that was left out or made up.

Both file formats are written here, a tensor at a time: their libraries take a whole
state dict, of which every page that they read stays in memory.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import pickle
import re
import secrets
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from seamless_w2vbert.architecture import Architecture, PretrainingHeads
from seamless_w2vbert.checkpoints import files, names, shapes
from seamless_w2vbert.errors import ArgumentError, CheckpointError

Target = Literal["transformers", "fairseq2"]

MAX_SHARD_BYTES: Final = 5 * 10**9
"""How large a safetensors file may get; Transformers' own default."""

INITIALISED_KEY: Final = "initialised"
"""The key of a fairseq2 file that lists the tensors which no training has seen."""

_MASK_EMBED: Final = "masker.temporal_mask_embed"
_NUM_UPDATES: Final = "quantizer.num_updates"
_SEED: Final = 20231208  # as for tiny-random

_PIECE: Final = 2**20
"""How many numbers of a tensor are cast at a time."""

_RELEASE_EVERY: Final = 64 * 2**20
"""After how many bytes the pages read so far are given back."""

_UNLIMITED_CHUNK: Final = 20_000
"""SeamlessM4Tv2's attention chunk, in frames: 400 s, longer than any input it takes."""

_PREPROCESSOR_NAME: Final = "preprocessor_config.json"

_COMPANIONS: Final = (
    # Files that belong to a Transformers model beside its weights and its config.
    _PREPROCESSOR_NAME,
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "alphabet.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "generation_config.json",
)

# torch's dtype -> safetensors' name for it, and torch.save's.
_DTYPES: Final[dict[torch.dtype, tuple[str, type | None]]] = {
    torch.float64: ("F64", torch.DoubleStorage),
    torch.float32: ("F32", torch.FloatStorage),
    torch.float16: ("F16", torch.HalfStorage),
    torch.bfloat16: ("BF16", torch.BFloat16Storage),
    torch.int64: ("I64", torch.LongStorage),
    torch.int32: ("I32", None),
    torch.int16: ("I16", None),
    torch.int8: ("I8", None),
    torch.uint8: ("U8", None),
    torch.bool: ("BOOL", None),
}

_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)

_V1: Final = re.compile(
    r"^encoder\.layers\..*\.(linear_pos|pos_bias_[uv]|batch_norm|r_proj|[uv]_bias)\b"
)
"""What the blocks of SeamlessM4T v1 have and those of W2v-BERT 2.0 do not."""


@dataclass(frozen=True)
class Conversion:
    """What became of a checkpoint: every tensor of it is in one of the counts."""

    src: Path
    """The file or folder that was read."""

    dst: Path
    """The file or folder that was written."""

    source: names.Format
    """The format of ``src``."""

    target: Target
    """The format of ``dst``."""

    extracted: bool
    """Whether ``src`` is a UnitY or SeamlessM4T model, of which ``dst`` holds the
    speech encoder's frontend and blocks."""

    num_tensors: int
    """How many tensors were carried over."""

    num_bytes: int
    """The size of all tensors in ``dst``."""

    dropped: tuple[str, ...]
    """The tensors that ``dst`` has no place for, under their names in ``src``."""

    initialised: tuple[str, ...]
    """The tensors in ``dst`` that hold initial values that no training has seen."""

    copied: tuple[str, ...]
    """The files of the model, such as a tokenizer's, that were copied."""

    left: tuple[str, ...]
    """The other entries of the folder ``src``, which were not."""


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: Target,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Conversion:
    """Convert a W2v-BERT 2.0 checkpoint between fairseq, fairseq2 and Transformers.

    The renaming of seamless_communication's ``convert_conformer_shaw_checkpoint`` and
    Transformers' ``convert_wav2vec2_seamless_checkpoint.py``, in both directions. Of a
    UnitY or SeamlessM4T v2 model the speech encoder is taken, which is recognised by
    its names. Every tensor that both formats have is the same to the bit.

    ``dst`` appears whole or not at all. Memory does not grow with the model, except
    where ``src`` is from before torch 1.6 and cannot be mapped.

    :param src:
        a fairseq or fairseq2 file, a safetensors file, or a Transformers folder.
    :param dst:
        for ``"transformers"`` the folder to make, with weights, ``config.json`` and
        ``preprocessor_config.json``; for ``"fairseq2"`` the ``.pt`` file to make, as
        ``load_conformer_shaw_model`` of seamless_communication takes it. That loader
        wants the pretraining heads: where ``src`` has none they are drawn as fairseq2
        draws them, from a fixed seed, and listed in the result and in the file.
    :param to: the format to convert to.
    :param dtype:
        float32, float16 or bfloat16; None keeps the dtype of each tensor.
    :param force: whether to replace ``dst`` where it exists.
    :param max_shard_bytes: how large a safetensors file may get.

    :returns: what was carried, left out and made up.
    :raises ArgumentError: if an argument can never be right.
    :raises CheckpointError: if ``src`` is damaged, unsafe or of another architecture,
        or ``dst`` cannot be written; the message names the file.
    """
    src, dst = Path(src), Path(dst)
    _check_arguments(dst, to, dtype, max_shard_bytes)
    final = _check_paths(src, dst, to, force)

    pages = _SourcePages(src)
    source = _read(src)
    pages.release()  # safetensors' reader looks at every tensor
    state, initialised = _state_for(to, source, dtype)
    carried = {id(tensor) for tensor in state.values()}
    dropped = tuple(n for n, tensor in source.raw.items() if id(tensor) not in carried)

    for name, tensor in state.items():
        _check_storable(name, tensor, to, src)

    copied = _companions(source) if to == "transformers" else ()

    with _output(final, dst) as temporary:
        if to == "fairseq2":
            _write_pt(temporary, state, initialised, dtype, pages)
        else:
            temporary.mkdir()
            _write_folder(temporary, state, source, dtype, max_shard_bytes, pages)
            for name in copied:
                _write(temporary / name, _read_bytes(_folder_of(src) / name))
            _sync_folder(temporary)

    return Conversion(
        src=src,
        dst=dst,
        source=source.format,
        target=to,
        extracted=source.extracted,
        num_tensors=len(state) - len(initialised),
        num_bytes=sum(_num_bytes(t, dtype) for t in state.values()),
        dropped=dropped,
        initialised=tuple(initialised),
        copied=copied,
        left=_left_behind(src, copied),
    )


# -- what may be asked for -----------------------------------------------------------


def _check_arguments(
    dst: Path, to: str, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    if to not in get_args(Target):
        raise ArgumentError(f"A target of {to!r} is neither transformers nor fairseq2.")

    if dtype is not None and dtype not in _FLOATS:
        raise ArgumentError(f"{dtype} is none of float32, float16, bfloat16.")

    if max_shard_bytes < 1:
        raise ArgumentError(f"A shard of {max_shard_bytes} bytes holds no tensor.")

    if to == "fairseq2" and dst.suffix != ".pt":
        raise ArgumentError(f"{dst}: fairseq2's format is a file; name it NAME.pt.")

    if to == "transformers" and dst.suffix in (".pt", ".safetensors"):
        raise ArgumentError(f"{dst}: Transformers' format is a folder; name a folder.")


def _check_paths(src: Path, dst: Path, to: Target, force: bool) -> Path:
    """Return where ``dst`` really is, if it may be written."""
    if not src.exists():
        raise CheckpointError(f"{src}: there is no such file or folder.")

    source, final = Path(os.path.realpath(src)), Path(os.path.realpath(dst))

    if final == source or _is_one_of(final, source):
        raise CheckpointError(f"{dst}: is what is to be read; name another output.")

    if final.is_relative_to(source):
        raise CheckpointError(f"{dst}: is inside {src}; name an output beside it.")

    if source.is_relative_to(final):
        raise CheckpointError(f"{dst}: holds {src}, which is to be read; name another.")

    if not final.parent.is_dir():
        raise CheckpointError(f"{dst}: there is no folder {dst.parent}; make it first.")

    if not final.exists():
        return final

    if not force:
        raise CheckpointError(
            f"{dst}: exists; pass --force (force=True) to replace it."
        )

    if to == "fairseq2" and not final.is_file():
        raise CheckpointError(f"{dst}: is no file and will not be replaced by one.")

    if to == "transformers":
        _check_replaceable(final, dst)

    return final


def _is_one_of(final: Path, source: Path) -> bool:
    if not final.is_file():
        return False

    candidates = source.iterdir() if source.is_dir() else [source]

    return any(file.is_file() and file.samefile(final) for file in candidates)


def _check_replaceable(folder: Path, dst: Path) -> None:
    """Nothing may be deleted but a model: --force with a wrong name is not rare."""
    if not folder.is_dir():
        raise CheckpointError(f"{dst}: is a file and will not be replaced by a folder.")

    ours = {files.CONFIG_NAME, files.INDEX_NAME, *_COMPANIONS}
    others = [
        entry.name
        for entry in sorted(folder.iterdir())
        if entry.name not in ours
        and not (entry.is_file() and entry.suffix == ".safetensors")
    ]

    if others:
        raise CheckpointError(
            f"{dst}: holds more than a model ({', '.join(others[:3])}) and will not be "
            "replaced; move that away or name another folder."
        )


# -- the source ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    path: Path
    format: names.Format
    extracted: bool
    architecture: Architecture

    raw: dict[str, Tensor]
    """Everything, under its own name."""

    tensors: dict[str, Tensor]
    """The encoder and its pretraining heads, under fairseq2's names."""

    config: dict[str, Any] | None
    """Transformers' config, of a model of its own."""

    initialised: frozenset[str]
    """Those of ``tensors`` that an earlier conversion made up."""


def _read(path: Path) -> _Source:
    raw, config = _read_files(path)
    format_ = names.format_of(raw)
    inner = {name: name for name in raw}
    extracted = format_ is None

    if format_ is None:
        inner = names.speech_encoder_names(raw)
        format_ = names.format_of(inner.values())

    if format_ is None:
        raise CheckpointError(
            f"{path}: is not a W2v-BERT 2.0 checkpoint, and no UnitY or SeamlessM4T v2 "
            f"model that has one inside: none of its {len(raw)} tensors has a name of "
            "theirs."
        )

    if format_ == "transformers" and config is None:
        raise CheckpointError(
            f"{path}: has Transformers' names but no config.json beside it; pass the "
            "folder that `save_pretrained` wrote."
        )

    if config is not None and extracted:
        config = _encoder_config(config, path)

    tensors = _rename(raw, inner, format_, path)
    architecture = _check_model(tensors, config, path)
    own_config = None

    if format_ == "transformers" and not extracted:
        own_config = _check_config(config or {}, architecture, path)

    made_up = _marked(path) & tensors.keys()

    return _Source(
        path, format_, extracted, architecture, raw, tensors, own_config, made_up
    )


def _read_files(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        raw, config = files.read_tensors(path), files.read_config(path)
    except CheckpointError:
        raise
    except Exception as ex:  # what else a crafted file can make a parser raise
        raise CheckpointError(
            f"{path}: cannot be read as a checkpoint ({type(ex).__name__}); it may be "
            "damaged, fetch it again."
        ) from None

    for key in (*_sizes(Architecture()), "speech_encoder_chunk_size"):
        value = (config or {}).get(key, 0)
        optional = key == "speech_encoder_chunk_size" and value is None
        if not optional and (type(value) is not int or value < 0):
            raise CheckpointError(
                f"{_folder_of(path) / files.CONFIG_NAME}: {key} is {value!r}, which is "
                "no size; mend it or fetch the file again."
            )

    return {name: tensor.detach() for name, tensor in raw.items()}, config


def _encoder_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings of SeamlessM4Tv2's speech encoder, as the encoder alone has them."""
    chunk = config.get("speech_encoder_chunk_size")

    if chunk is not None and chunk < _UNLIMITED_CHUNK:
        raise CheckpointError(
            f"{path}: config.json sets speech_encoder_chunk_size to {chunk}; "
            "W2v-BERT 2.0 has no chunks, and its hidden states would differ."
        )

    keys = (
        "position_embeddings_type",
        "layer_norm_eps",
        "left_max_position_embeddings",
        "right_max_position_embeddings",
    )
    settings = {key: config[key] for key in keys if key in config}
    settings["hidden_act"] = config.get("speech_encoder_hidden_act", "swish")

    return settings


def _rename(
    raw: Mapping[str, Tensor],
    inner: Mapping[str, str],
    format_: names.Format,
    path: Path,
) -> dict[str, Tensor]:
    origin: dict[str, str] = {}

    for name, own in inner.items():
        if _V1.match(own):
            raise CheckpointError(
                f"{path}: {name} is of another architecture, with relative positions "
                "by linear_pos and batch norm as in SeamlessM4T v1; only W2v-BERT 2.0 "
                "and the speech encoder of SeamlessM4T v2 can be converted."
            )
        if format_ == "fairseq" and own in names.UNUSED:
            continue

        renamed = names.fairseq2_name(own, format_)

        if not renamed.startswith((*_ENCODER, *_PRETRAINING)):
            continue
        if renamed in origin:
            raise CheckpointError(
                f"{path}: {origin[renamed]} and {name} are two names of one tensor "
                f"({renamed}); remove one of them."
            )

        origin[renamed] = name

    return {renamed: raw[name] for renamed, name in origin.items()}


_ENCODER: Final = ("encoder_frontend.", "encoder.")
_PRETRAINING: Final = ("masker.", "quantizer.", "final_proj.", "final_target_proj.")


def _check_model(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, path: Path
) -> Architecture:
    """Tell the architecture, and check every tensor against it."""
    # The mask embedding alone, which Transformers keeps, is no pretraining head.
    alone = {n for n in tensors if n.startswith(_PRETRAINING)} <= {_MASK_EMBED}
    model = {n: t for n, t in tensors.items() if not (alone and n == _MASK_EMBED)}
    architecture = shapes.architecture_of(model, config, path)

    if "quantizer.entries" in model:  # fairseq keeps no count of its updates
        model.setdefault(_NUM_UPDATES, torch.zeros((), dtype=torch.int64))

    expected = expected_shapes(architecture)

    if alone and _MASK_EMBED in tensors:
        model[_MASK_EMBED] = tensors[_MASK_EMBED]
        expected[_MASK_EMBED] = (architecture.model_dim,)

    shapes.check(model, {n: _like(n, shape) for n, shape in expected.items()}, path)

    return architecture


def _like(name: str, shape: tuple[int, ...]) -> Tensor:
    dtype = torch.int64 if name == _NUM_UPDATES else torch.float32
    return torch.empty(shape, dtype=dtype, device="meta")


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return fairseq2's name and the shape of every tensor of a model, with the
    pretraining heads where ``architecture`` has them."""
    width, features = architecture.model_dim, architecture.feature_dim

    def norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}

    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    expected = {
        **norm("encoder_frontend.post_extract_layer_norm", features),
        **linear("encoder_frontend.model_dim_proj", features, width),
    }
    positions = architecture.max_left_rel_pos + 1 + architecture.max_right_rel_pos
    kernel = architecture.depthwise_conv_kernel_size

    for index in range(architecture.num_layers):
        block = f"encoder.layers.{index}."
        attention, conv = block + "self_attn.", block + "conv."

        for ffn in (block + "ffn1", block + "ffn2"):
            inner = architecture.ffn_inner_dim
            expected |= norm(f"{ffn}_layer_norm", width)
            expected |= linear(f"{ffn}.inner_proj", width, inner)
            expected |= linear(f"{ffn}.output_proj", inner, width)

        for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
            expected |= linear(attention + name, width, width)

        for name in ("self_attn_layer_norm", "conv_layer_norm", "layer_norm"):
            expected |= norm(block + name, width)

        expected |= norm(conv + "layer_norm", width) | {
            attention + "sdpa.rel_k_embed.weight": (positions, architecture.head_dim),
            conv + "pointwise_conv1.weight": (2 * width, width, 1),
            conv + "depthwise_conv.weight": (width, 1, kernel),
            conv + "pointwise_conv2.weight": (width, width, 1),
        }

    if heads := architecture.pretraining:
        entries = heads.num_codebooks * heads.num_codebook_entries
        expected |= {
            _MASK_EMBED: (width,),
            **linear("quantizer.entry_proj", features, entries),
            "quantizer.entries": (
                1,
                entries,
                heads.quantized_dim // heads.num_codebooks,
            ),
            _NUM_UPDATES: (),
            **linear("final_proj", width, heads.final_dim),
            **linear("final_target_proj", heads.quantized_dim, heads.final_dim),
        }

    return expected


def _check_config(
    config: dict[str, Any], architecture: Architecture, path: Path
) -> dict[str, Any]:
    """Check that a config is of the weights that it lies beside."""
    file = _folder_of(path) / files.CONFIG_NAME
    model_type = config.get("model_type", "wav2vec2-bert")

    if model_type != "wav2vec2-bert":
        raise CheckpointError(
            f"{file}: is of a {model_type!r}, not of a 'wav2vec2-bert' as the weights."
        )

    defaults = _sizes(Architecture())

    for key, size in _sizes(architecture).items():
        if (found := config.get(key, defaults[key])) != size:
            raise CheckpointError(
                f"{file}: {key} is {found}, but the tensors are of {size}; it is not "
                "the config of these weights."
            )

    return config


def _marked(path: Path) -> frozenset[str]:
    """What a fairseq2 file says was made up, if one of ours."""
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return frozenset()

    with zipfile.ZipFile(path) as archive:
        # torch maps the bytes of an archive as they are.
        if any(m.compress_type != zipfile.ZIP_STORED for m in archive.infolist()):
            raise CheckpointError(
                f"{path}: is a compressed archive, which torch does not write; unpack "
                "it and pack it again with `zip -0`."
            )

    # `files` has read it by now: it is safe, and a dict.
    content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    marked = content.get(INITIALISED_KEY) if "model" in content else None

    if not isinstance(marked, list):
        return frozenset()

    return frozenset(name for name in marked if isinstance(name, str))


def _check_storable(name: str, tensor: Tensor, to: Target, path: Path) -> None:
    storage = _DTYPES.get(tensor.dtype)

    if storage is None or (to == "fairseq2" and storage[1] is None):
        raise CheckpointError(
            f"{path}: {name} is of dtype {tensor.dtype}, which cannot be converted."
        )

    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"

    # A pickle can claim any shape over a few bytes, by strides of zero.
    if not plain or _num_bytes(tensor) > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {name} of shape {tuple(tensor.shape)} is not stored as a plain "
            "array; save it again from a contiguous tensor."
        )


# -- the target ----------------------------------------------------------------------


def _state_for(
    to: Target, source: _Source, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors to write, and the names of those that are made up."""
    if to == "fairseq2":
        return _fairseq2_state(source, dtype)

    if source.config is not None:
        return source.raw, []

    wanted = {
        name: tensor
        for name, tensor in source.tensors.items()
        if name.startswith(_ENCODER)
        or (name == _MASK_EMBED and name not in source.initialised)
    }

    return names.to_transformers_names(wanted), []


def _fairseq2_state(
    source: _Source, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], list[str]]:
    architecture, like = source.architecture, Architecture()
    split = (architecture.max_left_rel_pos, architecture.max_right_rel_pos)

    if split != (like.max_left_rel_pos, like.max_right_rel_pos):
        raise CheckpointError(
            f"{source.path}: has relative positions of -{split[0]} to {split[1]}, "
            "which fairseq2's format cannot tell; keep it in Transformers'."
        )

    if architecture.pretraining is None:
        architecture = replace(architecture, pretraining=PretrainingHeads())

    state = dict(source.tensors)
    fresh = _fresh_heads(architecture, dtype or _main_dtype(source))

    for name, tensor in fresh.items():
        state.setdefault(name, tensor)

    made_up = [
        name
        for name in state
        if name not in source.tensors or name in source.initialised
    ]

    return state, made_up


def _fresh_heads(architecture: Architecture, dtype: torch.dtype) -> dict[str, Tensor]:
    """Draw pretraining heads as fairseq2's modules do when they are made.

    NumPy's legacy generator draws them, since its stream is frozen for good.
    """
    random = np.random.RandomState(_SEED)
    expected = expected_shapes(architecture)
    heads = {}

    for name in sorted(name for name in expected if name.startswith(_PRETRAINING)):
        shape = expected[name]

        if name == _NUM_UPDATES:
            heads[name] = torch.zeros((), dtype=torch.int64)
        elif name == "quantizer.entry_proj.bias":
            heads[name] = torch.zeros(shape, dtype=dtype)
        elif name == "quantizer.entry_proj.weight":
            heads[name] = torch.from_numpy(random.standard_normal(shape)).to(dtype)
        elif name in (_MASK_EMBED, "quantizer.entries"):
            heads[name] = torch.from_numpy(random.random_sample(shape)).to(dtype)
        else:  # a projection, as torch's own Linear
            fan_in = expected[name.rpartition(".")[0] + ".weight"][1]
            values = (2 * random.random_sample(shape) - 1) / math.sqrt(fan_in)
            heads[name] = torch.from_numpy(values).to(dtype)

    return heads


def _main_dtype(source: _Source) -> torch.dtype:
    return source.tensors["encoder_frontend.model_dim_proj.weight"].dtype


def _config_for(source: _Source, dtype: torch.dtype | None) -> dict[str, Any]:
    """The ``config.json`` to write: the source's own, or one made from its sizes."""
    dtype_name = str(dtype or _main_dtype(source)).removeprefix("torch.")

    if source.config is not None:
        config = dict(source.config, model_type="wav2vec2-bert")
        if len(source.tensors) == len(source.raw):  # no adapter and no head
            config.setdefault("architectures", ["Wav2Vec2BertModel"])
        if dtype is not None:
            config["dtype" if "dtype" in config else "torch_dtype"] = dtype_name
        return config

    # Without masking Transformers has no mask embedding, and so makes up none.
    masked = _MASK_EMBED in source.tensors.keys() - source.initialised

    return {
        "architectures": ["Wav2Vec2BertModel"],
        "model_type": "wav2vec2-bert",
        "torch_dtype": dtype_name,
        **_sizes(source.architecture),
        "position_embeddings_type": "relative_key",
        "hidden_act": "swish",
        "layer_norm_eps": 1e-5,
        "add_adapter": False,
        "apply_spec_augment": False,
        "mask_time_prob": 0.05 if masked else 0.0,
        "mask_feature_prob": 0.0,
    }


def _sizes(architecture: Architecture) -> dict[str, int]:
    """The sizes as ``Wav2Vec2BertConfig`` calls them; of ``Architecture()`` they are
    that config's defaults."""
    return {
        "hidden_size": architecture.model_dim,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "intermediate_size": architecture.ffn_inner_dim,
        "feature_projection_input_dim": architecture.feature_dim,
        "conv_depthwise_kernel_size": architecture.depthwise_conv_kernel_size,
        "left_max_position_embeddings": architecture.max_left_rel_pos,
        "right_max_position_embeddings": architecture.max_right_rel_pos,
    }


def _preprocessor_config(architecture: Architecture) -> dict[str, Any]:
    """As ``facebook/w2v-bert-2.0`` configures its feature extractor."""
    return {
        "feature_extractor_type": "SeamlessM4TFeatureExtractor",
        "feature_size": architecture.num_fbank_channels,
        "num_mel_bins": architecture.num_fbank_channels,
        "padding_side": "right",
        "padding_value": 1,
        "return_attention_mask": True,
        "sampling_rate": 16000,
        "stride": architecture.fbank_stride,
    }


# -- files beside the weights --------------------------------------------------------


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _companions(source: _Source) -> tuple[str, ...]:
    if source.config is None:
        return ()

    folder = _folder_of(source.path)

    return tuple(name for name in _COMPANIONS if (folder / name).is_file())


def _left_behind(src: Path, copied: Iterable[str]) -> tuple[str, ...]:
    if not src.is_dir():
        return ()

    known = {files.CONFIG_NAME, files.INDEX_NAME, *copied}

    return tuple(
        entry.name
        for entry in sorted(src.iterdir())
        if entry.name not in known
        and entry.suffix != ".safetensors"
        and not entry.name.startswith(".")
    )


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as ex:
        raise CheckpointError(f"{file}: cannot be read: {ex.strerror or ex}.") from None


# -- writing, piece by piece ---------------------------------------------------------


class _SourcePages:
    """The pages of the source's mapped files, which count as this process's memory
    from when they are read until they are given back."""

    def __init__(self, src: Path) -> None:
        self.src = src
        paths = src.glob("*.safetensors") if src.is_dir() else [src]
        self._files = {os.path.realpath(path) for path in paths}
        self._read = 0

    def count(self, num_bytes: int) -> None:
        self._read += num_bytes

        if self._read >= _RELEASE_EVERY:
            self.release()

    def release(self) -> None:
        self._read = 0
        # Nothing writes to these mappings: the kernel reads a page again if need be.
        maps = Path("/proc/self/maps")

        if not maps.exists():  # not Linux; only memory is lost
            return

        for line in maps.read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in self._files:
                start, end = (int(address, 16) for address in fields[0].split("-"))
                size = ctypes.c_size_t(end - start)
                _LIBC.madvise(ctypes.c_void_p(start), size, mmap.MADV_DONTNEED)

        if hasattr(_LIBC, "malloc_trim"):  # glibc keeps what casts have freed
            _LIBC.malloc_trim(ctypes.c_size_t(0))


_LIBC: Final = ctypes.CDLL(None)


def _pieces(
    name: str, tensor: Tensor, dtype: torch.dtype | None, pages: _SourcePages
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order, in the dtype asked for."""
    flat = tensor.reshape(-1)
    wanted = _dtype_of(tensor, dtype)

    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE]
        converted = piece.to(wanted)

        if wanted != tensor.dtype and _overflows(piece, converted):
            raise CheckpointError(
                f"{pages.src}: {name} holds values that {wanted} cannot; convert to "
                "bfloat16 or float32."
            )

        yield converted.view(torch.uint8).numpy().data
        pages.count(piece.numel() * piece.element_size())


def _overflows(piece: Tensor, converted: Tensor) -> bool:
    """Tell whether a cast made a number infinite."""
    limit = torch.finfo(converted.dtype).max
    low, high = piece.aminmax()

    if bool((low >= -limit) & (high <= limit)):  # nearly always, and quickly told
        return False

    return bool((converted.isinf() & ~piece.isinf()).any())


def _dtype_of(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype to write a tensor in: only floating-point ones change."""
    return dtype if dtype and tensor.is_floating_point() else tensor.dtype


def _num_bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    return tensor.numel() * _dtype_of(tensor, dtype).itemsize


def _write_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    source: _Source,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    pages: _SourcePages,
) -> None:
    _write_json(folder / files.CONFIG_NAME, _config_for(source, dtype))
    _write_json(folder / _PREPROCESSOR_NAME, _preprocessor_config(source.architecture))

    shards = _shards(state, dtype, max_shard_bytes)
    file_names = [files.WEIGHTS_NAME]

    if len(shards) > 1:
        file_names = [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        weight_map = {
            name: file
            for file, shard in zip(file_names, shards, strict=True)
            for name in shard
        }
        size = sum(_num_bytes(t, dtype) for t in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        _write_json(folder / files.INDEX_NAME, index)

    for file, shard in zip(file_names, shards, strict=True):
        _write_safetensors(folder / file, shard, dtype, pages)


def _shards(
    state: Mapping[str, Tensor], dtype: torch.dtype | None, max_bytes: int
) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0

    for name, tensor in state.items():
        num_bytes = _num_bytes(tensor, dtype)
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += num_bytes

    return shards


def _write_safetensors(
    path: Path,
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    pages: _SourcePages,
) -> None:
    """Write what ``safetensors.torch.save_file`` would: the header, then the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Wide dtypes first, so that every tensor starts at a multiple of its item size.
    order = sorted(state, key=lambda n: (-_dtype_of(state[n], dtype).itemsize, n))

    for name in order:
        start, end = end, end + _num_bytes(state[name], dtype)
        header[name] = {
            "dtype": _DTYPES[_dtype_of(state[name], dtype)][0],
            "shape": list(state[name].shape),
            "data_offsets": [start, end],
        }

    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with _created(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            for piece in _pieces(name, state[name], dtype, pages):
                file.write(piece)


def _write_pt(
    path: Path,
    state: Mapping[str, Tensor],
    initialised: list[str],
    dtype: torch.dtype | None,
    pages: _SourcePages,
) -> None:
    """Write what ``torch.save`` would, with its own writer: an uncompressed zip archive
    of one pickle and the bytes of each tensor, at offsets that can be mapped."""
    content: dict[str, Any] = {
        "model": {
            name: _Stored(str(key), tensor, _dtype_of(tensor, dtype))
            for key, (name, tensor) in enumerate(state.items())
        },
        "fs2": True,
    }
    if initialised:
        content[INITIALISED_KEY] = initialised

    with _created(path) as file:
        sink = _Sink(file)
        archive = torch._C.PyTorchFileWriter(cast(IO[bytes], sink))
        pickled = _pickle(content)
        archive.write_record("data.pkl", pickled, len(pickled))
        archive.write_record("byteorder", b"little", 6)

        for key, (name, tensor) in enumerate(state.items()):
            data = b"".join(_pieces(name, tensor, dtype, pages))
            archive.write_record(f"data/{key}", data, len(data))
            sink.check()

        archive.write_end_of_file()
        sink.check()


class _Sink:
    """A file for torch's writer, which ends the process where a write raises: errors
    wait for :meth:`check`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as ex:
                self._error = ex

        return memoryview(data).nbytes

    def check(self) -> None:
        if self._error is not None:
            raise self._error


@dataclass(frozen=True)
class _Stored:
    """Stands for a tensor in a pickle: where its bytes are, and what they make."""

    key: str
    tensor: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class _Storage:
    """Stands for the storage of a tensor in a pickle."""

    stored: _Stored


class _Pickler(pickle.Pickler):
    """Pickles :class:`_Stored` as ``torch.save`` pickles a contiguous tensor."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Stored):
            return NotImplemented

        shape = tuple(obj.tensor.shape)
        stride = torch.empty(shape, device="meta").stride()

        return torch._utils._rebuild_tensor_v2, (
            _Storage(obj),
            0,
            shape,
            stride,
            False,
            OrderedDict(),
        )

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None

        stored = obj.stored
        kind = _DTYPES[stored.dtype][1]

        return ("storage", kind, stored.key, "cpu", stored.tensor.numel())


def _pickle(content: object) -> bytes:
    buffer = BytesIO()
    _Pickler(buffer, protocol=2).dump(content)

    return buffer.getvalue()


# -- all or nothing ------------------------------------------------------------------


@contextmanager
def _output(final: Path, dst: Path) -> Iterator[Path]:
    """Yield a path beside ``final``; what is there in the end is moved to ``final``,
    or removed after a failure."""
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")

    try:
        yield temporary
        _move(temporary, final)
        _sync_folder(final.parent)
    except OSError as ex:
        raise CheckpointError(
            f"{dst}: cannot be written: {ex.strerror or ex}."
        ) from None
    finally:
        _remove(temporary)


def _move(temporary: Path, final: Path) -> None:
    if not (temporary.is_dir() and final.exists()):
        os.replace(temporary, final)
        return

    # A folder cannot be replaced in one step: the old one steps aside until the new
    # one is there.
    aside = temporary.with_suffix(".old.tmp")
    os.rename(final, aside)

    try:
        os.rename(temporary, final)
    except OSError:
        os.rename(aside, final)
        raise

    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that is on disk when the block ends."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # our own preprocessor_config.json, for the source's

    with _created(path) as file:
        file.write(content)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)

    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
