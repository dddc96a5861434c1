"""Manifests with columns: CSV, TSV, JSON lines, Parquet.

Comes in: a file, or anything else that gives rows. Goes out: one utterance per row,
from its columns for the audio and the id, ``start`` and ``end`` in seconds, and those
that are carried.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from seamless_w2vbert.dumping.sources.base import (
    Utterance,
    Wanted,
    basename,
    folder_of,
    open_binary,
    read_entries,
    read_lines,
    reading,
    resolve,
    seconds,
    storable,
    utterance,
)
from seamless_w2vbert.errors import ArgumentError, DumpError

Rows: TypeAlias = "Iterable[tuple[int, Mapping[str, Any]]]"
"""Rows with their numbers: of the line in a text file, else of the row from 0."""

_TEXT = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view")

_LARGEST_FIELD = 2**31 - 1
"""Of a CSV file; Python's own limit is 128 kB."""

_FIRST_LINES = 100
"""The JSON lines that say which keys there are: a key may be left out where it is
null."""

_PARQUET_BUFFER = 1 << 20
"""The bytes of a column that are read at a time. Without, it is all of a row group:
gigabytes, where the audio itself is in it."""


class Table:
    """Rows of any kind as a source."""

    def __init__(
        self,
        name: str,
        wanted: Wanted,
        rows: Callable[[], Rows],
        *,
        names: Sequence[str],
        types: Mapping[str, pa.DataType] | None = None,
        base: str = "",
        label: str | None = None,
        unit: str = "line",
        streaming: bool = False,
    ) -> None:
        """
        :param names: the columns there are.
        :param types: the types of the carried ones; None for text.
        :param base: the folder that paths are relative to.
        :param label: what rows that hold the audio itself are named after.
        :raises ArgumentError: if a column that is wanted is missing.
        """
        wanted.check(name, names)

        self.name = name
        self.root = base or None
        self.streaming = streaming
        self.column_types = {
            column: pa.string() if types is None else plain_type(types[column])
            for column in wanted.columns
        }
        self._wanted = wanted
        self._rows = rows
        self._base = base
        self._label = basename(name) if label is None else label
        self._unit = unit
        self._is_text = types is None

    def __iter__(self) -> Iterator[Utterance]:
        for number, row in self._rows():
            yield self._utterance(number, row)

    def _utterance(self, number: int, row: Mapping[str, Any]) -> Utterance:
        where = f"{self.name}, {self._unit} {number}"
        place = f"{self._label}:{number}"
        data, path = _audio_of(row.get(self._wanted.audio), where)
        source = resolve(self._base, path) if data is None and path else place

        return utterance(
            data if data is not None else source if path else None,
            id=row.get(self._wanted.id),
            fallback=path if data is None and path else place,
            where=where,
            source=source,
            start=seconds(row.get("start"), where, "start"),
            end=seconds(row.get("end"), where, "end"),
            columns={
                column: _text(row.get(column)) if self._is_text else row.get(column)
                for column in self._wanted.columns
            },
        )


def _audio_of(value: Any, where: str) -> tuple[bytes | None, str | None]:
    """Return the bytes or the path in a cell; neither if it is null."""
    if isinstance(value, Mapping):  # what `datasets` stores
        data, path = value.get("bytes"), value.get("path")
    elif isinstance(value, bytes):
        data, path = value, None
    else:
        data, path = None, value

    if path is not None and not isinstance(path, str):
        raise DumpError(
            f"{where}: the audio is of type {type(path).__name__}; expected a path."
        )

    return data, path or None


def _text(value: Any) -> str | None:
    if value is None:
        return None

    return storable(
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that the Python values of a column have in any table."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type

    return pa.string() if str(kind) in _TEXT else kind


# -- text ----------------------------------------------------------------------------


def open_csv(path: str, wanted: Wanted) -> Table:
    """Open a ``.csv`` file; its first row names the columns.

    :raises DumpError: if it cannot be read.
    :raises ArgumentError: if a column that is wanted is missing.
    """
    return _open_text(path, wanted, lambda: _csv_fields(path))


def open_tsv(path: str, wanted: Wanted) -> Table:
    """Open a ``.tsv`` file with a header row, as Seamless' and stopes' manifests are:
    a tab ends a field and a line break a row, and quotes are part of the text.

    :raises DumpError: if it cannot be read.
    :raises ArgumentError: if a column that is wanted is missing.
    """

    def fields() -> Iterator[tuple[int, list[str]]]:
        for number, line in read_entries(path):
            yield number, line.split("\t")

    return _open_text(path, wanted, fields)


def _open_text(
    path: str, wanted: Wanted, fields: Callable[[], Iterator[tuple[int, list[str]]]]
) -> Table:
    _, names = next(fields(), (0, []))

    if len(set(names)) < len(names):
        raise DumpError(f"{path}: two columns have the same name: {', '.join(names)}.")

    def rows() -> Rows:
        for number, values in islice(fields(), 1, None):
            if len(values) != len(names):
                raise DumpError(
                    f"{path}, line {number}: has {len(values)} fields; expected "
                    f"{len(names)}, as in the header."
                )
            yield number, dict(zip(names, values, strict=True))

    return Table(path, wanted, rows, names=names, base=folder_of(path))


def _csv_fields(path: str) -> Iterator[tuple[int, list[str]]]:
    # The limit is the process's; it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_FIELD))
    # Strict: a quote without its end would swallow the rows behind it.
    reader = csv.reader((line for _, line in read_lines(path)), strict=True)

    while True:
        try:
            fields = next(reader, None)
        except csv.Error as ex:
            raise DumpError(
                f"{path}, line {reader.line_num}: is not CSV ({ex})."
            ) from None
        if fields is None:
            return
        if any(field.strip() for field in fields):
            yield reader.line_num, fields


def open_json_lines(path: str, wanted: Wanted) -> Table:
    """Open a file with one JSON object per line.

    :raises DumpError: if it cannot be read.
    :raises ArgumentError: if a column that is wanted is missing.
    """
    names: dict[str, None] = {}
    for _, row in islice(read_json_lines(path), _FIRST_LINES):
        names.update(dict.fromkeys(row))

    return Table(
        path,
        wanted,
        lambda: read_json_lines(path),
        names=list(names),
        base=folder_of(path),
    )


def read_json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Give the objects of a file with one per line, with the number of the line.

    :raises DumpError: if a line is not a JSON object.
    """
    for number, line in read_entries(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as ex:
            row, reason = None, f" ({ex})"
        else:
            reason = f", not a {type(row).__name__}"

        if not isinstance(row, dict):
            hint = ""
            if number == 1 and line.lstrip().startswith("["):
                hint = "; take an array apart with `jq -c '.[]'`"
            raise DumpError(
                f"{path}, line {number}: expected a JSON object{reason}{hint}."
            )
        yield number, row


# -- Parquet -------------------------------------------------------------------------


def open_parquet(path: str, wanted: Wanted) -> Table:
    """Open a ``.parquet`` file.

    :raises DumpError: if it cannot be read.
    :raises ArgumentError: if a column that is wanted is missing, or the audio is in no
        form that can be read.
    """
    with _parquet(path) as file:
        schema = file.schema_arrow

    if wanted.audio in schema.names:
        check_audio_type(path, wanted, schema.field(wanted.audio).type)

    used = {wanted.audio, wanted.id, "start", "end", *wanted.columns}
    # Batches are few rows where each may be megabytes.
    audio_is_text = wanted.audio in schema.names and _is_text(
        schema.field(wanted.audio).type
    )
    batch_size = 1024 if audio_is_text else 8

    def rows() -> Rows:
        number = 0
        with _parquet(path) as file:
            batches = file.iter_batches(
                batch_size=batch_size,
                columns=[name for name in schema.names if name in used],
            )
            for batch in batches:
                for row in batch.to_pylist():
                    yield number, row
                    number += 1

    return Table(
        path,
        wanted,
        rows,
        names=schema.names,
        types={field.name: field.type for field in schema},
        base=folder_of(path),
        unit="row",
    )


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file, and say which it is that cannot be read."""
    try:
        with reading(path), open_binary(path) as opened:
            yield pq.ParquetFile(opened, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
    except pa.ArrowException as ex:
        reason = str(ex).splitlines()[0].rstrip(".")
        raise DumpError(f"{path}: cannot be read as Parquet: {reason}.") from None


def check_audio_type(name: str, wanted: Wanted, kind: pa.DataType) -> None:
    """
    :raises ArgumentError: if a column of this type cannot be the audio.
    """
    if pa.types.is_struct(kind):
        fields = {kind.field(n).name for n in range(kind.num_fields)}
        readable = bool(fields & {"bytes", "path"})
    else:
        readable = _is_text(kind) or str(kind) in _BYTES or pa.types.is_null(kind)

    if not readable:
        raise ArgumentError(
            f"{name}: the column {wanted.audio!r} is of type {kind}; expected paths, "
            "bytes of audio files, or a struct of both."
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type

    return str(kind) in _TEXT
