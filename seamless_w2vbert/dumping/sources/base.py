"""What every source of a dump is made of: utterances, and how files are read.

Comes in: paths, URLs and the cells of manifests. Goes out: :class:`Utterance`, checked;
lines of text with their numbers; and errors that name the place.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import posixpath
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import pyarrow as pa

from seamless_w2vbert.audio import AudioInput, Clip
from seamless_w2vbert.constants import SAMPLING_RATE
from seamless_w2vbert.errors import ArgumentError, DumpError, SeamlessW2vBertError
from seamless_w2vbert.urls import filesystem, is_url


@dataclass(frozen=True)
class Utterance:
    """One input of a dump."""

    id: str
    """What it is called in the dump; valid Unicode on one line."""

    audio: AudioInput
    """What :func:`seamless_w2vbert.audio.decode` takes; can be read again and pickled.
    None where the manifest has null: decoding that fails."""

    source: str
    """Where it is, for people: a path, ``archive:offset:length``, or
    ``train.parquet:17`` for a row that holds the audio itself."""

    start: float | None = None
    """Where a clip begins in its recording, in seconds."""

    end: float | None = None
    """Where it ends, in seconds; None for the end of the recording."""

    columns: Mapping[str, Any] = field(default_factory=dict)
    """The carried columns that were asked for."""

    samples: int | None = None
    """The length at 16 kHz, where the manifest tells it; for planning only."""


class Source(Protocol):
    """A stream of utterances that can be iterated again, in the same order."""

    @property
    def name(self) -> str:
        """What was given, for messages."""

    @property
    def root(self) -> str | None:
        """The folder that everything is under, if there is one."""

    @property
    def streaming(self) -> bool:
        """Whether enumerating it costs reading the audio itself."""

    @property
    def column_types(self) -> Mapping[str, pa.DataType]:
        """The carried columns; strings except where the source is typed."""

    def __iter__(self) -> Iterator[Utterance]:
        """Give the utterances one by one; nothing grows with their number."""


@dataclass(frozen=True)
class Wanted:
    """The columns of a manifest that matter."""

    columns: Sequence[str] = ()
    audio: str = "audio"
    id: str = "id"

    def check(self, name: str, present: Sequence[str]) -> None:
        """
        :raises ArgumentError: if a manifest with the columns ``present`` lacks one that
            is wanted, or has clips in another form than ``start`` and ``end``.
        """
        has = f"its columns are {', '.join(map(str, present)) or 'none'}"

        if self.audio not in present:
            raise ArgumentError(
                f"{name}: has no column {self.audio!r} for the audio; {has}. Name the "
                "right one as the audio column."
            )

        if self.id != "id" and self.id not in present:
            raise ArgumentError(f"{name}: has no column {self.id!r} for the id; {has}.")

        for column in self.columns:
            if column not in present:
                raise ArgumentError(f"{name}: has no column {column!r}; {has}.")
            if column == self.audio:
                raise ArgumentError(
                    f"The column {column!r} is the audio itself and cannot be carried."
                )

        # To leave them unread would embed other stretches than are meant.
        if "duration" in present and (
            ("start" in present and "end" not in present)
            or ("offset" in present and "start" not in present)
        ):
            raise ArgumentError(
                f"{name}: has clips by their duration; give them by the columns "
                "'start' and 'end', in seconds."
            )

    def refuse(self, name: str, kind: str) -> None:
        """
        :raises ArgumentError: if columns are wanted of a source that has none.
        """
        if self.columns:
            raise ArgumentError(
                f"{name}: {kind} has no columns to carry, such as {self.columns[0]!r}; "
                "use a manifest with columns, such as a .csv, .jsonl or .parquet file."
            )


# -- cells ---------------------------------------------------------------------------


def storable(text: str) -> str:
    """Return ``text`` as valid Unicode: what is none, such as the bytes of a file name
    that is no UTF-8, becomes an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def check_id(value: Any, where: str) -> str:
    """Return an id as text.

    :raises DumpError: if it is empty, more than one line, or neither text nor a number.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DumpError(
            f"{where}: the id is {_kind(value)}; expected text or a whole number."
        )

    text = storable(str(value))

    if not text.strip():
        raise DumpError(f"{where}: the id is empty.")

    if any(char in text for char in "\0\n\r"):
        raise DumpError(
            f"{where}: the id {text!r} has a line break or null byte; rename it."
        )

    return text


def seconds(value: Any, where: str, name: str) -> float | None:
    """Return a time in seconds; None for null, nothing and NaN.

    :raises DumpError: if it is no number.
    """
    if value is None or value == "":
        return None

    try:
        number = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.inf

    if math.isinf(number):
        raise DumpError(f"{where}: {name} is {value!r}; expected seconds, such as 1.5.")

    return None if math.isnan(number) else number


def utterance(
    audio: Any,
    *,
    id: Any,
    fallback: str = "",
    where: str,
    source: str,
    start: float | None = None,
    end: float | None = None,
    columns: Mapping[str, Any] | None = None,
    samples: int | None = None,
) -> Utterance:
    """Make an utterance, of a clip where ``start`` or ``end`` is given.

    :param id: the id that the manifest gives it; ``fallback`` if None, with the times
        of a clip behind it.
    :param where: the place in the manifest, for messages.
    :raises DumpError: if the id cannot be one.
    """
    is_clip = start is not None or end is not None

    if is_clip:
        start = start or 0.0
        if audio is not None:
            audio = Clip(audio, start, end)
        if end is not None:
            samples = max(round((end - start) * SAMPLING_RATE), 0)

    if id is None:
        id = f"{fallback}#{start}-{'' if end is None else end}" if is_clip else fallback

    return Utterance(
        id=check_id(id, where),
        audio=audio,
        source=storable(source),
        start=start,
        end=end,
        columns=columns or {},
        samples=samples,
    )


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"


# -- paths and files -----------------------------------------------------------------


def resolve(base: str, path: str) -> str:
    """Return a path of a manifest, which is relative to ``base``."""
    if not base or is_url(path) or os.path.isabs(path):
        return path

    if not is_url(base):
        return os.path.join(base, path)

    # Object stores take "." and ".." for names.
    if not {".", ".."}.isdisjoint(path.split("/")):
        scheme, mark, base = base.partition("://")
        return scheme + mark + posixpath.normpath(f"{base}/{path}")

    return f"{base.rstrip('/')}/{path}"


def folder_of(path: str) -> str:
    """Return the folder that a file is in; empty for the working directory."""
    return path.rpartition("/")[0] if is_url(path) else os.path.dirname(path)


def working_folder(path: str) -> str:
    """Return what paths in a list are relative to: the working directory, or for a
    list behind a URL, which has none, its folder."""
    return folder_of(path) if is_url(path) else ""


def basename(path: str) -> str:
    """Return the last part of a path or URL."""
    return path.rstrip("/").rpartition("/")[2]


def exists(path: str) -> bool:
    """Tell whether there is such a file or folder."""
    if not is_url(path):
        return os.path.exists(path)

    with reading(path):
        fs, inner = filesystem(path)
        return bool(fs.exists(inner))


def is_folder(path: str) -> bool:
    """Tell whether a path or URL is a folder."""
    if not is_url(path):
        return os.path.isdir(path)

    with reading(path):
        fs, inner = filesystem(path)
        return bool(fs.isdir(inner))


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Say which file could not be read.

    :raises DumpError: for whatever the filesystem raises.
    """
    try:
        yield
    except SeamlessW2vBertError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as ex:
        raise DumpError(
            f"{path}: is truncated or no gzip file ({ex}); make it anew."
        ) from None
    except OSError as ex:
        raise DumpError(f"{path}: cannot be read: {ex.strerror or ex}.") from ex
    except Exception as ex:
        # Filesystems behind URLs have exceptions of their own.
        if not is_url(path):
            raise
        raise DumpError(f"{path}: cannot be read: {ex}.") from ex


def open_binary(path: str) -> IO[bytes]:
    """Open a local file or URL."""
    if not is_url(path):
        return open(path, "rb")

    fs, inner = filesystem(path)
    opened: IO[bytes] = fs.open(inner, "rb")

    return opened


def read_lines(path: str, *, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """Give the lines of a text file, ``.gz`` or not, with their numbers from 1 and
    their ends.

    :param errors: ``"surrogateescape"`` where bytes that are no UTF-8 are names of
        files.
    :raises DumpError: if it cannot be read, or is no UTF-8.
    """
    with reading(path), open_binary(path) as file:
        # fsspec's own files look for line ends slowly.
        opened: Any = io.BufferedReader(file) if is_url(path) else file  # type: ignore[arg-type]
        if path.lower().endswith(".gz"):
            opened = gzip.GzipFile(fileobj=opened)

        for number, line in enumerate(opened, start=1):
            try:
                text = line.decode("utf-8", errors)
            except UnicodeDecodeError:
                text = None
            if text is None or (number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff")):
                raise DumpError(
                    f"{path}, line {number}: is not UTF-8; convert the file, for "
                    "example with `iconv -t UTF-8`."
                )
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def read_entries(path: str, *, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """Give the lines of a text file that are not blank, without their ends."""
    for number, line in read_lines(path, errors=errors):
        if line.strip():
            yield number, line.rstrip("\r\n")
