"""A dump -> its embeddings by id, as NumPy arrays, and as training data.

Comes in: the folder or URL of a dump, of the jobs of an array, or several of these.
Goes out: :class:`Dump`, a read-only mapping. Shards are opened when something in them
is asked for; of an utterance nothing is held but its row in an Arrow table.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import threading
import warnings
from collections import OrderedDict
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from seamless_w2vbert.constants import FBANK_SHIFT, FBANK_STRIDE, SAMPLING_RATE
from seamless_w2vbert.dumping import formats, index, statistics
from seamless_w2vbert.dumping.formats.base import WAY_OUT, ShardReader
from seamless_w2vbert.dumping.index import DATA
from seamless_w2vbert.dumping.settings import Settings, require_info
from seamless_w2vbert.dumping.statistics import Moments
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import ArgumentError, DumpError

Location = str | os.PathLike[str]

"""The folder of the shards."""

SAMPLES_PER_FRAME: Final = FBANK_SHIFT * FBANK_STRIDE
"""Samples that the encoder moves on by: frame k covers [0.02 k, 0.02 (k + 1)) s."""

_MAX_OPEN: Final = 64
"""Shards that are kept open, each of which takes a file descriptor or a few."""

_MAX_COPIES: Final = 8
"""Shards behind a URL that are kept as local copies."""

_JOB = re.compile(r"part-(\d+)-of-(\d+)")


def open_dump(
    path: Location | Sequence[Location],
    layer: int | None = None,
    normalize: bool | Location = False,
) -> Dump:
    """Open a dump of embeddings for reading.

    ::

        dump = open_dump("out/")
        dump["utt-1"]  # (frames, dim)

    A dump that is not complete is opened with a warning, and has what is committed.

    :param path: the folder or URL of a dump; one that holds the ``part-*-of-*`` folders
        of a job array, which are read together; or a list of such.
    :param layer: the layer that arrays are of, as Transformers numbers
        ``hidden_states``. It need not be given for a dump of one layer.
    :param normalize: return ``(x - mean) / sqrt(var)``, in float32, with the statistics
        of the corpus that is dumped, or of a dump or ``statistics.npz`` that is named.

    :raises DumpError: if there is no dump, if it is damaged or of a newer version, if
        several have different settings or an id in common, or if what is stored
        cannot be normalised.
    :raises ArgumentError: if ``layer`` is not in the dump, or the statistics that
        ``normalize`` names are not of its layers.
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    content = _Content([os.fspath(one) for one in paths])
    dump = Dump(content, layer, normalize)

    for message in content.warnings:
        warnings.warn(message, stacklevel=2)

    return dump


def dump_stores(path: Location) -> list[Store]:
    """Return the dumps at ``path``: the one that it is, or those of the jobs of an
    array that it holds, in their order, without those that have not begun.

    :raises DumpError: if there is none.
    """
    root = Store(path)

    if root.exists("dump.json"):
        return [root]

    stores = [root / name for name in root.names() if _JOB.fullmatch(name)]
    stores = [store for store in stores if store.exists("dump.json")]

    if not stores:
        raise DumpError(
            f"{root}: there is no dump: it has neither a dump.json nor part-*-of-* "
            "folders with one. Make one with `seamless-w2vbert dump`."
        )

    return stores


def missing_jobs(path: Location, stores: Sequence[Store]) -> str | None:
    """Say which jobs of an array have no dump, or that their dumps do not add up to
    what was planned; None where they do, or where ``path`` is no array."""
    root = Store(path)

    if not root.exists("plan.json"):
        return None

    plan = json.loads(root.read("plan.json"))
    infos = [require_info(store) for store in stores]
    there = {info["settings"]["share"]["index"] for info in infos}
    absent = sorted(set(range(plan["num_shards"])) - there)

    if absent:
        return (
            f"{root}: of {plan['num_shards']} jobs {len(absent)} are missing, the "
            f"first is number {absent[0]}; dump with --shard-index {absent[0]} "
            f"--num-shards {plan['num_shards']}."
        )

    count = sum(info.get("utterances", 0) for info in infos)

    if all(info["complete"] for info in infos) and count != plan["utterances"]:
        return (
            f"{root}: was planned for {plan['utterances']} utterances and has {count}; "
            "its jobs were of different sources."
        )

    return None


def local_shard(store: Store, name: str) -> Path:
    """Return the local path of a shard, behind a URL that of a copy."""
    try:
        return store.local(f"{DATA}/{name}")
    except FileNotFoundError:
        raise DumpError(f"{store}/{DATA}/{name}: is not there; {WAY_OUT}") from None


class _Content:
    """What is on disk: dumps that are read as one. It is shared by all views of it."""

    def __init__(self, locations: Sequence[str]) -> None:
        """
        :raises DumpError: see :func:`open_dump`.
        """
        if not locations:
            raise DumpError("There is no dump to open: the list is empty.")

        self.name = ", ".join(locations)
        self.warnings: list[str] = []
        self.stores: list[Store] = []
        self.infos: list[dict[str, Any]] = []

        for location in locations:
            stores = dump_stores(location)
            infos = [require_info(store) for store in stores]
            self.stores += stores
            self.infos += infos
            if missing := _missing(location, stores, infos):
                self.warnings.append(missing)

        self.settings = _common_settings(self.stores, self.infos)
        self.layout = self.settings.layout
        self.format = formats.find_format(self.settings.format)
        tables = [_index_of(store) for store in self.stores]

        try:
            self.index = pa.concat_tables(tables).combine_chunks()
        except pa.ArrowException as ex:
            raise DumpError(
                f"{self.name}: the indexes do not go together: {ex}"
            ) from None

        # Of each row: which store it is of.
        self._store_ends = np.cumsum([table.num_rows for table in tables])
        self._refuse_duplicates()
        self._read_columns()
        self._forget_readers()

    def _refuse_duplicates(self) -> None:
        ids = self.index["id"]

        if pc.count_distinct(ids).as_py() == len(ids):
            return

        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
        raise DumpError(
            f"{self.name}: the id {twice.as_py()!r} occurs more than once; open the "
            "dumps that have it one by one."
        )

    def _read_columns(self) -> None:
        table = self.index
        embedded = pc.equal(table["status"], index.EMBEDDED).to_numpy()
        shards = table["shard"].dictionary_encode().combine_chunks()

        self.rows = np.flatnonzero(embedded)
        """The rows of what was embedded."""

        self._frames = _numbers(table["frames"])
        self._offsets = _numbers(table["offset"])
        self._shards = _numbers(shards.indices)
        self._shard_names: list[str] = shards.dictionary.to_pylist()

        if (self._shards[self.rows] < 0).any() or (self._offsets[self.rows] < 0).any():
            raise DumpError(
                f"{self.name}: the index does not say of every embedded utterance "
                f"where it is; {WAY_OUT}"
            )

    # Open files and dictionaries are not sent to other processes: they make their own.
    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("_readers", "_lock", "_last", "ids", "row_of", "failures")
        return {
            key: self.__dict__[key] for key in self.__dict__ if key not in made_anew
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._readers: OrderedDict[tuple[int, int], ShardReader] = OrderedDict()
        self._last: ShardReader | None = None
        self._lock = threading.Lock()

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The ids of what was embedded."""
        return tuple(self.index["id"].take(pa.array(self.rows)).to_pylist())

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each of them."""
        return dict(zip(self.ids, self.rows.tolist(), strict=True))

    @cached_property
    def failures(self) -> dict[str, str]:
        """The reasons of what failed."""
        failed = self.index.filter(pc.equal(self.index["status"], index.FAILED))
        return dict(
            zip(failed["id"].to_pylist(), failed["error"].to_pylist(), strict=True)
        )

    def frames(self, row: int) -> int:
        return int(self._frames[row])

    def read(
        self, row: int, layer: int, start: int = 0, stop: int | None = None
    ) -> NDArray[Any]:
        id = self.index["id"][row].as_py()
        return self._reader(row).read(
            id, layer, int(self._offsets[row]), self.frames(row), start, stop
        )

    def _reader(self, row: int) -> ShardReader:
        number = int(np.searchsorted(self._store_ends, row, side="right"))
        key = number, int(self._shards[row])

        with self._lock:
            reader = self._readers.pop(key, None)

            if reader is None:
                store = self.stores[number]
                limit = _MAX_COPIES if store.is_remote else _MAX_OPEN
                while len(self._readers) >= limit:
                    self._close_oldest()
                path = local_shard(store, self._shard_names[key[1]])
                reader = self.format.reader(path, self.layout)

            # The one used last comes last.
            self._readers[key] = reader

            # Decoded values are kept of one shard: the one that is read in order.
            if self._last is not None and self._last is not reader:
                self._last.release()
            self._last = reader

        return reader

    def _close_oldest(self) -> None:
        (number, _), reader = self._readers.popitem(last=False)

        if self.stores[number].is_remote:
            # What is still mapped of a copy that is removed stays readable.
            if reader.path.is_dir():
                shutil.rmtree(reader.path, ignore_errors=True)
            else:
                reader.path.unlink(missing_ok=True)

    @cached_property
    def moments(self) -> dict[int, Moments]:
        """The corpus statistics of each layer, of all the dumps together."""
        total: dict[int, Moments] = {}

        for store in self.stores:
            where = f"{store}/{statistics.FILE}"
            try:
                content = store.read(statistics.FILE)
            except FileNotFoundError:
                raise DumpError(
                    f"{where}: is not there: it is written when a dump is complete; "
                    "run the same dump command again to complete it."
                ) from None
            try:
                with np.load(io.BytesIO(content), allow_pickle=False) as file:
                    count = int(file["frames"])
                    found = {
                        layer: Moments(
                            count,
                            file[f"mean_{layer}"],
                            file[f"var_{layer}"] * count,
                        )
                        for layer in (self.layout.layers if count else ())
                    }
            except (
                ValueError,
                KeyError,
                TypeError,
                OSError,
                EOFError,
                BadZipFile,
            ) as ex:
                raise DumpError(f"{where}: is damaged: {ex}; dump again.") from None

            statistics.merge_into(total, found)

        if not total:
            raise DumpError(f"{self.name}: has no statistics: it has no frames.")

        return total


class Dump(Mapping[str, NDArray[Any]]):
    """The embeddings of a dump by utterance id, in the order of its source.

    Made by :func:`open_dump`. ``dump[id]`` is float32 or float16, bfloat16 comes as
    float32. *Shape:* (frames, dim), or (dim,) if the dump is pooled. Arrays are
    read-only: they are memory-mapped where the format allows. Utterances that failed
    are not in it; see :attr:`failures`. The dumps of a job array follow one another.
    """

    def __init__(
        self, content: _Content, layer: int | None, normalize: bool | Location
    ) -> None:
        self._content = content
        self._normalize = normalize
        layers = content.layout.layers

        if layer is not None and layer not in layers:
            raise ArgumentError(
                f"{content.name}: has no layer {layer}; it has {_listed(layers)}."
            )

        self._layer = layers[0] if layer is None and len(layers) == 1 else layer
        self._scales: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}

        if normalize:
            wanted = layers if self._layer is None else (self._layer,)
            self._scales = self._load_scales(wanted)

    def _load_scales(
        self, layers: tuple[int, ...]
    ) -> dict[int, tuple[NDArray[Any], NDArray[Any]]]:
        """Return the mean and the standard deviation by layer, float32."""
        content, settings = self._content, self._content.settings

        if settings.normalize is not None:
            raise DumpError(
                f"{content.name}: is already normalised; open it without `normalize`."
            )
        if settings.pool not in (None, "mean"):
            raise DumpError(
                f"{content.name}: is pooled by {settings.pool}, which is not the same "
                "before and after frames are normalised; dump it with --normalize."
            )

        if not isinstance(self._normalize, bool):
            loaded = statistics.load_normalizer(
                os.fspath(self._normalize), layers, settings.dim
            )
            return {
                layer: (loaded.mean[layer].numpy(), loaded.std[layer].numpy())
                for layer in layers
            }

        moments = content.moments

        for layer in layers:
            if not (moments[layer].variance > 0).all():
                raise DumpError(
                    f"{content.name}: a variance of layer {layer} is 0: there are too "
                    "few frames to normalise with."
                )

        return {
            layer: (
                moments[layer].mean.astype(np.float32),
                np.sqrt(moments[layer].variance).astype(np.float32),
            )
            for layer in layers
        }

    # -- embeddings ------------------------------------------------------------------

    def __getitem__(self, id: str) -> NDArray[Any]:
        return self._read(self._row(id))

    def slice(
        self,
        id: str,
        start: float = 0.0,
        end: float | None = None,
        layer: int | None = None,
    ) -> NDArray[Any]:
        """Return the frames that overlap a stretch of an utterance.

        Frame k covers the seconds [0.02 k, 0.02 (k + 1)).

        :param start: seconds from the beginning of the utterance.
        :param end: likewise; by default, or if it is later, the last frame is the end.
        :param layer: the layer, if it is not the one the dump was opened with.

        :returns: *Shape:* (frames, dim).

        :raises KeyError: if there is no such utterance, or it failed.
        :raises ArgumentError: if no frame lies there, or vectors are pooled.
        """
        if layer not in (None, self._layer):
            return self.layer(layer).slice(id, start, end)

        if self._content.layout.pooled:
            raise ArgumentError(
                f"{self._content.name}: is pooled, so an utterance has no frames to "
                "choose from."
            )

        row = self._row(id)
        frames = self._content.frames(row)

        length = frames * SAMPLES_PER_FRAME / SAMPLING_RATE
        last = length if end is None else min(end, length)
        first = stop = 0

        if 0 <= start < last:
            # Whole samples: 0.58 / 0.02 is a little less than 29.
            first = round(start * SAMPLING_RATE) // SAMPLES_PER_FRAME
            stop = -(-round(last * SAMPLING_RATE) // SAMPLES_PER_FRAME)

        if first >= stop:
            raise ArgumentError(
                f"{id}: has no frame between {start} s and "
                f"{length if end is None else end} s; its {frames} frames span "
                f"{length:.2f} s."
            )

        return self._read(row, first, stop)

    def layer(self, layer: int) -> Dump:
        """Return the same dump, with the arrays of another layer.

        :raises ArgumentError: if it has no such layer.
        """
        return Dump(self._content, layer, self._normalize)

    def _read(self, row: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        if self._layer is None:
            raise DumpError(
                f"{self._content.name}: has {_listed(self._content.layout.layers)}; "
                f"choose one with open_dump(..., layer="
                f"{self._content.layout.layers[-1]}) or dump.layer("
                f"{self._content.layout.layers[-1]})."
            )

        array = self._content.read(row, self._layer, start, stop)

        if self._scales:
            mean, std = self._scales[self._layer]
            normalized: NDArray[Any] = (array.astype(np.float32) - mean) / std
            return normalized

        return array

    def _row(self, id: str) -> int:
        row = self._content.row_of.get(id)

        if row is not None:
            return row

        if id in self._content.failures:
            raise KeyError(f"{id}: was not embedded: {self._content.failures[id]}")

        raise KeyError(id)

    # -- as a mapping ----------------------------------------------------------------

    def __contains__(self, id: object) -> bool:
        return id in self._content.row_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._content.ids)

    def __len__(self) -> int:
        return len(self._content.rows)

    def items(self) -> ItemsView[str, NDArray[Any]]:
        """Return (id, array) pairs, read one by one in the order they are stored."""
        return _Items(self)

    def values(self) -> ValuesView[NDArray[Any]]:
        """Return the arrays, read one by one in the order in which they are stored."""
        return _Values(self)

    # A mapping's own would read and compare all arrays.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        chosen = "" if self._layer is None else f", layer={self._layer}"
        return f"<Dump {self._content.name!r}: {len(self)} utterances{chosen}>"

    # -- what is known about it ------------------------------------------------------

    @property
    def ids(self) -> Sequence[str]:
        """The ids of the utterances, in order."""
        return self._content.ids

    @property
    def index(self) -> pa.Table:
        """The index: one row per utterance, failed ones too, in order."""
        return self._content.index

    @property
    def failures(self) -> dict[str, str]:
        """Why an utterance was not embedded, by its id."""
        return dict(self._content.failures)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the content, such as ``layers``, ``dtype`` and ``pool``."""
        return self._content.settings.to_json()

    @property
    def info(self) -> dict[str, Any]:
        """What ``dump.json`` says; if several are read together, the first one's."""
        return dict(self._content.infos[0])

    @property
    def complete(self) -> bool:
        """Whether all of the source is in it, and every job of an array finished."""
        return not self._content.warnings

    def statistics(
        self, layer: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the mean and variance over all frames of the corpus, per dimension.

        *Shape:* (model_dim,) both.

        :param layer: by default that which the dump was opened with.
        :raises DumpError: if the dump is not complete, so that there are none.
        :raises ArgumentError: if it has no such layer.
        """
        chosen = self._layer if layer is None else self.layer(layer)._layer

        if chosen is None:
            raise DumpError(
                f"{self._content.name}: has {_listed(self._content.layout.layers)}; "
                f"choose one: statistics({self._content.layout.layers[-1]})."
            )

        moments = self._content.moments[chosen]

        return moments.mean, moments.variance

    # -- as training data ------------------------------------------------------------

    def torch_dataset(
        self, layer: int | None = None, columns: Sequence[str] = ()
    ) -> Dataset[dict[str, Any]]:
        """Return a map-style dataset for ``torch.utils.data.DataLoader``.

        An item has the ``id``, the ``embedding`` as a tensor of its own, in the dtype
        in which it is stored, or float32 if it is normalised, and ``columns``.

        :param layer: by default that which the dump was opened with.
        :param columns: columns of the index, carried ones or its own.
        :raises ArgumentError: if there is no such layer or column.
        :raises DumpError: if there are several layers and none is chosen.
        """
        dump = self if layer is None else self.layer(layer)

        if dump._layer is None:
            raise DumpError(
                f"{self._content.name}: has {_listed(self._content.layout.layers)}; "
                f"choose one: torch_dataset(layer={self._content.layout.layers[-1]})."
            )

        for name in columns:
            if name not in self.index.column_names:
                raise ArgumentError(
                    f"{self._content.name}: has no column {name!r}; it has "
                    f"{', '.join(self.index.column_names)}."
                )

        return _TorchDataset(dump, tuple(columns))


class _Items(ItemsView[str, NDArray[Any]]):
    _mapping: Dump

    def __iter__(self) -> Iterator[tuple[str, NDArray[Any]]]:
        content = self._mapping._content
        for id, row in zip(content.ids, content.rows, strict=True):
            yield id, self._mapping._read(int(row))


class _Values(ValuesView[NDArray[Any]]):
    _mapping: Dump

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for row in self._mapping._content.rows:
            yield self._mapping._read(int(row))


class _TorchDataset(Dataset[dict[str, Any]]):
    def __init__(self, dump: Dump, columns: tuple[str, ...]) -> None:
        self._dump = dump
        self._columns = columns

    def __len__(self) -> int:
        return len(self._dump)

    def __getitem__(self, item: int) -> dict[str, Any]:
        content = self._dump._content
        row = int(content.rows[item])
        embedding = torch.from_numpy(np.array(self._dump._read(row)))

        # It was widened, as NumPy has no bfloat16; narrowing it again is exact.
        if content.layout.dtype == "bfloat16" and not self._dump._scales:
            embedding = embedding.bfloat16()

        return {
            "id": content.index["id"][row].as_py(),
            "embedding": embedding,
            **{name: content.index[name][row].as_py() for name in self._columns},
        }


# -- opening -------------------------------------------------------------------------


def _missing(
    location: str, stores: Sequence[Store], infos: Sequence[Mapping[str, Any]]
) -> str | None:
    """Say what is missing from the dump at a location, if anything."""
    finished = sum(bool(info.get("complete")) for info in infos)
    resume = "run the same dump command again to go on"

    if str(stores[0]) == str(Store(location)):
        if finished:
            return None
        return f"{location}: this dump is not complete; {resume}."

    jobs = [_JOB.fullmatch(str(store).rpartition("/")[2]) for store in stores]
    totals = {int(job[2]) for job in jobs if job}

    if len(totals) > 1:
        raise DumpError(
            f"{location}: holds jobs of several arrays, of {_numbered(totals)} jobs; "
            "open those of one, as a list."
        )

    (total,) = totals

    if finished == total:
        return None

    return (
        f"{location}: this dump is not complete: of {total} jobs {len(stores)} have "
        f"begun and {finished} are finished; {resume}."
    )


def _common_settings(
    stores: Sequence[Store], infos: Sequence[Mapping[str, Any]]
) -> Settings:
    """
    :raises DumpError: if the settings are not the same, but for a job's share.
    """
    all_settings = [
        Settings.from_json({**info["settings"], "share": None}) for info in infos
    ]
    first = all_settings[0].to_json()

    for store, settings in zip(stores, all_settings, strict=True):
        other = settings.to_json()
        for key in first:
            if first[key] != other[key]:
                raise DumpError(
                    f"{store}: cannot be read together with {stores[0]}: its {key} is "
                    f"{other[key]} there and {first[key]} here. Open them one by one."
                )

    return all_settings[0]


def _index_of(store: Store) -> pa.Table:
    """Read the index of one dump."""
    parts = index.read_parts(store)

    # Each is small; on a network file system most of the time is a wait.
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda part: part.table(), parts))

    if not tables:
        info = require_info(store)
        settings = Settings.from_json(info["settings"])
        columns = [pa.field(*pair) for pair in settings.column_types.items()]
        tables = [pa.schema([*index._FIELDS, *columns]).empty_table()]

    # Of the metadata, which files there are, each part has its own.
    return pa.concat_tables(table.replace_schema_metadata(None) for table in tables)


def _numbers(column: Any) -> NDArray[np.int64]:
    """Return integers that may be null, null as -1."""
    return np.asarray(
        pc.fill_null(column, pa.scalar(-1, column.type)).to_numpy(), np.int64
    )


def _listed(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) > 1)} {_numbered(layers)}"


def _numbered(numbers: Any) -> str:
    *most, last = sorted(numbers)
    return f"{', '.join(map(str, most))} and {last}" if most else str(last)
