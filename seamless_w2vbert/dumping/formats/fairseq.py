"""A shard as fairseq's scripts dump features: all frames in one array, and lengths.

Comes in: utterances. Goes out: per layer ``<layer>.npy``, the frames of all utterances
one after another, and ``<layer>.len``, the number of frames of each on a line, as
``examples/hubert/simple_kmeans/dump_hubert_feature.py`` writes and as its
``learn_kmeans.py`` and ``dump_km_label.py`` read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
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
from seamless_w2vbert.dumping.store import Store

LINKS: Final = "fairseq"
"""The folder of a dump in which shards have the names that fairseq asks for."""


class FairseqWriter(ShardWriter):
    """Writes ``shard/<layer>.npy`` and ``.len`` as a stream; nothing is held.

    The files hold neither ids nor carried columns: those are in the index alone. A
    pooled vector counts as one frame.
    """

    format = "fairseq"

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        self._path = folder / "shard"
        self._path.mkdir()
        self._total = 0
        self._arrays = [
            open(self._path / f"{layer}.npy", "wb")  # noqa: SIM115
            for layer in layout.layers
        ]
        self._lengths = [
            open(self._path / f"{layer}.len", "w")  # noqa: SIM115
            for layer in layout.layers
        ]

        for file in self._arrays:
            file.write(npy_header(layout.dtype, (0, layout.dim)))

    def _write(
        self,
        id: str,
        tensors: Sequence[Tensor],
        columns: Mapping[str, Any],
        frames: int | None,
    ) -> int:
        offset = self._total
        stored = 1 if self._layout.pooled else len(tensors[0])

        for tensor, array, lengths in zip(
            tensors, self._arrays, self._lengths, strict=True
        ):
            array.write(tensor.numpy().data)
            lengths.write(f"{stored}\n")

        self._total += stored

        return offset

    def close(self) -> Path:
        header = npy_header(self._layout.dtype, (self._total, self._layout.dim))

        for array, lengths in zip(self._arrays, self._lengths, strict=True):
            array.seek(0)
            array.write(header)
            array.close()
            lengths.close()

        return self._path

    def discard(self) -> None:
        for file in (*self._arrays, *self._lengths):
            with suppress(OSError):
                file.close()


def link_shards(
    store: Store, folder: str, shards: Sequence[str], layout: Layout
) -> None:
    """Give shards the names that fairseq's scripts ask for, as links.

    ``learn_kmeans.py OUT/fairseq layer17 <shards> ...`` then finds layer 17 of shard 0
    of 8 as ``layer17_0_8.npy``. Where there are no links, behind a URL, that is left.

    :param folder: the folder of the shards in the store.
    :param shards: their names, in order.
    """
    store.remove(LINKS)

    if store.is_remote:
        return

    links = store.path / LINKS

    with suppress(OSError):
        links.mkdir()
        for number, shard in enumerate(shards):
            for layer in layout.layers:
                for suffix in ("npy", "len"):
                    link = f"layer{layer}_{number}_{len(shards)}.{suffix}"
                    (links / link).symlink_to(f"../{folder}/{shard}/{layer}.{suffix}")


class FairseqReader(ShardReader):
    """Reads ``shard/<layer>.npy``: arrays are views of the mapped file."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        self._arrays = {layer: self._map(layer) for layer in layout.layers}

    def _map(self, layer: int) -> NDArray[Any]:
        path = self._path / f"{layer}.npy"

        with reading(path):
            array = map_npy(path)
            if array.dtype != self._layout.dtype or array.ndim != 2:
                raise ValueError(
                    f"it is not a matrix of {self._layout.dtype}, but {array.dtype} "
                    f"of shape {array.shape}"
                )

        return array

    def _find(self, id: str, layer: int, offset: int, frames: int) -> NDArray[Any]:
        stored = 1 if self._layout.pooled else frames
        array = self._arrays[layer][offset : offset + stored]

        return array.reshape(-1) if self._layout.pooled else array

    def _offsets(self, frames: Sequence[int]) -> Sequence[int]:
        lengths = [1] * len(frames) if self._layout.pooled else frames

        return [int(end) for end in np.cumsum([0, *lengths])[:-1]]

    def _check(self, ids: Sequence[str], frames: Sequence[int]) -> None:
        expected = [1] * len(ids) if self._layout.pooled else list(frames)

        for layer, array in self._arrays.items():
            path = self._path / f"{layer}.len"

            with reading(path):
                lengths = [int(line) for line in path.read_text().splitlines()]

            if lengths != expected:
                pairs = enumerate(zip_longest(lengths, expected), start=1)
                line = next(i for i, (has, wants) in pairs if has != wants)
                self._differs(f"{path.name} has another length in line {line}")

            if array.shape != (sum(expected), self._layout.dim):
                self._differs(f"{layer}.npy has shape {array.shape}")
