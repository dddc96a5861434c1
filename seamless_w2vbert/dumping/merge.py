"""Several dumps -> one.

Comes in: the dumps of a job array, or of anything else that was dumped alike. Goes
out: a dump of all, with the same shards under new names: on one disk they are linked
and not copied.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from seamless_w2vbert.dumping import index
from seamless_w2vbert.dumping.index import DATA, Part
from seamless_w2vbert.dumping.planning import take_census
from seamless_w2vbert.dumping.reader import dump_stores, local_shard, missing_jobs
from seamless_w2vbert.dumping.run import DumpReport, check_folder, close
from seamless_w2vbert.dumping.settings import (
    VERSION,
    Settings,
    read_info,
    require_info,
    write_info,
)
from seamless_w2vbert.dumping.sources import Utterance
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import DumpError


class _Ids:
    """The ids of several dumps, as a source, to see that none occurs twice."""

    name = "The dumps together"
    root = None
    streaming = False
    column_types: ClassVar[dict[str, pa.DataType]] = {}

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Utterance]:
        for part in self._parts:
            for id in part.ids():
                yield Utterance(id=id, audio=b"", source="")


def merge_dumps(
    dumps: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]
) -> DumpReport:
    """Make one dump of several. Interrupted, it can be run again.

    :param dumps: their folders or URLs; of a job array the one that holds its parts.
    :param out: an empty folder.
    :raises DumpError: if one is not complete, if they are of different settings, have
        an id in common, or a job of an array is missing.
    """
    stores = []
    for path in dumps:
        found = dump_stores(os.fspath(path))
        if missing := missing_jobs(path, found):
            raise DumpError(missing)
        stores += found

    if not stores:
        raise DumpError("There is no dump to merge.")

    infos = [_complete_info(store) for store in stores]
    settings = _common_settings(stores, infos)
    order = _order(stores, infos)
    stores, infos = [stores[n] for n in order], [infos[n] for n in order]
    parts = []
    for store, info in zip(stores, infos, strict=True):
        of_store = index.read_parts(store)
        index.check_whole(store, of_store, info.get("utterances", -1))
        parts += of_store
    take_census(_Ids(parts))

    target = Store(out)
    check_folder(target, set())
    target.create()

    with target.lock():
        info = {
            "version": VERSION,
            "complete": False,
            "attempt": 0,
            "settings": settings.to_json(),
            "merged_from": [str(store) for store in stores],
            "runs": [run for info in infos for run in info["runs"]],
        }
        there = read_info(target)
        if there is not None and there.get("merged_from") != info["merged_from"]:
            raise DumpError(f"{target}: holds another dump; choose an empty folder.")

        write_info(target, info)
        done = {part.first: part for part in index.read_parts(target)}
        merged: list[Part] = []
        first = 0

        for part in parts:
            merged.append(done.get(first) or _take(target, settings, part, first))
            first += part.count

        close(target, settings, info, merged)

    return DumpReport.of(target, merged)


def _complete_info(store: Store) -> dict[str, Any]:
    info = require_info(store)

    if not info["complete"]:
        raise DumpError(f"{store}: is not complete; run its dump again first.")

    return info


def _common_settings(stores: Sequence[Store], infos: Sequence[Any]) -> Settings:
    first: Settings | None = None

    for store, info in zip(stores, infos, strict=True):
        settings = Settings.from_json({**info["settings"], "share": None})
        if first is None:
            first = settings
        else:
            first.check_equal(settings, str(store))

    assert first is not None

    return first


def _order(stores: Sequence[Store], infos: Sequence[Any]) -> list[int]:
    """Sort the jobs of an array by their number, and see that all are there."""
    shares = [info["settings"]["share"] for info in infos]

    if all(share is None for share in shares):
        return list(range(len(stores)))

    if any(share is None for share in shares):
        raise DumpError("Some of these dumps are jobs of an array and some are not.")

    num = shares[0]["num"]
    there = [share["index"] for share in shares]
    missing = sorted(set(range(num)) - set(there))

    if missing:
        raise DumpError(
            f"Of {num} jobs {len(missing)} are missing, the first is number "
            f"{missing[0]}; dump with --shard-index {missing[0]} --num-shards {num}."
        )

    order = sorted(range(len(stores)), key=lambda n: there[n])
    borders = [(shares[n]["from"], shares[n]["to"]) for n in order]

    if len(order) != num or any(
        before[1] != after[0] for before, after in pairwise(borders)
    ):
        raise DumpError(
            "These jobs divide their source in different ways; dump them into one "
            "folder, so that they share a plan."
        )

    return order


def _take(target: Store, settings: Settings, part: Part, first: int) -> Part:
    """Commit a shard of another dump in a new place."""
    rows = part.table().to_pylist()
    renamed = {
        name: f"shard-{first:012d}-{name.split('-', 2)[2]}" for name in part.shards
    }

    with target.workspace() as folder:
        for old, new in renamed.items():
            _copy(local_shard(part.store, old), folder / new)
            target.put(folder / new, f"{DATA}/{new}")

    for row in rows:
        if row["shard"] is not None:
            row["shard"] = renamed[row["shard"]]

    files = {}
    for name, known in part.files.items():
        head, mark, tail = name.partition("/")
        files[renamed[head] + mark + tail] = known

    return index.write_part(
        target, first, rows, settings.column_types, files, part.moments()
    )


def _copy(source: Path, target: Path) -> None:
    def link(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    try:
        if source.is_dir():
            shutil.copytree(source, target, copy_function=link)
        else:
            link(str(source), str(target))
    except OSError as ex:
        raise DumpError(f"{source}: cannot be copied: {ex.strerror or ex}.") from ex
