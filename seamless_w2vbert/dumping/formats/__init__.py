"""The storage formats of a dump, by name: a writer and a reader of shards for each.

Comes in: a name. Goes out: a :class:`Format`. See ``base`` for what formats share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from seamless_w2vbert.dumping.formats.base import Layout, ShardReader, ShardWriter
from seamless_w2vbert.dumping.formats.fairseq import (
    FairseqReader,
    FairseqWriter,
    link_shards,
)
from seamless_w2vbert.dumping.formats.npy import NpyReader, NpyWriter
from seamless_w2vbert.dumping.formats.parquet import ParquetReader, ParquetWriter
from seamless_w2vbert.dumping.formats.safetensors import (
    SafetensorsReader,
    SafetensorsWriter,
)
from seamless_w2vbert.dumping.index import Part
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import ArgumentError

__all__ = [
    "FORMATS",
    "Format",
    "Layout",
    "ShardReader",
    "ShardWriter",
    "check_dtype",
    "find_format",
    "finish",
    "open_reader",
    "open_writer",
]


@dataclass(frozen=True)
class Format:
    """A way to store a shard."""

    name: str
    writer: type[ShardWriter]
    reader: type[ShardReader]

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that it can hold."""
        return self.writer.dtypes


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        format.name: format
        for format in (
            Format("parquet", ParquetWriter, ParquetReader),
            Format("safetensors", SafetensorsWriter, SafetensorsReader),
            Format("npy", NpyWriter, NpyReader),
            Format("fairseq", FairseqWriter, FairseqReader),
        )
    }
)
"""Every format by its name."""


def find_format(name: str) -> Format:
    """Return a format.

    :raises ArgumentError: if there is none of that name.
    """
    if name not in FORMATS:
        raise ArgumentError(
            f"`format` must be one of {', '.join(FORMATS)}, but is {name!r}."
        )

    return FORMATS[name]


def check_dtype(name: str, dtype: str) -> None:
    """See that a format can hold a dtype.

    :raises ArgumentError: if it cannot; the message says what can.
    """
    find_format(name).writer.check_dtype(dtype)


def open_writer(name: str, folder: Path, layout: Layout) -> ShardWriter:
    """Begin a shard in an empty local folder.

    :raises ArgumentError: if the format cannot hold such arrays or carried columns.
    """
    return find_format(name).writer(folder, layout)


def open_reader(name: str, path: Path, layout: Layout) -> ShardReader:
    """Open a shard on a local path.

    :raises DumpError: if it is missing or damaged.
    """
    return find_format(name).reader(path, layout)


def finish(
    name: str, store: Store, folder: str, parts: Sequence[Part], layout: Layout
) -> None:
    """Write what a format has besides its shards, when all of them are there.

    For ``fairseq`` these are links with the names that its scripts ask for, see
    :func:`~.fairseq.link_shards`.

    :param folder: the folder of the shards in the store.
    :param parts: the parts of the index, in order.
    """
    if name == "fairseq":
        files = (file for part in parts for file in part.files)
        shards = list(dict.fromkeys(file.partition("/")[0] for file in files))
        link_shards(store, folder, shards, layout)
