"""A corpus -> a dump of its embeddings: plan, embed, write, go on after a kill.

Comes in: a source and a folder. Goes out: a dump that :func:`open_dump` reads, and a
:class:`DumpReport`. What there is on disk is all the state there is: committed shards
are passed over, everything else is embedded.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, Literal

import torch

from seamless_w2vbert import encoder, streaming
from seamless_w2vbert.constants import FBANK_STRIDE, NUM_MEL_BINS, SAMPLING_RATE
from seamless_w2vbert.dumping import formats, index, statistics
from seamless_w2vbert.dumping.embedding import (
    Outcome,
    ShardEmbedder,
    StorageWatch,
    commit,
)
from seamless_w2vbert.dumping.index import DATA, Part
from seamless_w2vbert.dumping.planning import (
    Census,
    Shard,
    Share,
    Size,
    check_share,
    cut_shards,
    duplicate,
    id_hash,
    measured,
    take_census,
)
from seamless_w2vbert.dumping.settings import (
    DTYPES,
    FILE,
    POOLS,
    VERSION,
    Settings,
    column_names,
    model_digest,
    now,
    provenance,
    read_info,
    replaced_stages,
    write_info,
)
from seamless_w2vbert.dumping.sources import Source, Utterance, open_source
from seamless_w2vbert.dumping.sources.base import storable
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import ArgumentError, DumpError
from seamless_w2vbert.pipeline import SpeechEncoderPipeline

PLAN = "plan.json"
"""What the jobs of an array share: which ids are whose."""

DEFAULT_SHARD_SIZE = 512 * 10**6
DEFAULT_SHARD_SECONDS = 3600.0

MAX_UTTERANCES = 10_000
"""In a shard: names take room too, in memory and in what lists a shard's content."""

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class Progress:
    """How far a dump has come; what ``progress`` is called with."""

    total: int | None
    """The utterances in the source; None where only its end will tell."""

    done: int = 0
    """Those embedded or failed, by earlier runs too."""

    failed: int = 0
    audio_seconds: float = 0.0
    """Of the embedded ones."""

    new: int = 0
    """Those of ``done`` that are of this run, and their audio."""

    new_audio_seconds: float = 0.0
    elapsed: float = 0.0
    """Seconds since this run began to embed."""


@dataclass(frozen=True)
class DumpReport:
    """What came of a dump."""

    location: str
    utterances: int
    embedded: int
    failed: int
    hours: float
    """Of audio embedded, by earlier runs too."""

    new: int
    """Utterances of this run."""

    new_hours: float
    elapsed: float
    """Seconds that this run took, without loading the model."""

    complete: bool
    """False where it was told to stop before the end of the source."""

    @classmethod
    def of(
        cls,
        store: Store,
        parts: Sequence[Part],
        new: Sequence[Part] = (),
        *,
        elapsed: float = 0.0,
        complete: bool = True,
    ) -> DumpReport:
        """Count what is committed.

        :param new: what of it is of this run.
        """
        count = sum(part.count for part in parts)
        failed = sum(part.failed for part in parts)

        return cls(
            location=str(store),
            utterances=count,
            embedded=count - failed,
            failed=failed,
            hours=_hours(parts),
            new=sum(part.count for part in new),
            new_hours=_hours(new),
            elapsed=elapsed,
            complete=complete,
        )


def _hours(parts: Sequence[Part]) -> float:
    return sum(part.samples for part in parts) / SAMPLING_RATE / 3600


@dataclass(frozen=True)
class DumpPlan:
    """What a dump would be: what ``--dry-run`` shows."""

    utterances: int
    hours: float
    bytes: int
    """On disk, of the embeddings."""

    seconds: float
    """An estimate from embedding the first minute of the source."""

    layers: tuple[int, ...]
    dim: int


def dump(
    source: str | os.PathLike[str] | Iterable[Any],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | SpeechEncoderPipeline = "conformer_shaw",
    *,
    layers: encoder.Layers = -1,
    format: str = "parquet",
    dtype: str = "float32",
    pool: str | None = None,
    columns: Sequence[str] = (),
    normalize: str | os.PathLike[str] | None = None,
    chunk: float | None = None,
    overlap: float = 0.0,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    strict: bool = False,
    retry_failed: bool = False,
    shard_index: int = 0,
    num_shards: int = 1,
    shard_size: int = DEFAULT_SHARD_SIZE,
    shard_seconds: float = DEFAULT_SHARD_SECONDS,
    engine: Engine = "local",
    workers: int | None = None,
    max_frames: int | None = None,
    audio_column: str = "audio",
    id_column: str = "id",
    progress: Callable[[Progress], None] | None = None,
    stop: Event | None = None,
) -> DumpReport:
    """Embed a corpus into files that other tools read.

    Called again with the same arguments it goes on where it was interrupted, by
    whatever. An utterance that cannot be embedded is recorded in the index with its
    reason.

    :param source: what :func:`seamless_w2vbert.dumping.sources.open_source` takes: a
        folder, glob, manifest or dataset, or a list of paths or (id, audio) pairs.
    :param out: the folder or URL of the dump. With ``num_shards`` each job makes a
        folder ``part-<index>-of-<num>`` in it; :func:`open_dump` reads them together.
    :param model: as for :meth:`SpeechEncoderPipeline.from_pretrained`, or a pipeline,
        which is used as it is.
    :param layers: layer numbers as in Transformers' ``hidden_states``: 17 is the output
        of block 17, -1 the last.
    :param format: ``parquet``, ``safetensors``, ``npy`` or ``fairseq``.
    :param dtype: of the stored embeddings: ``float32``, ``float16`` or ``bfloat16``.
    :param pool: ``mean``, ``max`` or ``mean+std`` over frames; None for all frames.
    :param columns: columns of the source to carry into the index.
    :param normalize: statistics that are subtracted and divided by, before pooling:
        a dump, or a file, see :func:`~.statistics.load_normalizer`.
    :param chunk: embed recordings longer than this many seconds in chunks, that
        overlap by ``overlap`` seconds; None embeds each as a whole.
    :param compute_dtype: of the model.
    :param strict: stop at the first utterance that cannot be embedded.
    :param retry_failed: embed again the shards that have failures.
    :param shard_index: which job of an array this is, from 0.
    :param num_shards: how many jobs there are.
    :param shard_size: the bytes that a shard may have.
    :param shard_seconds: the seconds of audio that it may have; with the size, what a
        kill costs at most.
    :param engine: ``"ray"`` embeds on ``workers`` actors of Ray Data.
    :param max_frames: as for :meth:`SpeechEncoderPipeline.stream`.
    :param progress: called whenever an utterance is done.
    :param stop: when set, the shard at hand is finished and the dump left resumable.

    :raises ArgumentError: if arguments make no sense.
    :raises DumpError: if the dump cannot be written, is of other settings, or is being
        written by another process; if the source has no utterance or two of one id.
    """
    check_share(shard_index, num_shards)
    _check_options(format, dtype, pool, shard_size, shard_seconds, engine, workers)

    opened = open_source(
        source, columns=columns, audio_column=audio_column, id_column=id_column
    )
    pipeline = load_pipeline(model, device, compute_dtype)
    settings, normalizer = make_settings(
        pipeline,
        opened,
        layers=layers,
        format=format,
        dtype=dtype,
        pool=pool,
        chunk=chunk,
        overlap=overlap,
        normalize=normalize,
    )
    store = Store(out)
    check_folder(store, {PLAN} if num_shards > 1 else set(), is_array=num_shards > 1)
    store.create()

    if num_shards > 1:
        census = _shared_census(store, opened, num_shards)
        bounds = census.bounds[shard_index : shard_index + 2]
        opened = Share(opened, *bounds)
        store = store / f"part-{shard_index:05d}-of-{num_shards:05d}"
        store.create()
        settings = replace(
            settings,
            share={
                "index": shard_index,
                "num": num_shards,
                "from": f"{bounds[0]:016x}",
                "to": f"{bounds[1]:016x}",
            },
        )

    stop = stop or Event()
    run = _Run(
        store,
        opened,
        settings,
        size_of(settings, shard_size, shard_seconds),
        progress or (lambda _: None),
        stop,
    )
    is_pipeline = isinstance(model, SpeechEncoderPipeline)
    name = "<pipeline>" if is_pipeline else os.fspath(model)  # type: ignore[arg-type]
    embedder = ShardEmbedder(
        pipeline,
        settings,
        normalizer,
        strict=strict,
        max_frames=max_frames,
        finished=run.utterance_done,
    )

    if engine == "ray" and is_pipeline:
        raise ArgumentError("Ray loads models by name; pass a name or a path.")

    with store.lock():
        run.begin(
            {
                "source": storable(opened.name),
                "audio_column": audio_column,
                "id_column": id_column,
                "working_directory": storable(os.getcwd()),
                "model": storable(name),
                **provenance(pipeline),
            },
            retry_failed=retry_failed,
        )
        if normalizer is not None:
            store.write(statistics.NORMALIZER, normalizer.to_npz())

        if engine == "ray":
            from seamless_w2vbert.dumping import ray_engine

            parts = ray_engine.embed(
                run.shards(),
                store,
                settings,
                normalizer,
                workers=workers,
                strict=strict,
                max_frames=max_frames,
                model=name,
                device=str(device),
                compute_dtype=compute_dtype,
                root=opened.root,
                attempt=run.attempt,
                stop=stop,
            )
            return run.finish(map(run.part_done, parts))

        return run.finish(
            embed_here(
                embedder, run.shards(), store, settings, opened.root, run.attempt, stop
            )
        )


def check_folder(store: Store, known: set[str], *, is_array: bool = False) -> None:
    """See that a folder is empty, or a dump's.

    :param known: names that may be in it besides.
    :param is_array: whether parts of jobs may be.
    :raises DumpError: if it is something else's.
    """
    names = store.names()

    if FILE in names:
        if is_array:
            raise DumpError(
                f"{store}: is the dump of one job; choose another folder for several."
            )
        return

    foreign = [
        name
        for name in names
        if name not in known
        and not name.startswith(".")
        and not (is_array and name.startswith("part-"))
    ]

    if foreign:
        raise DumpError(
            f"{store}: is not empty and no dump ({storable(foreign[0])} is in it); "
            "choose an empty folder."
        )


def load_pipeline(
    model: str | os.PathLike[str] | SpeechEncoderPipeline,
    device: torch.device | str,
    compute_dtype: torch.dtype,
) -> SpeechEncoderPipeline:
    """Return the pipeline that embeds."""
    if isinstance(model, SpeechEncoderPipeline):
        return model

    return SpeechEncoderPipeline.from_pretrained(model, device, compute_dtype)


def _check_options(
    format: str,
    dtype: str,
    pool: str | None,
    shard_size: int,
    shard_seconds: float,
    engine: str,
    workers: int | None,
) -> None:
    for name, value, known in (
        ("format", format, tuple(formats.FORMATS)),
        ("dtype", dtype, DTYPES),
        ("pool", pool, (*POOLS, None)),
        ("engine", engine, ("local", "ray")),
    ):
        if value not in known:
            names = ", ".join(repr(one) for one in known)
            raise ArgumentError(f"`{name}` is {value!r}; expected one of {names}.")

    formats.check_dtype(format, dtype)

    for name, number in (("shard_size", shard_size), ("shard_seconds", shard_seconds)):
        known_number = isinstance(number, (int, float)) and math.isfinite(number)
        if isinstance(number, bool) or not known_number or not number > 0:
            raise ArgumentError(f"`{name}` is {number!r}; expected more than 0.")

    if workers is not None and (engine == "local" or workers < 1):
        raise ArgumentError("`workers` is the number of Ray's, from 1 on.")


def make_settings(
    pipeline: SpeechEncoderPipeline,
    source: Source,
    *,
    layers: encoder.Layers,
    format: str,
    dtype: str,
    pool: str | None,
    chunk: float | None,
    overlap: float,
    normalize: str | os.PathLike[str] | None,
) -> tuple[Settings, statistics.Normalizer | None]:
    """Return what decides the content of a dump, and what to normalise it with."""
    streaming.chunk_frames(chunk, overlap)
    numbers = encoder.resolve_layers(
        -1 if layers is None else layers, pipeline.num_layers
    )
    model_dim = _model_dim(pipeline, numbers)
    normalizer = None

    if normalize is not None:
        normalizer = statistics.load_normalizer(
            os.fspath(normalize), numbers, model_dim
        )

    reserved = {*index.NAMES, "layer", "embedding"} & source.column_types.keys()
    if reserved:
        raise ArgumentError(
            f"A column cannot be carried under the name {sorted(reserved)[0]!r}, which "
            "the dump uses; rename it in the manifest."
        )

    return Settings(
        format=format,
        layers=numbers,
        dtype=dtype,
        pool=pool,
        dim=model_dim * (2 if pool == "mean+std" else 1),
        chunk=chunk,
        overlap=overlap,
        normalize=None if normalizer is None else normalizer.digest,
        model=model_digest(pipeline.module),
        stages=replaced_stages(pipeline),
        compute_dtype=str(pipeline.dtype).removeprefix("torch."),
        columns=column_names(source.column_types),
    ), normalizer


def _model_dim(pipeline: SpeechEncoderPipeline, layers: tuple[int, ...]) -> int:
    """Run a second of noise: whatever steps were put into the pipeline, this shows how
    wide its hidden states are, and that it has any."""
    noise = torch.randn(100, NUM_MEL_BINS, generator=torch.Generator().manual_seed(0))
    hidden = pipeline.encoder_frontend(pipeline.pad([noise]))
    states = pipeline.encoder(hidden, layers=layers).hidden_states
    dims = {states[layer].size(-1) for layer in layers}

    if len(dims) > 1:
        raise ArgumentError(
            f"Layers {layers} have different widths, {sorted(dims)}; dump each alone."
        )

    return dims.pop()


def size_of(settings: Settings, shard_size: int, shard_seconds: float) -> Size:
    """Return how large a shard may get."""
    pooled = settings.pool is not None
    per_vector = settings.bytes_per_vector

    return Size(
        max_bytes=int(shard_size),
        max_frames=int(shard_seconds * 100),
        max_utterances=MAX_UTTERANCES,
        bytes_per_frame=0 if pooled else per_vector,
        bytes_per_utterance=per_vector if pooled else 0,
    )


def _shared_census(store: Store, source: Source, num_shards: int) -> Census:
    """Divide a source among the jobs of an array, once for all of them."""

    def read() -> Census | None:
        try:
            return Census.from_json(json.loads(store.read(PLAN)))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as ex:
            raise DumpError(
                f"{store}/{PLAN}: is damaged ({ex}); dump into another folder."
            ) from None

    census = read()
    mine = None

    if census is None:
        mine = take_census(
            source, with_lengths=not source.streaming, num_shards=num_shards
        )
        if not mine.utterances:
            raise _empty(source)
        store.write_new(PLAN, json.dumps(mine.to_json(), indent=2).encode())
        census = read() or mine  # another job may have been first

    if len(census.bounds) != num_shards + 1:
        raise DumpError(
            f"{store}: is the dump of {len(census.bounds) - 1} jobs, not {num_shards}; "
            "use the same --num-shards, or another folder."
        )

    if not source.streaming:
        mine = mine or take_census(source)
        if mine.digest != census.digest:
            raise DumpError(
                f"{store}: its jobs were planned for a source of {census.utterances} "
                f"utterances, and {source.name} has other ids ({mine.utterances} "
                "utterances); dump it into another folder."
            )

    return census


def _empty(source: Source) -> DumpError:
    return DumpError(f"{source.name}: there is no audio to embed.")


class _Run:
    """One run over a source, from what is there to what is to be there."""

    def __init__(
        self,
        store: Store,
        source: Source,
        settings: Settings,
        size: Size,
        progress: Callable[[Progress], None],
        stop: Event,
    ) -> None:
        self._store = store
        self._source = source
        self._settings = settings
        self._size = size
        self._report = progress
        self.stop = stop
        self._info: dict[str, Any] = {}
        self._parts: list[Part] = []
        self._again: set[int] = set()
        self._was_complete = False
        self.attempt = 0
        self._started = 0.0
        self._progress = Progress(total=None)

    def begin(self, origin: dict[str, Any], *, retry_failed: bool) -> None:
        """Look at what is there, and say in ``dump.json`` what is to come."""
        store, settings = self._store, self._settings
        there = read_info(store)

        if there is not None:
            settings.check_equal(Settings.from_json(there["settings"]), str(store))
            if "merged_from" in there:
                raise DumpError(
                    f"{store}: was merged from other dumps; go on with those."
                )

        total = None
        if not self._source.streaming:
            total = take_census(self._source).utterances
            if not total and settings.share is None:
                raise _empty(self._source)

        info: dict[str, Any] = there or {"runs": [], "complete": False}
        # A retry that was interrupted is gone on with, and is no other.
        self.attempt = info.get("attempt", 0)
        if retry_failed and (info["complete"] or not self.attempt):
            self.attempt += 1

        self._parts = self._committed()
        self._again = {
            part.first
            for part in self._parts
            if retry_failed and part.failed and part.attempt < self.attempt
        }
        runs = info["runs"]
        if not runs or any(runs[-1].get(key) != origin[key] for key in origin):
            runs = [*runs, {"started": now(), **origin}]

        self._was_complete = bool(info["complete"]) and not self._again
        self._info = {
            "version": VERSION,
            "complete": False,
            "attempt": self.attempt,
            "settings": settings.to_json(),
            "runs": runs,
        }
        if not self._was_complete:
            write_info(store, self._info)

        there_already = [part for part in self._parts if part.first not in self._again]
        self._progress = Progress(
            total=total,
            done=sum(part.count for part in there_already),
            failed=sum(part.failed for part in there_already),
            audio_seconds=sum(part.samples for part in there_already) / SAMPLING_RATE,
        )
        self._started = time.monotonic()

    def _committed(self) -> list[Part]:
        """Return what is committed and whose files are there; remove files that no
        part names."""
        store = self._store
        present = set(store.names(DATA))
        parts = [part for part in index.read_parts(store) if part.shards <= present]

        # Behind a URL, another process may be about to commit them.
        if not store.is_remote:
            for name in present - {name for part in parts for name in part.shards}:
                store.remove(f"{DATA}/{name}")

        return parts

    def shards(self) -> Iterator[Shard]:
        """Cut what is to be done."""
        return cut_shards(self._utterances(), self._parts, self._size, self._again)

    def _utterances(self) -> Iterable[Utterance]:
        if not self._source.streaming:
            return self._source

        return _without_duplicates(self._source)

    def utterance_done(self, outcome: Outcome) -> None:
        """Count an utterance that this process embedded."""
        self._advance(1, int(outcome.error is not None), outcome.samples)

    def part_done(self, part: Part) -> Part:
        """Count a shard that another process embedded."""
        self._advance(part.count, part.failed, part.samples)

        return part

    def _advance(self, done: int, failed: int, samples: int) -> None:
        before = self._progress
        seconds = samples / SAMPLING_RATE
        self._progress = replace(
            before,
            done=before.done + done,
            failed=before.failed + failed,
            audio_seconds=before.audio_seconds + seconds,
            new=before.new + done,
            new_audio_seconds=before.new_audio_seconds + seconds,
            elapsed=time.monotonic() - self._started,
        )
        self._report(self._progress)

    def finish(self, results: Iterable[Part]) -> DumpReport:
        """Take in what is committed, as it is; then close the dump."""
        by_place = {part.first: part for part in self._parts}
        new: list[Part] = []

        for part in results:
            if self._was_complete and not new:
                write_info(self._store, self._info)
            by_place[part.first] = part
            new.append(part)

        parts = [by_place[first] for first in sorted(by_place)]
        count = sum(part.count for part in parts)
        complete = not self.stop.is_set() or self._progress.done == self._progress.total

        if complete and (new or not self._was_complete):
            if self._progress.total not in (None, count):
                raise DumpError(
                    f"{self._source.name}: had {self._progress.total} utterances at "
                    f"the beginning and {count} at the end; run the command again."
                )
            close(self._store, self._settings, self._info, parts)

        return DumpReport.of(
            self._store,
            parts,
            new,
            elapsed=time.monotonic() - self._started,
            complete=complete,
        )


def close(
    store: Store, settings: Settings, info: dict[str, Any], parts: Sequence[Part]
) -> None:
    """Write what is known of a dump when all of it is there."""
    moments = index.total_moments(parts)
    store.write(statistics.FILE, statistics.to_npz(moments))
    for layer, of_layer in moments.items():
        store.write(f"statistics/layer-{layer}.pt", statistics.to_pt(of_layer))

    formats.finish(settings.format, store, DATA, parts, settings.layout)

    report = DumpReport.of(store, parts)
    counts = {
        key: getattr(report, key)
        for key in ("utterances", "embedded", "failed", "hours")
    }
    write_info(store, {**info, "complete": True, **counts, "finished": now()})


def _without_duplicates(source: Source) -> Iterator[Utterance]:
    seen: dict[int, int] = {}

    for position, utterance in enumerate(source):
        first = seen.setdefault(id_hash(utterance.id), position)
        if first != position:
            raise duplicate(source, utterance.id, first, position)
        yield utterance


def embed_here(
    embedder: ShardEmbedder,
    shards: Iterable[Shard],
    store: Store,
    settings: Settings,
    root: str | None,
    attempt: int,
    stop: Event,
) -> Iterator[Part]:
    """Embed shards in this process; one is written while the next is embedded."""
    watch = StorageWatch(root)
    pending: Future[Part] | None = None

    with ThreadPoolExecutor(1) as writer:
        for shard, outcomes, moments in embedder.embed(shards):
            watch.check(shard, outcomes)
            if pending is not None:
                yield pending.result()
            pending = writer.submit(
                commit, store, settings, shard, outcomes, moments, attempt
            )
            del outcomes  # when it is written, nothing holds it any more
            if stop.is_set():
                break

        if pending is not None:
            yield pending.result()


# -- a plan --------------------------------------------------------------------------


def plan(
    source: str | os.PathLike[str] | Iterable[Any],
    model: str | os.PathLike[str] | SpeechEncoderPipeline = "conformer_shaw",
    *,
    layers: encoder.Layers = -1,
    format: str = "parquet",
    dtype: str = "float32",
    pool: str | None = None,
    columns: Sequence[str] = (),
    normalize: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype = torch.float32,
    shard_index: int = 0,
    num_shards: int = 1,
    shard_size: int = DEFAULT_SHARD_SIZE,
    shard_seconds: float = DEFAULT_SHARD_SECONDS,
    chunk: float | None = None,
    overlap: float = 0.0,
    audio_column: str = "audio",
    id_column: str = "id",
    max_frames: int | None = None,
) -> DumpPlan:
    """Say what :func:`dump` would do, from headers alone, but for the first minute of
    the source, which is embedded to see how long the rest would take.

    The parameters are those of :func:`dump`.
    """
    check_share(shard_index, num_shards)
    _check_options(format, dtype, pool, shard_size, shard_seconds, "local", None)
    opened = open_source(
        source, columns=columns, audio_column=audio_column, id_column=id_column
    )
    pipeline = load_pipeline(model, device, compute_dtype)
    settings, _ = make_settings(
        pipeline,
        opened,
        layers=layers,
        format=format,
        dtype=dtype,
        pool=pool,
        chunk=chunk,
        overlap=overlap,
        normalize=normalize,
    )
    census = take_census(opened, with_lengths=True, num_shards=num_shards)

    if num_shards > 1:
        opened = Share(opened, *census.bounds[shard_index : shard_index + 2])
        frames = utterances = 0
        for _, length in measured(opened):
            frames, utterances = frames + length, utterances + 1
    else:
        frames, utterances = census.frames, census.utterances

    size = size_of(settings, shard_size, shard_seconds)
    run = streaming.Stream(
        pipeline,
        layers=settings.layers,
        chunk=chunk,
        overlap=overlap,
        max_frames=max_frames,
    )
    minute: list[tuple[str, Any, int]] = []
    length = 0

    for utterance, of_one in measured(opened):
        minute.append((utterance.id, utterance.audio, of_one))
        length += of_one
        if length >= 6000:
            break

    elapsed = 0.0
    for _ in range(2):  # the first time around things are loaded
        start = time.perf_counter()
        for _ in run.groups([minute], lambda item: None):
            pass
        elapsed = time.perf_counter() - start

    return DumpPlan(
        utterances=utterances,
        hours=frames / 100 / 3600,
        bytes=size.bytes_per_frame * (frames // FBANK_STRIDE)
        + size.bytes_per_utterance * utterances,
        seconds=elapsed * frames / max(length, 1),
        layers=settings.layers,
        dim=settings.dim,
    )
