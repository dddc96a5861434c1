"""Kaldi data folders: ``wav.scp``, and ``segments`` beside it.

Comes in: a ``.scp`` file or its folder. Goes out: one utterance per recording, or per
segment where there are segments. Nothing in them is ever executed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pyarrow as pa

from seamless_w2vbert.dumping.sources.base import (
    Utterance,
    Wanted,
    exists,
    folder_of,
    read_entries,
    resolve,
    seconds,
    storable,
    utterance,
    working_folder,
)
from seamless_w2vbert.errors import ArgumentError, DumpError

_COLUMNS = {"speaker": "utt2spk", "text": "text"}


class Kaldi:
    """The recordings or segments of a data folder; ids are Kaldi's utterance ids.

    Paths are relative to the working directory, as in Kaldi. With segments, the paths
    of all recordings are held in memory, but not the segments.
    """

    streaming = False
    root = None

    def __init__(self, scp: str, wanted: Wanted) -> None:
        self.name = scp
        self.column_types = {column: pa.string() for column in wanted.columns}
        self._folder = folder_of(scp)
        segments = resolve(self._folder, "segments")
        self._segments = segments if exists(segments) else None
        self._tables = {}

        for column in wanted.columns:
            file = resolve(self._folder, _COLUMNS.get(column, ""))
            if column not in _COLUMNS or not exists(file):
                raise ArgumentError(
                    f"{scp}: has no column {column!r}; 'speaker' is read from a file "
                    "utt2spk beside it, 'text' from a file text."
                )
            self._tables[column] = file

    def __iter__(self) -> Iterator[Utterance]:
        look_up = {name: _look_up(file) for name, file in self._tables.items()}
        entries = self._recordings() if self._segments is None else self._cut()

        for key, path, start, end, where in entries:
            yield utterance(
                path,
                id=key,
                where=where,
                source=path,
                start=start,
                end=end,
                columns={name: get(key) for name, get in look_up.items()},
            )

    def _recordings(self) -> Iterator[tuple[str, str, None, None, str]]:
        base = working_folder(self.name)

        for number, key, path in _read(self.name):
            where = f"{self.name}, line {number}"
            if path.endswith("|"):
                raise DumpError(
                    f"{where}: is a command, and commands are not run here. Have "
                    "Kaldi run them, `wav-copy scp:wav.scp ark,scp:wav.ark,new.scp`, "
                    "and pass new.scp."
                )
            yield key, resolve(base, path), None, None, where

    def _cut(self) -> Iterator[tuple[str, str, float | None, float | None, str]]:
        paths = {key: path for key, path, *_ in self._recordings()}
        assert self._segments is not None

        for number, key, rest in _read(self._segments):
            where = f"{self._segments}, line {number}"
            fields = rest.split()
            if len(fields) == 4:
                raise DumpError(
                    f"{where}: selects channel {fields[3]}; write it to a file of its "
                    "own, since channels are averaged here."
                )
            if len(fields) != 3:
                raise DumpError(
                    f"{where}: expected utterance, recording, start and end, separated "
                    f"by spaces, not {storable(f'{key} {rest}')!r}."
                )
            recording, start, end = fields
            if recording not in paths:
                raise DumpError(
                    f"{where}: there is no recording {storable(recording)!r} in "
                    f"{self.name}."
                )
            until = seconds(end, where, "end")
            yield (
                key,
                paths[recording],
                seconds(start, where, "start"),
                None if until == -1 else until,  # Kaldi's "to the end"
                where,
            )


def _read(path: str) -> Iterator[tuple[int, str, str]]:
    for number, line in read_entries(path, errors="surrogateescape"):
        key, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
        if not rest.strip():
            raise DumpError(
                f"{path}, line {number}: expected an id and a value, separated by a "
                f"space, not {storable(line)!r}."
            )
        yield number, key, rest.strip()


def _look_up(path: str) -> Callable[[str], str | None]:
    """Return a function from ids to the values of a file. Both have to be sorted as
    Kaldi sorts, so that nothing has to be held."""
    entries = read_entries(path, errors="surrogateescape")
    current: tuple[bytes, str] = (b"", "")
    at_end = False
    asked = b""

    def look_up(key: str) -> str | None:
        nonlocal current, at_end, asked
        wanted = os.fsencode(key)
        if wanted < asked:
            raise _unsorted(path, key)
        asked = wanted

        while not at_end and current[0] < wanted:
            number, line = next(entries, (0, ""))
            if not number:
                at_end = True
                break
            name, _, value = line.strip().replace("\t", " ", 1).partition(" ")
            if os.fsencode(name) < current[0]:
                raise _unsorted(path, name)
            current = os.fsencode(name), value.strip()

        return storable(current[1]) if current[0] == wanted else None

    return look_up


def _unsorted(path: str, key: str) -> DumpError:
    return DumpError(
        f"{path}: cannot be looked up, since it or the utterances are not sorted as "
        f"Kaldi sorts ({storable(key)!r} comes too late); run Kaldi's "
        "utils/fix_data_dir.sh, or leave the column out."
    )
