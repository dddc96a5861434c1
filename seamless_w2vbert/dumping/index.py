"""The index of a dump: one row per utterance, one Parquet file per shard.

Comes in: what became of each utterance of a shard. Goes out: ``index/part-*.parquet``.
Its appearance is what commits a shard: it names the shard's files with their checksums,
and no file counts that no part names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from seamless_w2vbert.dumping.statistics import Moments, merge_into
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import DumpError

FOLDER = "index"

DATA: Final = "data"
"""The folder of the shards' files."""

EMBEDDED, FAILED = "embedded", "failed"

_METADATA = b"seamless_w2vbert"

_KEYS = ("first", "count", "failed", "samples", "attempt", "files")
"""What of a :class:`Part` is kept in the footer of its file."""

_FIELDS = [
    pa.field("id", pa.string()),
    pa.field("source", pa.string()),
    pa.field("start", pa.float64()),
    pa.field("end", pa.float64()),
    pa.field("samples", pa.int64()),
    pa.field("frames", pa.int64()),
    pa.field("shard", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("status", pa.string()),
    pa.field("error", pa.string()),
]

NAMES = tuple(field.name for field in _FIELDS)
"""The columns that every index has; carried columns stand behind them."""


@dataclass(frozen=True)
class Part:
    """A committed shard."""

    store: Store
    name: str
    first: int
    """The position of its first utterance in the source."""

    count: int
    failed: int
    samples: int
    """The samples at 16 kHz of its embedded utterances."""

    attempt: int
    """Which retry it is of; 0 for none."""

    files: Mapping[str, Mapping[str, Any]]
    """``bytes`` and ``sha256`` of each file, by name under ``data/``."""

    @property
    def shards(self) -> set[str]:
        """The names of its files and folders under ``data/``: one, or none."""
        return {name.partition("/")[0] for name in self.files}

    def moments(self) -> dict[int, Moments]:
        """Read the statistics of its frames, by layer."""
        stored = _read_metadata(self.store, self.name)["moments"]
        return {int(layer): Moments.from_json(data) for layer, data in stored.items()}

    def ids(self) -> list[str]:
        """Return the ids of its utterances, in order."""
        return [str(id) for id in self.table(["id"])["id"].to_pylist()]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read its rows.

        :raises DumpError: if the file is damaged.
        """
        try:
            return pq.read_table(self.store.local(self.name), columns=columns)
        except (pa.ArrowException, OSError, KeyError) as ex:
            raise _damaged(self.store, self.name, ex) from None


def name_of(first: int) -> str:
    """Return the name of the part of a shard."""
    return f"{FOLDER}/part-{first:012d}.parquet"


def write_part(
    store: Store,
    first: int,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, pa.DataType],
    files: Mapping[str, Mapping[str, Any]],
    moments: Mapping[int, Moments],
    attempt: int = 0,
) -> Part:
    """Commit a shard.

    :param rows: the fields of :data:`NAMES` and the carried columns, per utterance.
    :param columns: the types of the carried columns.
    """
    failed = sum(row["status"] == FAILED for row in rows)
    part = Part(
        store=store,
        name=name_of(first),
        first=first,
        count=len(rows),
        failed=failed,
        samples=sum(row["samples"] for row in rows if row["status"] == EMBEDDED),
        attempt=attempt,
        files=files,
    )
    metadata = {
        **{key: getattr(part, key) for key in _KEYS},
        "moments": {str(layer): m.to_json() for layer, m in moments.items()},
    }
    schema = pa.schema(
        [*_FIELDS, *(pa.field(name, kind) for name, kind in columns.items())],
        metadata={_METADATA: json.dumps(metadata)},
    )

    with store.workspace() as folder:
        file = folder / "part.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows), schema), file)
        store.put(file, part.name)

    return part


def read_parts(store: Store) -> list[Part]:
    """Return the committed shards in order of position, from their footers alone.

    :raises DumpError: if one is damaged, or two overlap.
    """
    parts = [
        read_part(store, f"{FOLDER}/{name}")
        for name in store.names(FOLDER)
        if name.startswith("part-") and name.endswith(".parquet")
    ]
    parts.sort(key=lambda part: part.first)

    for before, after in pairwise(parts):
        if before.first + before.count > after.first:
            raise DumpError(
                f"{store}: {before.name} and {after.name} overlap; two processes wrote "
                "to this dump. Dump into a new folder."
            )

    return parts


def total_moments(parts: Sequence[Part]) -> dict[int, Moments]:
    """Return the statistics of all frames, by layer."""
    total: dict[int, Moments] = {}

    for part in parts:
        merge_into(total, part.moments())

    return total


def check_whole(store: Store, parts: Sequence[Part], utterances: int) -> None:
    """
    :raises DumpError: if ``parts`` are not one after another, or not all there are.
    """
    expected = 0

    for part in parts:
        if part.first != expected:
            break
        expected += part.count

    if expected != utterances:
        raise DumpError(
            f"{store}: the index lacks utterance {expected} of {utterances}; run the "
            "same dump again, which embeds what is missing."
        )


def find_part(store: Store, first: int) -> Part | None:
    """Return the part of a shard, if it is committed."""
    name = name_of(first)

    return read_part(store, name) if store.exists(name) else None


def read_part(store: Store, name: str) -> Part:
    data = _read_metadata(store, name)

    return Part(store=store, name=name, **{key: data[key] for key in _KEYS})


def _read_metadata(store: Store, name: str) -> dict[str, Any]:
    try:
        data = json.loads(pq.read_schema(store.local(name)).metadata[_METADATA])
        if missing := {*_KEYS, "moments"} - data.keys():
            raise KeyError(*missing)
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as ex:
        raise _damaged(store, name, ex) from None

    return dict(data)


def _damaged(store: Store, name: str, ex: Exception) -> DumpError:
    reason = str(ex).strip().splitlines() or [type(ex).__name__]
    return DumpError(
        f"{store}/{name}: is damaged ({reason[0]}); remove it and dump again, which "
        "embeds the utterances of that shard anew."
    )
