"""Sources that only name files: folders, globs, lists, fairseq manifests, iterables.

Comes in: a folder, a pattern, a file with one path per line, or Python objects. Goes
out: utterances in a fixed order, with ids that do not depend on the machine where a
folder says what paths are relative to.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from seamless_w2vbert.audio import Clip, name_of
from seamless_w2vbert.dumping.sources.base import (
    Utterance,
    Wanted,
    check_id,
    exists,
    read_entries,
    reading,
    resolve,
    storable,
    utterance,
    working_folder,
)
from seamless_w2vbert.errors import ArgumentError, DumpError
from seamless_w2vbert.urls import filesystem, is_url

AUDIO_SUFFIXES = (
    *(".wav", ".wave", ".w64", ".rf64", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    *(".mp2", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".sph", ".nist", ".voc"),
    *(".m4a", ".aac", ".wma", ".amr"),
)
"""What a folder is searched for. The last four libsndfile cannot read: they are listed
as failed, with the way out, rather than left out unseen."""

_MAGIC = "*?["


class FileSource:
    """What sources that only name files have in common."""

    streaming = False

    def __init__(self, name: str, root: str | None = None) -> None:
        self.name = name
        self.root = root
        self.column_types: Mapping[str, pa.DataType] = {}


# -- folders and globs ---------------------------------------------------------------


class Folder(FileSource):
    """All audio files under a folder; ids are their paths relative to it."""

    def __init__(self, folder: str, wanted: Wanted) -> None:
        wanted.refuse(folder, "a folder")
        super().__init__(folder, folder)

    def __iter__(self) -> Iterator[Utterance]:
        for path in walk(self.name):
            if os.path.splitext(path)[1].lower() in AUDIO_SUFFIXES:
                yield _file(self.name, path)


class Glob(FileSource):
    """All files that match a pattern; ids are their paths relative to its part before
    the first wildcard."""

    def __init__(self, pattern: str, wanted: Wanted) -> None:
        wanted.refuse(pattern, "a glob")
        parts = pattern.split("/")
        first = next(n for n, part in enumerate(parts) if is_glob(part))
        folder = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else ".")
        super().__init__(pattern, folder)
        self._folder = folder
        self._parts = parts[first:]

        if not exists(folder):
            raise ArgumentError(f"{pattern}: there is no folder {folder}.")

    def __iter__(self) -> Iterator[Utterance]:
        depth = None if "**" in self._parts else len(self._parts)

        for path in walk(self._folder, depth):
            if _matches(path.split("/"), self._parts):
                yield _file(self._folder, path)


def is_glob(path: str) -> bool:
    """Tell whether a path has wildcards."""
    return any(char in path for char in _MAGIC)


def _matches(names: list[str], parts: list[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":
        return _matches(names, parts[1:]) or (
            bool(names) and _matches(names[1:], parts)
        )

    return (
        bool(names)
        and fnmatchcase(names[0], parts[0])
        and _matches(names[1:], parts[1:])
    )


def _file(folder: str, path: str) -> Utterance:
    full = resolve("" if folder == "." else folder, path)
    return utterance(full, id=path, where=full, source=full)


def walk(folder: str, max_depth: int | None = None) -> Iterator[str]:
    """Give the files under a folder, sorted by name level by level, relative to it.

    Only the entries of one folder per level are held. Hidden files and folders are left
    out; links to folders are followed, except back to one that they are in.

    :raises DumpError: if a folder cannot be read.
    """
    levels = [("", iter(_entries(folder)), {_identity(folder)})]

    while levels:
        prefix, entries, above = levels[-1]

        for name, is_folder in entries:
            path = prefix + name
            if not is_folder:
                yield path
            elif max_depth is None or len(levels) < max_depth:
                full = resolve(folder, path)
                identity = _identity(full)
                if identity not in above:
                    inside = iter(_entries(full))
                    levels.append((f"{path}/", inside, above | {identity}))
                    break
        else:
            levels.pop()


def _entries(folder: str) -> list[tuple[str, bool]]:
    """Return the names in a folder, sorted, and whether each is a folder."""
    with reading(folder):
        if not is_url(folder):
            with os.scandir(folder) as entries:
                found = [
                    (entry.name, _is_folder(entry))
                    for entry in entries
                    # No devices and pipes. A link to nowhere is a file that fails.
                    if entry.is_symlink() or entry.is_file() or entry.is_dir()
                ]
        else:
            fs, path = filesystem(folder)
            fs.invalidate_cache(path)  # of what was listed before
            found = [
                (entry["name"].rstrip("/").rpartition("/")[2], _is_prefix(entry))
                for entry in fs.ls(path, detail=True)
                # Object stores have an empty object for the folder itself.
                if entry["name"].strip("/") != path.strip("/")
            ]
            # Listings are cached: those of a whole bucket would pile up.
            fs.invalidate_cache(path)

    return sorted(entry for entry in found if not entry[0].startswith("."))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as ex:
        if ex.errno == errno.ELOOP:  # a link to itself
            return False
        raise


def _is_prefix(entry: Mapping[str, Any]) -> bool:
    return bool(entry["type"] == "directory")


def _identity(folder: str) -> Any:
    if is_url(folder):
        return folder

    with reading(folder):
        stat = os.stat(folder)

    return stat.st_dev, stat.st_ino


# -- lists ---------------------------------------------------------------------------


class PathList(FileSource):
    """A text file with one path per line; ids are the paths as they stand."""

    def __init__(self, path: str, wanted: Wanted, name: str | None = None) -> None:
        super().__init__(name or path)
        wanted.refuse(self.name, "a list of paths")
        self._path = path
        self._base = working_folder(path)

    def __iter__(self) -> Iterator[Utterance]:
        for number, path in read_entries(self._path, errors="surrogateescape"):
            full = resolve(self._base, path)
            where = f"{self.name}, line {number}"
            yield utterance(full, id=path, where=where, source=full)


class Stdin(PathList):
    """Paths on standard input, kept in a temporary file so that they can be read
    again."""

    def __init__(self, stdin: Any, wanted: Wanted) -> None:
        if stdin is None:  # a process can be started without one
            raise ArgumentError("`-` reads paths from standard input; there is none.")

        # Deleted when this source is no longer used.
        self._spool = tempfile.NamedTemporaryFile(prefix="seamless_w2vbert-")  # noqa: SIM115
        stream = getattr(stdin, "buffer", stdin)
        with reading("standard input"):
            if isinstance(stream.read(0), str):
                for line in stream:
                    self._spool.write(line.encode("utf-8", "surrogateescape"))
            else:
                shutil.copyfileobj(stream, self._spool)
            self._spool.flush()
        super().__init__(self._spool.name, wanted, name="standard input")


class FairseqManifest(FileSource):
    """fairseq's ``.tsv``: a root folder, then ``path<TAB>samples`` in each line; ids
    are the paths relative to the root."""

    def __init__(self, path: str, wanted: Wanted) -> None:
        wanted.refuse(path, "a fairseq manifest")
        _, root = next(read_entries(path, errors="surrogateescape"))
        super().__init__(path, resolve(working_folder(path), root))

    def __iter__(self) -> Iterator[Utterance]:
        entries = read_entries(self.name, errors="surrogateescape")
        next(entries)

        for number, line in entries:
            where = f"{self.name}, line {number}"
            path, tab, count = line.partition("\t")
            if not (path and tab and count.strip().isdecimal()):
                raise DumpError(
                    f"{where}: expected path<TAB>number of samples, as in fairseq's "
                    f"manifests, not {storable(line[:80])!r}."
                )
            full = resolve(self.root or "", path)
            yield utterance(
                full,
                id=path,
                where=where,
                source=full,
                samples=int(count),
            )


# -- Python objects ------------------------------------------------------------------


class Items(FileSource):
    """Paths, (id, audio) pairs or utterances in a list, or what a function gives."""

    def __init__(
        self, items: Iterable[Any] | Callable[[], Iterable[Any]], wanted: Wanted
    ) -> None:
        super().__init__(f"<{type(items).__name__}>")
        self._columns = tuple(wanted.columns)
        self.column_types = {column: pa.string() for column in self._columns}

        if isinstance(items, (bytes, bytearray, memoryview, np.ndarray, Tensor, Clip)):
            raise ArgumentError(f"{self.name} is one input; pass a list of them.")

        if isinstance(items, (Mapping, Set)):
            raise ArgumentError(
                f"{self.name} is no list; pass one of (id, audio) pairs, such as "
                "`sorted(audio_of.items())`."
            )

        self._open: Callable[[], Iterable[Any]]
        if isinstance(items, Iterable):
            if iter(items) is items:
                raise self._one_shot()
            self._open = lambda: items
        elif callable(items):
            first, second = items(), items()
            if not isinstance(first, Iterable):
                raise ArgumentError(f"{self.name} returned no iterable of inputs.")
            if first is second and iter(first) is first:
                raise self._one_shot()
            self._open = items
        else:
            raise ArgumentError(
                f"{self.name} is no source; pass a path, a URL, or a list of inputs."
            )

    def _one_shot(self) -> ArgumentError:
        return ArgumentError(
            f"{self.name} can be iterated only once, and a dump has to read its source "
            "again to resume; pass a list, or a function that returns a new iterator."
        )

    def __iter__(self) -> Iterator[Utterance]:
        for number, item in enumerate(self._open()):
            yield self._utterance(item, f"{self.name}, item {number}")

    def _utterance(self, item: Any, where: str) -> Utterance:
        if isinstance(item, Utterance):
            check_id(item.id, where)
            self._check_columns(item.columns, where)
            carried = {name: item.columns[name] for name in self._columns}
            return Utterance(**{**vars(item), "columns": carried})

        self._check_columns({}, where)

        if isinstance(item, (str, os.PathLike)):
            path = os.fsdecode(item)
            return utterance(path, id=path, where=where, source=path)

        if not isinstance(item, tuple) or len(item) != 2:
            raise ArgumentError(
                f"{where}: is {type(item).__name__}; expected a path, an (id, audio) "
                "pair or an Utterance."
            )

        id, audio = item
        if hasattr(audio, "read"):
            raise ArgumentError(
                f"{where}: an open file can be read only once; pass its path or bytes."
            )

        is_clip = isinstance(audio, Clip)
        return Utterance(
            id=check_id(id, where),
            audio=audio,
            source=storable(name_of(audio.audio if is_clip else audio)),
            start=audio.start if is_clip else None,
            end=audio.end if is_clip else None,
        )

    def _check_columns(self, present: Mapping[str, Any], where: str) -> None:
        for column in self._columns:
            if column not in present:
                raise ArgumentError(f"{where}: has no column {column!r}.")
