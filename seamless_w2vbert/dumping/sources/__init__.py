"""Sources of a dump: whatever names audio -> a lazy stream of utterances.

Comes in: a SOURCE, recognised by what it is. Goes out: a :class:`Source`, which gives
the same utterances with the same ids in the same order whenever it is iterated, and
holds no more of them than it has to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from seamless_w2vbert.dumping.sources import cuts, files, huggingface, kaldi, tables
from seamless_w2vbert.dumping.sources.base import (
    Source,
    Utterance,
    Wanted,
    exists,
    is_folder,
    read_entries,
    resolve,
)
from seamless_w2vbert.errors import ArgumentError, DumpError

__all__ = ["Source", "Utterance", "open_source"]

_TEXT_SUFFIXES = (".txt", ".lst", ".tsv", ".csv", ".scp", ".jsonl", ".json")
"""Of manifests, which may end in .gz too."""

_KINDS = (
    "a folder, a glob, an audio file, a list (.txt, .lst), a manifest (.tsv, .csv, "
    ".jsonl, .json, .parquet, .scp), datasets:NAME, or - for standard input"
)


def open_source(
    spec: str | os.PathLike[str] | Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    columns: Sequence[str] = (),
    audio_column: str = "audio",
    id_column: str = "id",
    stdin: Any = None,
) -> Source:
    """Open what a dump is made from.

    ====================  =============================================================
    spec                  what it is, and the ids of its utterances
    ====================  =============================================================
    ``-``                 paths on standard input, one per line; the paths
    ``datasets:NAME``     a Hugging Face dataset, streamed; ``datasets:NAME:CONFIG`` or
                          ``datasets:NAME:CONFIG:SPLIT`` where there are several; NAME
                          may be a folder. Ids as of a ``.parquet`` file
    a folder              with ``wav.scp``: as that file; by ``save_to_disk`` of
                          `datasets`: as ``.parquet``; any other: all audio files under
                          it, by their suffix, hidden ones left out; paths relative to
                          it, suffix kept
    ``data/**/*.flac``    the files that match, if there is no file of that name; paths
                          relative to the part before the first wildcard, ``data``
    ``.txt``, ``.lst``    paths, one per line; the paths as they stand
    ``.tsv``              if the first line has no tab: fairseq's, a root folder, then
                          ``path<TAB>samples``; paths relative to the root. Else as
                          ``.csv``, without quoting
    ``.csv``              a header row, then a row per utterance. The audio column has
                          paths or ``archive:offset:length``; ``start`` and ``end``, if
                          there are any, cut a clip, in seconds. The id column, else the
                          path as it stands, and of a clip ``path#start-end``
    ``.jsonl``,           Lhotse cuts, if the first line is one; their ids. Else JSON
    ``.json``             objects, one per line, with keys as ``.csv`` has columns
    ``.parquet``          columns as ``.csv``. The audio may also be bytes, or a struct
                          ``{bytes, path}`` as `datasets` writes it; where it is bytes,
                          the id is the id column, else ``name.parquet:row``, from 0
    ``.scp``              Kaldi's; with ``segments`` beside it, one per segment; Kaldi's
                          ids. Columns: ``speaker`` (utt2spk), ``text``
    an audio file         itself; the path as it stands
    a list, or any other  paths, (id, audio) pairs, or :class:`Utterance`; the path or
    Python iterable       the id. What can be iterated only once is refused: pass a
                          function that returns a new iterator
    a :class:`Source`     itself
    ====================  =============================================================

    Text files may end in ``.gz``. Files, folders and globs may be URLs that fsspec
    knows, and so may the paths in manifests. Relative paths in manifests with columns
    are relative to the folder of the manifest; those in lists, ``.scp`` files, Lhotse
    cuts and fairseq roots to the working directory or, if the file is behind a URL, to
    its folder.

    :param columns: the columns to carry along.
    :param audio_column: the column with the audio, of manifests that have columns.
    :param id_column: the column with the id, likewise.
    :param stdin: what ``-`` reads; the process's standard input if None.
    :raises ArgumentError: if there is no such source, it is of no known kind, a column
        is missing, or a package that it takes.
    :raises DumpError: if it is empty or cannot be read; also later, while it is
        iterated, where a line is not what it should be.
    """
    if isinstance(columns, str):
        raise ArgumentError(f"`columns` is {columns!r}; pass a list of names.")

    wanted = Wanted(tuple(dict.fromkeys(columns)), audio_column, id_column)

    if isinstance(spec, (str, os.PathLike)):
        source = _open(os.fsdecode(spec), wanted, stdin)
    elif hasattr(spec, "column_types") and hasattr(spec, "streaming"):
        source = spec  # type: ignore[assignment]
    else:
        source = files.Items(spec, wanted)

    # What is empty or broken from the start shows now, unless it has to be fetched.
    if not source.streaming and not list(islice(source, 1)):
        raise DumpError(f"{source.name}: there is no audio in it.{_hint(source)}")

    return source


def _open(spec: str, wanted: Wanted, stdin: Any) -> Source:
    if not spec:
        raise ArgumentError(f"The source is empty text; expected {_KINDS}.")

    if spec == "-":
        return files.Stdin(sys.stdin if stdin is None else stdin, wanted)

    if spec.startswith(huggingface.PREFIX):
        return huggingface.open_named(spec, wanted)

    if not exists(spec):
        if not files.is_glob(spec):
            raise ArgumentError(
                f"{spec}: there is no such file or folder; expected {_KINDS}."
            )
        if _suffix(spec) in (*_TEXT_SUFFIXES, ".parquet"):
            raise ArgumentError(
                f"{spec}: names more than one manifest; pass one at a time, or of "
                "Parquet files their folder as datasets:FOLDER."
            )
        return files.Glob(spec, wanted)

    return _open_folder(spec, wanted) if is_folder(spec) else _open_file(spec, wanted)


def _open_folder(folder: str, wanted: Wanted) -> Source:
    scp = resolve(folder, "wav.scp")

    if exists(scp):
        return kaldi.Kaldi(scp, wanted)

    if huggingface.is_saved(folder):
        return huggingface.open_saved(folder, wanted)

    return files.Folder(folder, wanted)


def _open_file(path: str, wanted: Wanted) -> Source:
    suffix = _suffix(path)

    if suffix in (".txt", ".lst"):
        return files.PathList(path, wanted)
    if suffix == ".scp":
        return kaldi.Kaldi(path, wanted)
    if suffix == ".parquet":
        return tables.open_parquet(path, wanted)
    if suffix == ".csv":
        return tables.open_csv(path, wanted)
    if suffix == ".tsv":
        first = _first_line(path)
        if "\t" in first or first == wanted.audio:
            return tables.open_tsv(path, wanted)
        return files.FairseqManifest(path, wanted)
    if suffix in (".jsonl", ".json"):
        _first_line(path)
        _, first_row = next(tables.read_json_lines(path))
        if cuts.is_cut(first_row):
            return cuts.Cuts(path, wanted)
        return tables.open_json_lines(path, wanted)
    if suffix in files.AUDIO_SUFFIXES:
        return files.Items([path], wanted)

    raise ArgumentError(f"{path}: is of no known kind; expected {_KINDS}.")


def _first_line(path: str) -> str:
    for _, line in read_entries(path, errors="surrogateescape"):
        return line

    raise DumpError(f"{path}: is empty.")


def _suffix(path: str) -> str:
    """Return the suffix of a file, that before .gz of text."""
    stem, suffix = os.path.splitext(path.lower())

    if suffix == ".gz":
        inner = os.path.splitext(stem)[1]
        return inner if inner in _TEXT_SUFFIXES else suffix

    return suffix


def _hint(source: Source) -> str:
    if not isinstance(source, files.Folder):
        return ""

    return (
        " A folder is searched for files such as .wav and .flac; a folder of Parquet "
        "files is datasets:FOLDER."
    )
