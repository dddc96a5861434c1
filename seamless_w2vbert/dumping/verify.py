"""A dump -> what is wrong with it.

Comes in: a dump. Goes out: :class:`Verification`. Everything is read again: files
against their checksums, shards against the index, the counts against each other; and a
sample is embedded again.
"""

from __future__ import annotations

import io
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from seamless_w2vbert.audio import Clip
from seamless_w2vbert.dumping import formats, index, statistics
from seamless_w2vbert.dumping.embedding import Outcome, ShardEmbedder
from seamless_w2vbert.dumping.formats import ShardReader
from seamless_w2vbert.dumping.index import DATA, EMBEDDED, FAILED, Part
from seamless_w2vbert.dumping.planning import Shard, measured
from seamless_w2vbert.dumping.reader import dump_stores, local_shard, missing_jobs
from seamless_w2vbert.dumping.run import load_pipeline
from seamless_w2vbert.dumping.settings import Settings, model_digest, require_info
from seamless_w2vbert.dumping.sources import Utterance, open_source
from seamless_w2vbert.dumping.store import Store, sha256
from seamless_w2vbert.errors import DumpError, SeamlessW2vBertError
from seamless_w2vbert.urls import is_url


@dataclass(frozen=True)
class Verification:
    """What was read, and what was wrong."""

    utterances: int
    embedded: int
    failed: int
    shards: int
    bytes: int
    sampled: int
    """Utterances that were embedded again."""

    largest_difference: float
    """Between those and what is stored, relative to the largest value."""

    problems: tuple[str, ...]
    """Empty if the dump is whole."""


class _Verifier:
    def __init__(self) -> None:
        self.problems: list[str] = []
        self.ids: dict[str, str] = {}
        self.utterances = self.failed = self.shards = self.bytes = 0
        self.sampled = 0
        self.largest = 0.0

    # -- what is stored --------------------------------------------------------------

    def check(self, store: Store) -> tuple[Settings, dict[str, Any], list[Part]]:
        info = require_info(store)
        settings = Settings.from_json(info["settings"])
        parts = index.read_parts(store)
        expected = 0

        for part in parts:
            if part.first != expected:
                self._say(
                    f"{store}: utterances {expected} to {part.first - 1} are missing"
                )
            expected = part.first + part.count
            self._check_part(store, settings, part)

        if info["complete"]:
            self._check_statistics(store, parts)

        counts = {
            "utterances": sum(part.count for part in parts),
            "failed": sum(part.failed for part in parts),
        }
        if not info["complete"]:
            self._say(f"{store}: is not complete; run the same dump again to go on")
        else:
            for key, value in counts.items():
                if info.get(key) != value:
                    self._say(
                        f"{store}: dump.json counts {info.get(key)} {key}, the index "
                        f"{value}"
                    )

        named = {name for part in parts for name in part.shards}
        for name in store.names(DATA):
            if name not in named:
                self._say(f"{store}/{DATA}/{name}: no part of the index names it")

        return settings, info, parts

    def _check_statistics(self, store: Store, parts: Sequence[Part]) -> None:
        total = index.total_moments(parts)

        try:
            with np.load(io.BytesIO(store.read(statistics.FILE))) as stored:
                same = all(
                    np.array_equal(stored[f"mean_{layer}"], moments.mean)
                    and np.array_equal(stored[f"var_{layer}"], moments.variance)
                    for layer, moments in total.items()
                )
        except (OSError, ValueError, KeyError, BadZipFile) as ex:
            self._say(f"{store}/{statistics.FILE}: cannot be read: {ex}")
            return

        if not same:
            self._say(f"{store}/{statistics.FILE}: is not that of the shards")

    def _check_part(self, store: Store, settings: Settings, part: Part) -> None:
        damaged = False

        for name, expected in part.files.items():
            try:
                file = store.local(f"{DATA}/{name}")
                size, digest = file.stat().st_size, sha256(file)
            except (OSError, DumpError) as ex:
                self._say(
                    f"{store}/{DATA}/{name}: cannot be read ({ex}); dump again, which "
                    "embeds what is missing"
                )
                damaged = True
                continue
            self.bytes += size
            if (size, digest) != (expected["bytes"], expected["sha256"]):
                self._say(
                    f"{store}/{DATA}/{name}: its content is not what was written; "
                    f"remove {part.name} and dump again"
                )
                damaged = True

        try:
            rows = part.table().to_pylist()
        except DumpError as ex:
            self._say(str(ex))
            return

        self.shards += 1
        self.utterances += len(rows)
        failed = sum(row["status"] == FAILED for row in rows)
        self.failed += failed

        if (len(rows), failed) != (part.count, part.failed):
            self._say(f"{store}/{part.name}: has {len(rows)} rows, not {part.count}")

        here = f"{store}/{part.name}"
        for row in rows:
            if row["id"] in self.ids:
                other = self.ids[row["id"]]
                self._say(f"{row['id']!r} is in {other} and in {here}")
            self.ids[row["id"]] = here

        embedded = [row for row in rows if row["status"] == EMBEDDED]

        if not damaged and embedded:
            try:
                self._check_arrays(store, settings, embedded)
            except (SeamlessW2vBertError, OSError, ValueError) as ex:
                self._say(f"{store}/{DATA}/{embedded[0]['shard']}: {ex}")

    def _check_arrays(
        self, store: Store, settings: Settings, rows: Sequence[dict[str, Any]]
    ) -> None:
        layout = settings.layout
        name = rows[0]["shard"]
        reader = open_shard(store, settings, name)
        reader.check(
            [(row["id"], row["frames"]) for row in rows],
            [row["offset"] for row in rows],
        )

        for row in rows:
            for layer in settings.layers:
                array = reader.read(row["id"], layer, row["offset"], row["frames"])
                shape = (layout.dim,) if layout.pooled else (row["frames"], layout.dim)
                if array.shape != shape:
                    self._say(
                        f"{name}: {row['id']!r} is of shape {array.shape}, not {shape}"
                    )
                elif not np.isfinite(array).all():
                    self._say(f"{name}: {row['id']!r} has values that are not finite")

    def _say(self, problem: str) -> None:
        self.problems.append(problem)

    # -- a sample --------------------------------------------------------------------

    def embed_again(
        self,
        store: Store,
        settings: Settings,
        info: dict[str, Any],
        parts: Sequence[Part],
        *,
        sample: int,
        model: str | None,
        device: torch.device | str,
    ) -> None:
        rows = _sample(parts, sample)
        if not rows:
            return

        model = model or info["runs"][-1]["model"]
        try:
            pipeline = load_pipeline(
                model, device, getattr(torch, settings.compute_dtype)
            )
        except SeamlessW2vBertError as ex:
            self._say(f"A sample could not be embedded again: {ex} Pass --model.")
            return

        if model_digest(pipeline.module) != settings.model:
            self._say(f"{store}: was not dumped with {model}; pass its --model")
            return

        normalizer = None
        if settings.normalize is not None:
            normalizer = statistics.load_normalizer(
                str(store.local(statistics.NORMALIZER)),
                settings.layers,
                settings.dim // (2 if settings.pool == "mean+std" else 1),
            )

        embedder = ShardEmbedder(pipeline, settings, normalizer)
        base = info["runs"][-1]["working_directory"]
        utterances = [_utterance(row, base) for row in rows]
        shards = (
            Shard(0, (utterance,), (frames,))
            for utterance, frames in measured(utterances)
        )

        for row, (_, (outcome,), _) in zip(rows, embedder.embed(shards), strict=True):
            if outcome.error is not None:
                outcome = self._from_source(info, embedder, row) or outcome
            if outcome.error is not None and info["runs"][-1]["source"].startswith("<"):
                continue  # it was dumped from Python objects, which are gone
            self._compare(store, settings, row, outcome)

    def _from_source(
        self, info: dict[str, Any], embedder: ShardEmbedder, row: dict[str, Any]
    ) -> Outcome | None:
        """Embed what is not a file of its own, such as a row of a dataset."""
        try:
            origin = info["runs"][-1]
            source = open_source(
                origin["source"],
                audio_column=origin["audio_column"],
                id_column=origin["id_column"],
            )
            found = (item for item in source if item.id == row["id"])
            shards = (Shard(0, (item,), (n,)) for item, n in measured(found))
            for _, (outcome,), _ in embedder.embed(shards):
                return outcome
        except SeamlessW2vBertError:
            pass

        return None

    def _compare(
        self, store: Store, settings: Settings, row: dict[str, Any], outcome: Outcome
    ) -> None:
        if outcome.error is not None:
            self._say(f"{row['id']!r} could not be embedded again: {outcome.error}")
            return

        reader = open_shard(store, settings, row["shard"])
        self.sampled += 1

        for layer, array in outcome.arrays.items():
            stored = np.asarray(
                reader.read(row["id"], layer, row["offset"], row["frames"]), np.float64
            )
            again = array.double().numpy()
            if stored.shape != again.shape:
                self._say(
                    f"{row['id']!r}: is of shape {stored.shape}, embedded again "
                    f"{again.shape}; has the file changed?"
                )
                continue
            scale = max(float(np.abs(again).max()), 1e-30)
            difference = float(np.abs(stored - again).max()) / scale
            self.largest = max(self.largest, difference)
            if difference > tolerance(settings):
                self._say(
                    f"{row['id']!r}: layer {layer} differs by {difference:.1e} from "
                    "what it is when embedded again; has the file changed?"
                )


def tolerance(settings: Settings) -> float:
    """How far two embeddings of an utterance may be apart, relative to the largest
    value: 1e-5 in float32, a few roundings in narrower types."""
    stored = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}[settings.dtype]
    computed = {"float16": 2e-2, "bfloat16": 1e-1}.get(settings.compute_dtype, 1e-5)

    return max(stored, computed)


def open_shard(store: Store, settings: Settings, name: str) -> ShardReader:
    """Open a shard to read arrays from."""
    shard = local_shard(store, name)
    return formats.open_reader(settings.format, shard, settings.layout)


def _sample(parts: Sequence[Part], size: int) -> list[dict[str, Any]]:
    """Draw utterances that were embedded, without reading more of the index than the
    parts that they are in."""
    draw = random.Random(0)
    counts = [part.count - part.failed for part in parts]
    total = sum(counts)
    wanted = sorted(draw.sample(range(total), min(size, total)))
    rows: list[dict[str, Any]] = []
    start = 0

    for part, count in zip(parts, counts, strict=True):
        here = [number - start for number in wanted if start <= number < start + count]
        start += count
        if here:
            embedded = [
                row for row in part.table().to_pylist() if row["status"] == EMBEDDED
            ]
            rows += [embedded[number] for number in here if number < len(embedded)]

    return rows


def _utterance(row: dict[str, Any], base: str) -> Utterance:
    """
    :param base: what relative paths were relative to.
    """
    start, end = row["start"], row["end"]
    whole = start is None and end is None
    path = row["source"]
    if not (is_url(path) or os.path.isabs(path)):
        path = os.path.join(base, path)
    audio: Any = path if whole else Clip(path, start or 0.0, end)

    return Utterance(id=row["id"], audio=audio, source=row["source"])


def verify_dump(
    path: str,
    *,
    sample: int = 8,
    model: str | None = None,
    device: torch.device | str = "cpu",
) -> Verification:
    """Read a dump again, all of it.

    :param path: the folder or URL of a dump, or of the parts of a job array.
    :param sample: how many utterances to embed again; 0 for none.
    :param model: the model to do so with, where it is not where it was.
    :raises DumpError: if there is no dump at all.
    """
    verifier = _Verifier()
    stores = dump_stores(path)
    if missing := missing_jobs(path, stores):
        verifier.problems.append(missing)
    checked = [(store, *verifier.check(store)) for store in stores]
    share = math.ceil(sample / max(len(checked), 1))

    for store, settings, info, parts in checked:
        if share and not verifier.problems:
            verifier.embed_again(
                store,
                settings,
                info,
                parts,
                sample=share,
                model=model,
                device=device,
            )

    return Verification(
        utterances=verifier.utterances,
        embedded=verifier.utterances - verifier.failed,
        failed=verifier.failed,
        shards=verifier.shards,
        bytes=verifier.bytes,
        sampled=verifier.sampled,
        largest_difference=verifier.largest,
        problems=tuple(verifier.problems),
    )
