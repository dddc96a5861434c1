"""A checkpoint in one format -> the same weights in another, and an account of them.

Comes in: a checkpoint of fairseq, fairseq2 or Transformers, or a UnitY/SeamlessM4T v2
model that has one inside. Goes out: a Transformers folder or a fairseq2 ``.pt`` file,
written piece by piece, so that memory does not grow with the model; and a
:class:`Conversion` that names every tensor that was left out or made up.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from seamless_w2vbert.architecture import Architecture, PretrainingHeads
from seamless_w2vbert.checkpoints import files, names, shapes
from seamless_w2vbert.checkpoints.write import (
    DTYPES,
    INITIALISED_KEY,
    SourcePages,
    output,
    size_of,
    sync_folder,
    write_file,
    write_folder,
    write_pt,
)
from seamless_w2vbert.errors import ArgumentError, CheckpointError

Target = Literal["transformers", "fairseq2"]

MAX_SHARD_BYTES: Final = 5 * 10**9
"""How large a safetensors file may get; Transformers' own default."""

_MASK_EMBED: Final = "masker.temporal_mask_embed"
_NUM_UPDATES: Final = "quantizer.num_updates"
_SEED: Final = 20231208  # as for tiny-random

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

    source = _read(src)
    pages = SourcePages(src, source.raw.values())
    pages.release()  # safetensors' reader looks at every tensor
    state, initialised = _state_for(to, source, dtype)
    carried = {id(tensor) for tensor in state.values()}
    dropped = tuple(n for n, tensor in source.raw.items() if id(tensor) not in carried)

    for name, tensor in state.items():
        _check_storable(name, tensor, to, src)

    copied = _companions(source) if to == "transformers" else ()

    with output(final, dst) as temporary:
        if to == "fairseq2":
            write_pt(temporary, state, initialised, dtype, pages)
        else:
            temporary.mkdir()
            configs = {
                files.CONFIG_NAME: _config_for(source, dtype),
                _PREPROCESSOR_NAME: _preprocessor_config(source.architecture),
            }
            write_folder(temporary, state, configs, dtype, max_shard_bytes, pages)
            for name in copied:
                write_file(temporary / name, _read_bytes(_folder_of(src) / name))
            sync_folder(temporary)

    return Conversion(
        src=src,
        dst=dst,
        source=source.format,
        target=to,
        extracted=source.extracted,
        num_tensors=len(state) - len(initialised),
        num_bytes=sum(size_of(t, dtype) for t in state.values()),
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
    storage = DTYPES.get(tensor.dtype)

    if storage is None or (to == "fairseq2" and storage[1] is None):
        raise CheckpointError(
            f"{path}: {name} is of dtype {tensor.dtype}, which cannot be converted."
        )

    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"

    # A pickle can claim any shape over a few bytes, by strides of zero.
    if not plain or size_of(tensor) > tensor.untyped_storage().nbytes():
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
