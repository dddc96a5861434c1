"""Lhotse cut manifests.

Comes in: a ``.jsonl`` or ``.jsonl.gz`` file with one cut per line. Goes out: one
utterance per cut. A stretch of one file is read here; mixtures, augmented cuts and cuts
of some channels are left to lhotse, which has to be installed for them alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from seamless_w2vbert.audio import AudioInfo, Deferred
from seamless_w2vbert.constants import SAMPLING_RATE
from seamless_w2vbert.dumping.sources.base import (
    Utterance,
    Wanted,
    basename,
    check_id,
    resolve,
    seconds,
    storable,
    utterance,
    working_folder,
)
from seamless_w2vbert.dumping.sources.tables import read_json_lines
from seamless_w2vbert.errors import ArgumentError, DumpError

_TYPES = ("MonoCut", "MultiCut", "MixedCut", "PaddingCut", "Cut")

COLUMNS = ("text", "speaker", "language")
"""What is carried: the fields of a cut's first supervision."""


def is_cut(row: Mapping[str, Any]) -> bool:
    """Tell whether a JSON line is a cut."""
    return row.get("type") in _TYPES


class Cuts:
    """The cuts of a manifest; ids are theirs. Paths are relative to the working
    directory, as in lhotse."""

    streaming = False
    root = None

    def __init__(self, path: str, wanted: Wanted) -> None:
        for column in wanted.columns:
            if column not in COLUMNS:
                raise ArgumentError(
                    f"{path}: has no column {column!r}; of Lhotse cuts "
                    f"{', '.join(COLUMNS)} can be carried."
                )

        self.name = path
        self.column_types = {column: pa.string() for column in wanted.columns}

    def __iter__(self) -> Iterator[Utterance]:
        for number, cut in read_json_lines(self.name):
            where = f"{self.name}, line {number}"
            if not is_cut(cut):
                raise DumpError(f"{where}: expected a Lhotse cut, as in line 1.")
            try:
                made = self._utterance(cut, where, number)
            except (KeyError, TypeError, AttributeError, IndexError) as ex:
                raise DumpError(
                    f"{where}: is no Lhotse cut that can be read: {ex!r}."
                ) from None
            yield made

    def _utterance(self, cut: Mapping[str, Any], where: str, number: int) -> Utterance:
        columns = self._columns(cut)

        for used in _recordings(cut):
            for source in used["sources"]:
                _check_source(source, where)

        place = f"{basename(self.name)}:{number}"
        recording = cut.get("recording")

        if cut["type"] in ("MonoCut", "Cut") and recording is None:
            return utterance(
                None, id=cut["id"], where=where, source=place, columns=columns
            )

        if not _is_plain(cut):
            audio = _deferred(cut, where)
            return Utterance(
                id=check_id(cut["id"], where),
                audio=audio,
                source=place,
                columns=columns,
                samples=audio.info.samples,
            )

        assert recording is not None
        path = resolve(working_folder(self.name), recording["sources"][0]["source"])
        start = seconds(cut["start"], where, "start") or 0.0
        duration = seconds(cut["duration"], where, "duration") or 0.0
        # Manifests round durations to less than a sample.
        whole = (
            start == 0
            and abs(duration - recording["duration"]) * recording["sampling_rate"] < 0.5
        )

        return utterance(
            path,
            id=cut["id"],
            where=where,
            source=path,
            start=None if whole else start,
            end=None if whole else start + duration,
            columns=columns,
            samples=round(duration * SAMPLING_RATE),
        )

    def _columns(self, cut: Mapping[str, Any]) -> dict[str, str | None]:
        # Those of a mixture are of its tracks.
        tracks = [track["cut"] for track in cut.get("tracks", ())]
        supervisions = [
            supervision
            for part in tracks or [cut]
            for supervision in part.get("supervisions") or ()
        ]
        first = supervisions[0] if supervisions else {}
        values = {column: first.get(column) for column in self.column_types}

        return {
            column: None if value is None else storable(str(value))
            for column, value in values.items()
        }


def _recordings(cut: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for part in (cut, *(track["cut"] for track in cut.get("tracks", ()))):
        if part.get("recording") is not None:
            yield part["recording"]


def _check_source(source: Mapping[str, Any], where: str) -> None:
    # lhotse would run it.
    if source["type"] == "command" or str(source["source"]).startswith("pipe:"):
        raise DumpError(
            f"{where}: its audio is the output of a command, and commands are not run "
            "here; write it to files with lhotse's `cuts.save_audios(folder)`."
        )

    if source["type"] == "shar":
        raise DumpError(
            f"{where}: its audio is in Lhotse Shar files, which a manifest alone does "
            "not find; write it to files with lhotse's `cuts.save_audios(folder)`."
        )


def _is_plain(cut: Mapping[str, Any]) -> bool:
    """Tell whether a cut is a stretch of one file of one channel."""
    if cut["type"] not in ("MonoCut", "Cut"):
        return False

    recording = cut["recording"]
    sources = recording["sources"]

    return (
        not recording.get("transforms")
        and len(sources) == 1
        and sources[0]["type"] in ("file", "url")
        and sources[0]["channels"] == [cut["channel"]]
        and not sources[0].get("video")
    )


def _deferred(cut: Mapping[str, Any], where: str) -> Deferred:
    text = json.dumps(cut)

    try:
        parsed = _parse(text)
    except ImportError:
        raise ArgumentError(
            f"{where}: is mixed, augmented, or of some channels of its recording, "
            "which takes the package lhotse; install it with `pip install "
            "'seamless_w2vbert[lhotse]'`."
        ) from None
    except Exception as ex:
        raise DumpError(f"{where}: lhotse cannot read this cut: {ex!r}.") from ex

    samples = round(parsed.num_samples * SAMPLING_RATE / parsed.sampling_rate)
    info = AudioInfo(samples, parsed.sampling_rate, 1)

    return Deferred(partial(_load, text), info, where)


def _parse(text: str) -> Any:
    from lhotse.serialization import deserialize_item

    return deserialize_item(json.loads(text))


def _load(text: str) -> Any:
    return _parse(text).load_audio()
