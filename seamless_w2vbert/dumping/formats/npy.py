"""A shard as a folder of ``.npy`` files, one per utterance and layer.

Comes in: utterances. Goes out: files that ``np.load`` opens, under names that can be
told from the ids and that every file system takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from numpy.typing import NDArray
from torch import Tensor

from seamless_w2vbert.dumping.formats.base import (
    Layout,
    ShardReader,
    ShardWriter,
    map_npy,
    npy_header,
    reading,
)

_MAX_NAME: Final = 255
"""Bytes of the longest file name that file systems take."""

_SUFFIX: Final = len("#99.npy")


class NpyWriter(ShardWriter):
    """Writes ``shard/<name>.npy``; of several layers, ``shard/<name>#<layer>.npy``."""

    format = "npy"

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        self._path = folder / "shard"
        self._path.mkdir()
        self._names: set[str] = set()

    def _write(
        self,
        id: str,
        tensors: Sequence[Tensor],
        columns: Mapping[str, Any],
        frames: int | None,
    ) -> int:
        name = file_name(id)

        # To some file systems names that differ only in case are the same.
        if name.lower() in self._names:
            name = unique_name(id)

        self._names.add(name.lower())

        for layer, tensor in zip(self._layout.layers, tensors, strict=True):
            file = self._path / _with_suffix(name, layer, self._layout)
            with open(file, "wb") as opened:
                opened.write(npy_header(self._layout.dtype, tuple(tensor.shape)))
                opened.write(tensor.numpy().data)

        return 0

    def close(self) -> Path:
        return self._path


class NpyReader(ShardReader):
    """Reads ``shard/<name>.npy``: arrays are mapped, small ones loaded."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)

        with reading(path):
            if not path.is_dir():
                raise FileNotFoundError(2, "No such folder", str(path))

    def _find(self, id: str, layer: int, offset: int, frames: int) -> NDArray[Any]:
        path = self._path / _with_suffix(unique_name(id), layer, self._layout)

        if not path.exists():
            path = self._path / _with_suffix(file_name(id), layer, self._layout)

        with reading(path):
            array = map_npy(path)
            if array.dtype != self._layout.dtype:
                raise ValueError(f"it is not {self._layout.dtype} but {array.dtype}")

        return array

    def _check(self, ids: Sequence[str], frames: Sequence[int]) -> None:
        layers = self._layout.layers
        files = sum(1 for file in self._path.iterdir() if file.suffix == ".npy")

        if files != len(ids) * len(layers):
            self._differs(f"it has {files} files, not {len(ids) * len(layers)}")

        for id, n in zip(ids, frames, strict=True):
            for layer in layers:
                self.read(id, layer, 0, n, stop=0)


def file_name(id: str) -> str:
    """Return the name of an utterance's files, without layer and ``.npy``.

    Letters, digits, ``_``, ``-`` and ``.`` stay as they are; all else is
    percent-encoded, so that ``urllib.parse.unquote`` gives back the id. Only a name too
    long for a file ends in ``+`` and a digest of the id instead.
    """
    name = quote(id, safe="").replace("~", "%7E")

    if name.startswith("."):
        # A hidden file would be missed by `*.npy`.
        name = "%2E" + name[1:]

    if not name:
        return "%"

    return name if len(name) + _SUFFIX <= _MAX_NAME else unique_name(id)


def unique_name(id: str) -> str:
    """Return a name with a digest of the id, that no :func:`file_name` is like."""
    digest = hashlib.sha256(id.encode()).hexdigest()[:32]
    name = quote(id, safe="").replace("~", "%7E").replace(".", "%2E")
    name = name[: _MAX_NAME - _SUFFIX - len(digest) - 1]

    return f"{name}+{digest}"


def _with_suffix(name: str, layer: int, layout: Layout) -> str:
    return f"{name}#{layer}.npy" if len(layout.layers) > 1 else f"{name}.npy"
