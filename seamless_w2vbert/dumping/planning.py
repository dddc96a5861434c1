"""Source -> shards: which utterances are embedded and written together.

Comes in: a source and what is committed already. Goes out: :class:`Shard`, cut by rule
from lengths alone, so that a dump that goes on after a kill has the shards, and so the
batches, of one that was never interrupted. Nothing here grows with the corpus but a
temporary file of 12 bytes per utterance.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from seamless_w2vbert import fbank, streaming
from seamless_w2vbert.constants import FBANK_STRIDE
from seamless_w2vbert.dumping.sources import Source, Utterance
from seamless_w2vbert.errors import ArgumentError, DumpError

HASHES = 1 << 64
"""Ids are hashed to numbers from 0 to below this."""

_NUM_READERS = 8
"""Headers that are read at a time: on a network file system each is a wait."""


@dataclass(frozen=True)
class Shard:
    """Utterances that follow each other in the source and are committed together."""

    first: int
    """The position of the first in the source."""

    utterances: Sequence[Utterance]

    frames: Sequence[int]
    """Their lengths in fbank frames (10 ms), as their headers say."""

    def group(self) -> list[tuple[str, Any, int]]:
        """Return what :meth:`seamless_w2vbert.streaming.Stream.groups` takes."""
        return [
            (utterance.id, utterance.audio, frames)
            for utterance, frames in zip(self.utterances, self.frames, strict=True)
        ]


@dataclass(frozen=True)
class Size:
    """How large a shard may get."""

    max_bytes: int
    max_utterances: int
    max_frames: int
    """Of fbank, 10 ms each: the work that is lost when a process is killed."""

    bytes_per_frame: int
    """What is stored per encoder frame (20 ms), all layers."""

    bytes_per_utterance: int
    """What is stored per utterance on top of that: where vectors are pooled, all."""

    def of(self, frames: int) -> int:
        """Return the bytes that an utterance of so many fbank frames takes."""
        stored = self.bytes_per_frame * (frames // FBANK_STRIDE)
        return stored + self.bytes_per_utterance


class Committed(Protocol):
    """A stretch of the source that has been embedded."""

    @property
    def first(self) -> int: ...

    @property
    def count(self) -> int: ...

    def ids(self) -> Iterable[str]:
        """Return the ids in it, in order."""


def cut_shards(
    source: Iterable[Utterance],
    committed: Sequence[Committed],
    size: Size,
    again: Collection[int] = (),
) -> Iterator[Shard]:
    """Cut what is not committed into shards.

    :param committed: in order of position.
    :param again: the first positions of those to embed again, each as it is.
    :raises DumpError: if the source no longer has what was committed from it.
    """
    utterances = iter(source)
    position = 0

    for done in committed:
        yield from _cut(islice(utterances, done.first - position), position, size)

        stretch: list[Utterance] = []

        for offset, expected in enumerate(done.ids()):
            found = next(utterances, None)
            if found is None or found.id != expected:
                now = "gone" if found is None else f"{found.id!r}"
                raise DumpError(
                    f"The source has changed since this dump was begun: utterance "
                    f"{done.first + offset} was {expected!r} and is now {now}. Dump "
                    "the new source into another folder; open_dump() reads several "
                    "together."
                )
            if done.first in again:
                stretch.append(found)

        if stretch:
            yield Shard(done.first, *zip(*measured(stretch), strict=True))

        position = done.first + done.count

    yield from _cut(utterances, position, size)


def _cut(utterances: Iterable[Utterance], first: int, size: Size) -> Iterator[Shard]:
    pending: list[tuple[Utterance, int]] = []
    num_bytes = num_frames = 0

    def shard() -> Shard:
        return Shard(first, *zip(*pending, strict=True))

    for utterance, frames in measured(utterances):
        added = size.of(frames)

        if pending and (
            len(pending) == size.max_utterances
            or num_bytes + added > size.max_bytes
            or num_frames + frames > size.max_frames
        ):
            yield shard()
            first += len(pending)
            pending, num_bytes, num_frames = [], 0, 0

        pending.append((utterance, frames))
        num_bytes += added
        num_frames += frames

    if pending:
        yield shard()


def measured(utterances: Iterable[Utterance]) -> Iterator[tuple[Utterance, int]]:
    """Read how long utterances are, in fbank frames, a few at a time."""
    utterances = iter(utterances)

    with ThreadPoolExecutor(_NUM_READERS) as readers:
        while block := list(islice(utterances, 8 * _NUM_READERS)):
            yield from zip(block, readers.map(_measure, block), strict=True)


def _measure(utterance: Utterance) -> int:
    if utterance.samples is not None:
        return fbank.num_frames(utterance.samples)

    return streaming.measure(utterance.audio)


# -- all of a source -----------------------------------------------------------------


def id_hash(id: str) -> int:
    """Return a number below 2^64 that an id alone decides."""
    digest = hashlib.blake2b(id.encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


@dataclass(frozen=True)
class Census:
    """What a source holds."""

    utterances: int

    frames: int
    """The fbank frames of all; 0 where they were not measured."""

    bounds: tuple[int, ...]
    """The hashes of ids at which the shares of a job array begin, and 2^64."""

    digest: str
    """SHA-256 of the ids, whatever their order."""

    def to_json(self) -> dict[str, Any]:
        """Return it in a form that every JSON reader keeps."""
        bounds = [f"{bound:016x}" for bound in self.bounds]
        return {
            "utterances": self.utterances,
            "frames": self.frames,
            "num_shards": len(bounds) - 1,
            "bounds": bounds,
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Census:
        """Read what :meth:`to_json` wrote."""
        bounds = tuple(int(bound, 16) for bound in data["bounds"])
        return cls(data["utterances"], data["frames"], bounds, data["digest"])


_RECORD = np.dtype([("hash", "<u8"), ("frames", "<u4")])


def take_census(
    source: Source, *, with_lengths: bool = False, num_shards: int = 1
) -> Census:
    """Go once through a source: count, look for ids that occur twice, and divide it.

    A share is a range of hashes: which share an utterance is in depends on its id and
    not on the order of the source, and shares are equal in length to within one
    utterance.

    :param with_lengths: read the headers too; without, utterances count alike.
    :raises DumpError: if an id occurs twice.
    """
    pairs: Iterable[tuple[Utterance, int]] = (
        measured(source) if with_lengths else ((utterance, 0) for utterance in source)
    )

    with tempfile.TemporaryFile(prefix="seamless_w2vbert-") as file:
        records = (
            (id_hash(utterance.id), min(frames, 2**32 - 1))
            for utterance, frames in pairs
        )
        while len(block := np.fromiter(islice(records, 1 << 16), _RECORD)):
            file.write(block.tobytes())
        file.flush()

        if file.tell() == 0:  # nothing that could be mapped
            return Census(0, 0, (0,) * num_shards + (HASHES,), "")

        # Sorted in place, in the file: memory that the system can take back.
        census = np.memmap(file, _RECORD, mode="r+")
        census.sort(order="hash")
        _refuse_duplicates(source, census["hash"])

        weights = census["frames"] if with_lengths else np.ones(len(census), "u4")
        total = int(weights.sum(dtype=np.int64))
        starts = [0]
        if num_shards > 1:
            ends = np.cumsum(weights, dtype=np.int64)
            for number in range(1, num_shards):
                at = int(np.searchsorted(ends, total * number / num_shards, "right"))
                # The share begins behind the utterance in which the one before fills.
                bound = int(census["hash"][at]) if at < len(census) else HASHES
                starts.append(max(bound, starts[-1]))

        digest = hashlib.sha256()
        for start in range(0, len(census), 1 << 16):
            digest.update(census["hash"][start : start + (1 << 16)].tobytes())

        return Census(
            utterances=len(census),
            frames=total if with_lengths else 0,
            bounds=(*starts, HASHES),
            digest=digest.hexdigest(),
        )


def _refuse_duplicates(source: Source, hashes: Any) -> None:
    twice = {int(number) for number in hashes[1:][hashes[1:] == hashes[:-1]][:1000]}

    if not twice:
        return

    seen: dict[str, int] = {}

    for position, utterance in enumerate(source):
        if id_hash(utterance.id) in twice:
            if utterance.id in seen:
                raise duplicate(source, utterance.id, seen[utterance.id], position)
            seen[utterance.id] = position


def duplicate(source: Source, id: str, first: int, second: int) -> DumpError:
    """Return the error that an id occurs twice."""
    return DumpError(
        f"{source.name}: the id {id!r} occurs twice, as utterance {first} and {second} "
        "(from 0). Give every utterance an id of its own, in a manifest."
    )


class Share:
    """The utterances of a source that one job of an array embeds."""

    def __init__(self, source: Source, first_hash: int, last_hash: int) -> None:
        """
        :param first_hash: the first hash of an id in the share.
        :param last_hash: the first hash behind it.
        """
        self._source = source
        self._range = (first_hash, last_hash)
        self.name = source.name
        self.root = source.root
        self.streaming = source.streaming
        self.column_types = source.column_types

    def __iter__(self) -> Iterator[Utterance]:
        first, last = self._range
        return (item for item in self._source if first <= id_hash(item.id) < last)


def check_share(index: int, num: int) -> None:
    """Check the numbers of a job in an array.

    :raises ArgumentError: if there is no such job.
    """
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (index, num))

    if not (whole and 0 <= index < num):
        raise ArgumentError(
            f"Shard index {index!r} of {num!r} does not exist; the first of N is 0, "
            "the last N - 1."
        )
