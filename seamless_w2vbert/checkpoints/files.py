"""A path -> named tensors and config, read without running anything that is in it.

Comes in: a ``.pt`` or ``.safetensors`` file, or a Transformers folder. Goes out: the
tensors under their own names, memory-mapped where the format allows, so that nothing
is in memory before it is used.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from seamless_w2vbert.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, memory-mapped.

    :raises CheckpointError: if there is no checkpoint at ``path``, it is damaged, or
        it holds anything but tensors and plain values.
    """
    try:
        if path.is_dir():
            return _read_folder(path)

        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file or folder.")
    except OSError as ex:
        raise CheckpointError(f"{path}: cannot be read: {ex.strerror}.") from None

    if path.suffix == ".safetensors":
        return _read_safetensors(path)

    return _read_pickle(path)


def read_config(path: Path) -> dict[str, Any] | None:
    """Read the ``config.json`` of a folder, or the one beside a safetensors file.

    :raises CheckpointError: if it is not a JSON object.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / CONFIG_NAME

    if not file.is_file() or not (path.is_dir() or path.suffix == ".safetensors"):
        return None

    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as ex:
        raise CheckpointError(f"{file}: cannot be read as JSON: {ex}.") from None

    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object.")

    return content


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index_file = folder / INDEX_NAME

    if (folder / WEIGHTS_NAME).is_file():
        return _read_safetensors(folder / WEIGHTS_NAME)

    if not index_file.is_file():
        raise CheckpointError(
            f"{folder}: holds neither {WEIGHTS_NAME} nor {INDEX_NAME}. Save the model "
            "with `save_pretrained(folder, safe_serialization=True)`, or pass the "
            "checkpoint file itself."
        )

    weight_map = _read_json(index_file).get("weight_map")

    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_file}: has no `weight_map`.")

    shards: dict[str, dict[str, Tensor]] = {}
    tensors: dict[str, Tensor] = {}

    for name, file_name in weight_map.items():
        # An index may name files of its own folder and no others.
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{index_file}: {name} is said to be in {file_name!r}, which is not a "
                "file of this folder."
            )
        if file_name not in shards:
            shards[file_name] = _read_safetensors(folder / file_name)
        if name not in shards[file_name]:
            raise CheckpointError(
                f"{folder / file_name}: {name} is missing, though {INDEX_NAME} says "
                "it is there."
            )
        tensors[name] = shards[file_name][name]

    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}
    except Exception as ex:  # a dtype that this torch lacks, and whatever else
        raise CheckpointError(
            f"{file}: cannot be read as safetensors ({ex}); it may be truncated, fetch "
            "it again."
        ) from None


def _read_pickle(file: Path) -> dict[str, Tensor]:
    content = _load_pickle(file)

    # fairseq and fairseq2 keep the state dict beside what training needs.
    state_dict = content.get("model", content) if isinstance(content, dict) else None

    if not isinstance(state_dict, Mapping) or not all(
        isinstance(name, str) for name in state_dict
    ):
        raise CheckpointError(f"{file}: holds no state dict.")

    return {n: t for n, t in state_dict.items() if isinstance(t, Tensor)}


def _load_pickle(file: Path) -> Any:
    _check_magic(file)

    try:
        try:
            return torch.load(
                str(file), map_location="cpu", weights_only=True, mmap=True
            )
        except RuntimeError as ex:
            # Files from before torch 1.6 are no zip archives and cannot be mapped.
            if "mmap can only be used" not in str(ex):
                raise
            return torch.load(str(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as ex:
        raise CheckpointError(
            f"{file}: refused, it is not a checkpoint of tensors and plain values "
            f"({_first_line(ex)}). Loading it could run code; if you trust it, save "
            "its state dict alone with `torch.save`."
        ) from None
    except Exception as ex:  # a damaged pickle can fail in any way
        raise CheckpointError(
            f"{file}: cannot be read as a checkpoint ({_first_line(ex)}); it may be "
            "truncated, fetch it again."
        ) from None


def _check_magic(file: Path) -> None:
    """Tell what is no pickle at all from one that is refused or damaged."""
    try:
        with file.open("rb") as opened:
            magic = opened.read(4)
    except OSError as ex:
        raise CheckpointError(f"{file}: cannot be read: {ex.strerror}.") from None

    if magic.startswith(b"PK") and _is_compressed(file):
        raise CheckpointError(
            f"{file}: is a compressed archive, which cannot be memory-mapped; write it "
            "anew with `torch.save`."
        )

    if not magic.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{file}: is not a checkpoint: it cannot be read as one of torch's files, "
            "and files of safetensors end in .safetensors."
        )


def _is_compressed(file: Path) -> bool:
    """Tell whether a zip archive holds deflated members: mapped as they lie, they would
    be taken for weights."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return False  # torch says better what is wrong with it

    return any(member.compress_type != zipfile.ZIP_STORED for member in members)


def _first_line(ex: Exception) -> str:
    text = str(ex).strip() or type(ex).__name__

    # torch wraps the cause in advice on how to run it all the same.
    if match := re.search(r"Unsupported \w+ [\w.]+|GLOBAL [\w.]+", text):
        return match[0]

    for line in text.splitlines():
        if "Unsupported" in line or "WeightsUnpickler error" in line:
            return line.strip().rstrip(".")

    return text.splitlines()[0].rstrip(".")
