"""A shard as a Parquet file: a row per utterance and layer, for everyone's tools.

Comes in: utterances. Goes out: a file that pyarrow, pandas, polars, DuckDB and
``datasets`` open without this package. Arrays never pass through Python objects.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from torch import Tensor

from seamless_w2vbert.dumping.formats.base import (
    Layout,
    ShardReader,
    ShardWriter,
    reading,
)
from seamless_w2vbert.errors import ArgumentError, DumpError

COLUMNS: Final = ("id", "layer", "frames", "embedding")
"""The columns that come before the carried ones."""

GROUP_BYTES: Final = 2**22
"""The embeddings of a row group, which is what a writer holds and a reader decodes."""

_GROUP_ROWS: Final = 2**14
"""The most rows of a group, whose carried columns are held too."""

_MAX_PAGE: Final = 2**31 - 2**20
"""The most bytes of a row: it lies within one page, whose size is a signed int32."""

_LEVELS_PER_FRAME: Final = 8
"""Bytes that Parquet needs besides the values to tell where a frame ends, at most."""

_ARROW_DTYPES: Final = {"float32": pa.float32(), "float16": pa.float16()}


class ParquetWriter(ShardWriter):
    """Writes ``shard.parquet``, in row groups of :data:`GROUP_BYTES`.

    A row group is copied together in one buffer, written and forgotten. An utterance
    larger than that is a row group of its own, written from the caller's array; while
    that happens Parquet needs several times its size.
    """

    format = "parquet"

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        self._path = folder / "shard.parquet"
        self._schema = _schema(layout)
        self._buffer = np.empty(
            GROUP_BYTES // np.dtype(layout.dtype).itemsize, layout.dtype
        )
        self._used = 0
        self._pending: list[tuple[Any, ...]] = []
        self._rows = 0
        self._file = pa.OSFile(str(self._path), "wb")
        self._writer = pq.ParquetWriter(
            self._file,
            self._schema,
            compression="none",
            use_dictionary=False,
            # Of embeddings they help no one, and cost a pass over the values.
            write_statistics=["id", "layer", "frames"],
            # The default, 1024 values, takes twice as long to write and to read.
            write_batch_size=2**16,
        )

    @classmethod
    def check_layout(cls, layout: Layout) -> None:
        super().check_layout(layout)

        if taken := sorted(set(COLUMNS) & set(layout.columns)):
            raise ArgumentError(
                f"The format parquet has a column {taken[0]!r} of its own, so it "
                "cannot carry one of that name; rename it in the source."
            )

    @classmethod
    def check_size(cls, id: str, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()

        if size + _LEVELS_PER_FRAME * len(tensor) > _MAX_PAGE:
            raise DumpError(
                f"{id}: has {size / 2**30:.1f} GiB in one layer, and a row of a "
                "Parquet file holds less than 2 GiB; store float16 instead of float32, "
                "or take the format npy, safetensors or fairseq, or cut the recording."
            )

    def _write(
        self,
        id: str,
        tensors: Sequence[Tensor],
        columns: Mapping[str, Any],
        frames: int | None,
    ) -> int:
        carried = [columns.get(name) for name in self._layout.columns]

        for value, (name, type_) in zip(
            carried, self._layout.columns.items(), strict=True
        ):
            try:
                pa.array([value], type_)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as ex:
                raise DumpError(
                    f"{id}: column {name!r} is {type_}, but holds {value!r}: {ex}"
                ) from None

        offset = self._rows

        for layer, tensor in zip(self._layout.layers, tensors, strict=True):
            values = tensor.numpy().reshape(-1)
            row = (id, layer, frames, values.size // self._layout.dim, *carried)

            if (
                self._used + values.size > self._buffer.size
                or len(self._pending) == _GROUP_ROWS
            ):
                self._flush()

            if values.size > self._buffer.size:
                self._write_group([row], values)
            else:
                self._buffer[self._used : self._used + values.size] = values
                self._used += values.size
                self._pending.append(row)

            self._rows += 1

        return offset

    def _flush(self) -> None:
        if self._pending:
            self._write_group(self._pending, self._buffer[: self._used])
        self._pending = []
        self._used = 0

    def _write_group(self, rows: list[tuple[Any, ...]], values: NDArray[Any]) -> None:
        ids, layers, frames, lengths, *carried = zip(*rows, strict=True)
        type_ = self._schema.field("embedding").type
        vectors_type = type_ if self._layout.pooled else type_.value_type

        embedding = pa.FixedSizeListArray.from_arrays(
            pa.Array.from_buffers(
                vectors_type.value_type, values.size, [None, pa.py_buffer(values)]
            ),
            type=vectors_type,
        )

        if not self._layout.pooled:
            ends = np.cumsum((0, *lengths), dtype=np.int32)
            embedding = pa.ListArray.from_arrays(pa.array(ends), embedding, type=type_)

        arrays = [
            *(
                pa.array(ids),
                pa.array(layers, pa.int16()),
                pa.array(frames, pa.int64()),
            ),
            embedding,
            *map(pa.array, carried, self._layout.columns.values()),
        ]
        self._writer.write_table(
            pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=len(rows)
        )

    def close(self) -> Path:
        self._flush()
        self._writer.close()
        self._file.close()

        return self._path

    def discard(self) -> None:
        with suppress(OSError, pa.ArrowException):
            self._writer.close()
        with suppress(OSError, pa.ArrowException):
            self._file.close()


@dataclass(frozen=True)
class _Group:
    """A decoded row group."""

    ids: pa.ChunkedArray
    layers: NDArray[np.int16]

    vectors: NDArray[Any]
    """The vectors of all rows. *Shape:* (vectors, dim)"""

    ends: NDArray[Any] | None
    """Where each row begins in ``vectors``, and the last one ends; None if pooled."""


class ParquetReader(ShardReader):
    """Reads ``shard.parquet`` through a memory map, a row group at a time.

    Parquet's values are not an array in the file: they are decoded, into memory. The
    last two row groups stay decoded, so that reading in order decodes each only once.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(path, layout)
        self._groups: dict[int, _Group] = {}
        self._lock = threading.Lock()

        with reading(path):
            self._file = pq.ParquetFile(pa.memory_map(str(path)))
            metadata = self._file.metadata
            expected = _schema(layout).field("embedding").type
            if self._file.schema_arrow.field("embedding").type != expected:
                raise ValueError(f"its embeddings are not {expected}")
            self._ends = np.cumsum(
                [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            )

    def _find(self, id: str, layer: int, offset: int, frames: int) -> NDArray[Any]:
        row = offset + self._layout.layers.index(layer)
        number = int(np.searchsorted(self._ends, row, side="right"))
        group = self._group(number)
        row -= int(self._ends[number - 1]) if number else 0

        if group.ids[row].as_py() != id or group.layers[row] != layer:
            self._differs(f"{id}, layer {layer}, is not where it should be")

        if group.ends is None:
            return group.vectors[row : row + 1].reshape(-1)

        return group.vectors[group.ends[row] : group.ends[row + 1]]

    def _group(self, number: int) -> _Group:
        with self._lock:
            group = self._groups.pop(number, None)
            if group is None:
                while len(self._groups) > 1:
                    self._groups.pop(next(iter(self._groups)))
                group = self._decode(number)
            # The one used last comes last.
            self._groups[number] = group

        return group

    def _decode(self, number: int) -> _Group:
        # One column has nearly all the bytes: threads would only get in the way.
        table = self._file.read_row_group(
            number, columns=["id", "layer", "embedding"], use_threads=False
        )
        embedding = table.column("embedding").combine_chunks()
        if isinstance(embedding, pa.ChunkedArray):
            (embedding,) = embedding.chunks
        ends = None

        if not self._layout.pooled:
            ends = embedding.offsets.to_numpy()
            embedding = embedding.values

        vectors = embedding.values.to_numpy().reshape(-1, self._layout.dim)

        return _Group(
            table.column("id"), table.column("layer").to_numpy(), vectors, ends
        )

    def _lend(self, array: NDArray[Any]) -> NDArray[Any]:
        # A view keeps its whole row group in memory.
        return array if 2 * array.nbytes > GROUP_BYTES else np.array(array)

    def release(self) -> None:
        with self._lock:
            self._groups.clear()

    def _offsets(self, frames: Sequence[int]) -> Sequence[int]:
        return [i * len(self._layout.layers) for i in range(len(frames))]

    def _check(self, ids: Sequence[str], frames: Sequence[int]) -> None:
        layers = self._layout.layers
        table = self._file.read(columns=["id", "layer", "frames"])
        held = zip(*(column.to_pylist() for column in table.columns), strict=True)
        expected = [
            (id, layer, n)
            for id, n in zip(ids, frames, strict=True)
            for layer in layers
        ]

        if table.num_rows != len(expected):
            self._differs(f"it has {table.num_rows} rows, not {len(expected)}")

        for row, (has, wants) in enumerate(zip(held, expected, strict=True)):
            # Of a pooled vector it may not be known how many frames it stands for.
            if has[:2] != wants[:2] or has[2] not in (wants[2], None):
                self._differs(f"row {row} is {has}, not {wants}")


def _schema(layout: Layout) -> pa.Schema:
    # Nothing within an embedding can be null; with that said, Parquet needs half the
    # time. What a list holds is named as Parquet names it.
    value = pa.field("element", _ARROW_DTYPES[layout.dtype], nullable=False)
    embedding = pa.list_(value, layout.dim)

    if not layout.pooled:
        embedding = pa.list_(pa.field("element", embedding, nullable=False))

    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("layer", pa.int16(), nullable=False),
            pa.field("frames", pa.int64()),
            pa.field("embedding", embedding, nullable=False),
            *(pa.field(name, type_) for name, type_ in layout.columns.items()),
        ]
    )
