"""A shard of utterances -> its files and its part of the index.

Comes in: what the stream gives for each utterance. Goes out: a committed shard. What
one process does, and one Ray actor.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from seamless_w2vbert.audio import Clip
from seamless_w2vbert.dumping import formats, index
from seamless_w2vbert.dumping.index import DATA, EMBEDDED, FAILED, Part
from seamless_w2vbert.dumping.planning import Shard
from seamless_w2vbert.dumping.settings import Settings
from seamless_w2vbert.dumping.sources import Utterance
from seamless_w2vbert.dumping.sources.base import storable
from seamless_w2vbert.dumping.statistics import Moments, Normalizer, merge_into
from seamless_w2vbert.dumping.store import Store, sha256
from seamless_w2vbert.errors import DumpError
from seamless_w2vbert.pipeline import SpeechEncoderPipeline
from seamless_w2vbert.streaming import Stream, StreamItem
from seamless_w2vbert.urls import is_url

"""The folder of the shards."""

_STORAGE_IS_GONE = {
    getattr(errno, name)
    for name in (
        "ESTALE",
        "ENOTCONN",
        "ETIMEDOUT",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "ENETDOWN",
        "ENETUNREACH",
        "ENODEV",
        "ENXIO",
        "ESHUTDOWN",
        "ECONNRESET",
        "ECONNREFUSED",
    )
    if hasattr(errno, name)
}
"""What the system says of a file when it is all of its storage that is out of reach."""


@dataclass(frozen=True)
class Outcome:
    """What became of an utterance."""

    arrays: Mapping[int, Tensor]
    """By layer, in the dtype of the dump: (frames, dim), or (dim,) if pooled."""

    samples: int = 0
    frames: int = 0
    error: str | None = None
    errno: int | None = None
    """What the operating system said, where it was the file that could not be read."""


class ShardEmbedder:
    """Embeds shards with a pipeline, as settings say."""

    def __init__(
        self,
        pipeline: SpeechEncoderPipeline,
        settings: Settings,
        normalizer: Normalizer | None = None,
        *,
        strict: bool = False,
        finished: Callable[[Outcome], None] = lambda _: None,
        **options: Any,
    ) -> None:
        """
        :param strict: raise the first error of an utterance.
        :param finished: called whenever an utterance is embedded or failed.
        :param options: ``max_frames``, ``max_items`` and ``num_workers`` of
            :meth:`SpeechEncoderPipeline.stream`.
        """
        self._settings = settings
        self._normalizer = normalizer
        self._strict = strict
        self._finished = finished
        self._dtype: torch.dtype = getattr(torch, settings.dtype)
        self._format = formats.find_format(settings.format)
        self._moments: dict[int, Moments] = {}
        self._stream = Stream(
            pipeline,
            layers=settings.layers,
            chunk=settings.chunk,
            overlap=settings.overlap,
            **options,
        )

    def embed(
        self, shards: Iterable[Shard]
    ) -> Iterator[tuple[Shard, list[Outcome], dict[int, Moments]]]:
        """Embed shards, which are read lazily, without a pause between them."""
        waiting: list[Shard] = []

        def groups() -> Iterator[list[tuple[str, Any, int]]]:
            for shard in shards:
                waiting.append(shard)
                yield shard.group()

        for outcomes in self._stream.groups(groups(), self._finish):
            moments, self._moments = self._moments, {}
            yield waiting.pop(0), outcomes, moments
            del outcomes  # while the next shard is embedded

    def _finish(self, item: StreamItem) -> Outcome:
        outcome = self._outcome(item)

        if self._strict and outcome.error is not None:
            raise DumpError(
                f"{outcome.error} (Utterance {item.id!r}; without --strict it is "
                "recorded and passed over.)"
            )

        self._finished(outcome)

        return outcome

    def _outcome(self, item: StreamItem) -> Outcome:
        if item.error is not None:
            cause = item.error.__cause__
            number = cause.errno if isinstance(cause, OSError) else None
            return Outcome({}, error=str(item.error), errno=number)

        arrays: dict[int, Tensor] = {}
        moments: dict[int, Moments] = {}

        for layer, hidden in item.hidden_states.items():
            moments[layer] = Moments.of(hidden)
            if self._normalizer is not None:
                hidden = self._normalizer(layer, hidden)
            stored = pool(hidden, self._settings.pool).to(self._dtype)

            try:
                self._format.writer.check_size(item.id, stored)
            except DumpError as ex:
                return Outcome({}, error=str(ex))

            if not bool(stored.isfinite().all()):
                return Outcome(
                    {},
                    error=f"{item.id}: layer {layer} has values that {self._dtype} "
                    "cannot hold; dump with --dtype float32.",
                )
            arrays[layer] = stored

        merge_into(self._moments, moments)

        return Outcome(arrays, item.samples, len(hidden))


def pool(hidden: Tensor, kind: str | None) -> Tensor:
    """Pool the frames of an utterance, in float32.

    :param hidden: (frames, dim).
    :param kind: ``"mean"``, ``"max"``, ``"mean+std"`` (of the population, so that one
        frame has a deviation of 0), or None for all frames.
    :returns: (dim,), (2 dim,) or, with None, ``hidden``.
    """
    if kind is None:
        return hidden

    hidden = hidden.float()

    if kind == "max":
        return hidden.amax(dim=0)

    mean = hidden.mean(dim=0)

    if kind == "mean":
        return mean

    return torch.cat([mean, hidden.std(dim=0, unbiased=False)])


def commit(
    store: Store,
    settings: Settings,
    shard: Shard,
    outcomes: list[Outcome],
    moments: Mapping[int, Moments],
    attempt: int = 0,
) -> Part:
    """Write a shard's files, then its part of the index, which makes them count.

    Where the shard is there already, from before a retry, it is replaced at once, and
    only if everything that it has is embedded again.

    :param attempt: which retry this is; 0 for none.
    :raises DumpError: if that is not possible; nothing of the shard counts then.
    """
    try:
        return _commit(store, settings, shard, outcomes, moments, attempt)
    except OSError as ex:
        raise DumpError(
            f"{store}: cannot be written to: {ex.strerror or ex}. The shards that are "
            "complete are safe; run the same command again to go on."
        ) from ex


def _commit(
    store: Store,
    settings: Settings,
    shard: Shard,
    outcomes: list[Outcome],
    moments: Mapping[int, Moments],
    attempt: int,
) -> Part:
    before = index.find_part(store, shard.first)

    if before is not None:
        rows_before = before.table().to_pylist()
        failed = {
            utterance.id
            for utterance, outcome in zip(shard.utterances, outcomes, strict=True)
            if outcome.error is not None
        }
        if any(r["status"] == EMBEDDED and r["id"] in failed for r in rows_before):
            return index.write_part(
                store,
                shard.first,
                rows_before,
                settings.column_types,
                before.files,
                before.moments(),
                attempt,
            )

    rows: list[dict[str, Any]] = []
    columns = settings.column_types

    with store.workspace() as folder, ExitStack() as unfinished:
        writer = formats.open_writer(settings.format, folder, settings.layout)
        unfinished.callback(writer.discard)

        for utterance, outcome in zip(shard.utterances, outcomes, strict=True):
            values = column_values(utterance, columns)
            row: dict[str, Any] = {
                "id": utterance.id,
                "source": storable(utterance.source),
                "start": utterance.start,
                "end": utterance.end,
                **values,
            }
            error = None if outcome.error is None else storable(outcome.error)
            if error is None:
                try:
                    row["offset"] = writer.add(
                        utterance.id, outcome.arrays, values, outcome.frames
                    )
                except DumpError as ex:
                    error = str(ex)
            if error is None:
                row["samples"], row["frames"] = outcome.samples, outcome.frames
            row["status"] = EMBEDDED if error is None else FAILED
            row["error"] = error
            rows.append(row)

        written = writer.close()
        unfinished.pop_all()
        embedded = [row for row in rows if row["status"] == EMBEDDED]
        files: dict[str, dict[str, Any]] = {}

        if embedded:
            files, name = _name(written, shard.first)
            store.put(written, f"{DATA}/{name}")
            for row in embedded:
                row["shard"] = name

    part = index.write_part(store, shard.first, rows, columns, files, moments, attempt)

    if before is not None:
        for name in before.shards - part.shards:
            store.remove(f"{DATA}/{name}")

    return part


def column_values(
    utterance: Utterance, types: Mapping[str, pa.DataType]
) -> dict[str, Any]:
    """Return the carried columns of an utterance, of their types."""
    values = {}

    for name, kind in types.items():
        value = utterance.columns.get(name)
        if value is not None and pa.types.is_string(kind):
            value = storable(str(value))
        values[name] = value

    return values


def _name(written: Path, first: int) -> tuple[dict[str, dict[str, Any]], str]:
    """Name a shard after its place and content, and list its files."""
    inside = sorted(written.iterdir()) if written.is_dir() else [written]
    digests = {file: sha256(file) for file in inside}
    lines = (f"{file.name} {digest}\n" for file, digest in digests.items())
    key = hashlib.sha256("".join(lines).encode()).hexdigest()

    name = f"shard-{first:012d}-{key[:8]}{written.suffix}"

    return {
        name if file == written else f"{name}/{file.name}": {
            "bytes": file.stat().st_size,
            "sha256": digest,
        }
        for file, digest in digests.items()
    }, name


# -- storage that is gone ------------------------------------------------------------


class StorageWatch:
    """Tells a bad file from storage that went away under a dump, which must not make
    failures of all that is left."""

    def __init__(self, root: str | None) -> None:
        """:param root: the folder that everything in the source is under, if any."""
        self._root = root if root and os.path.isdir(root) else None
        self._good: str | None = None

    def check(self, shard: Shard, outcomes: list[Outcome]) -> None:
        """
        :raises DumpError: if files could not be read because their storage is gone.
        """
        pairs = list(zip(shard.utterances, outcomes, strict=True))

        for utterance, outcome in pairs:
            if outcome.error is None:
                # A folder that files could be read from.
                self._good = folder_of(utterance) or self._good

        unread = [pair for pair in pairs if pair[1].errno is not None]

        for utterance, outcome in unread:
            if outcome.errno in _STORAGE_IS_GONE:
                raise self._gone(utterance.source, os.strerror(outcome.errno or 0))

            for folder in filter(None, (self._root, self._good)):
                if _is_gone(folder):
                    raise self._gone(folder, "it is no longer there")

        # A list with a wrong line has others that are right.
        if len(pairs) > 1 and len(unread) == len(pairs):
            folders = {folder_of(utterance) for utterance, _ in pairs}
            if all(folder and _is_gone(folder) for folder in folders):
                raise self._gone(
                    min(folder for folder in folders if folder),
                    f"none of the {len(pairs)} files of this shard is there, nor are "
                    "their folders; if that is so, take them out of the source",
                )

    def _gone(self, what: str, reason: str) -> DumpError:
        return DumpError(
            f"{what}: the storage of the source went away ({reason}). What was written "
            "before is safe; run the same command again when it is back."
        )


def folder_of(utterance: Utterance) -> str | None:
    """Return the folder of the local file that an utterance is read from, if any."""
    audio = (
        utterance.audio.audio if isinstance(utterance.audio, Clip) else utterance.audio
    )

    if not isinstance(audio, (str, os.PathLike)) or is_url(os.fsdecode(audio)):
        return None

    return os.path.dirname(os.path.abspath(os.fsdecode(audio)))


def _is_gone(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None  # an empty mount point
    except OSError:
        return True
