"""Hugging Face datasets: folders of ``save_to_disk``, and names to stream from.

Comes in: a folder, or ``NAME[:CONFIG[:SPLIT]]``. Goes out: their rows. The audio stays
encoded, so that none of the decoders that `datasets` would use has to be installed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from seamless_w2vbert.dumping.sources.base import (
    Wanted,
    basename,
    exists,
    resolve,
)
from seamless_w2vbert.dumping.sources.tables import Rows, Table, check_audio_type
from seamless_w2vbert.errors import ArgumentError, DumpError, SeamlessW2vBertError

PREFIX = "datasets:"


def is_saved(folder: str) -> bool:
    """Tell whether `datasets` wrote a folder with ``save_to_disk``."""
    return exists(resolve(folder, "dataset_dict.json")) or (
        exists(resolve(folder, "state.json"))
        and exists(resolve(folder, "dataset_info.json"))
    )


def open_saved(folder: str, wanted: Wanted, split: str | None = None) -> Table:
    """Open a folder that ``save_to_disk`` wrote; it is memory-mapped.

    :raises ArgumentError: if a split has to be chosen, or a column is missing.
    :raises DumpError: if it cannot be read.
    """
    datasets = _datasets(folder)
    opened = _load(folder, lambda: datasets.load_from_disk(folder))

    if isinstance(opened, dict):
        how = f"pass a folder of one, such as {resolve(folder, '{}')}"
        opened = opened[_choose(folder, list(opened), split, how)]

    return _table(opened, folder, basename(os.path.abspath(folder)), wanted)


def open_named(spec: str, wanted: Wanted) -> Table:
    """Open ``datasets:NAME[:CONFIG[:SPLIT]]`` as a stream, from the Hub or a folder.

    :raises ArgumentError: if there is no such configuration or split, one has to be
        chosen, or a column is missing.
    :raises DumpError: if it cannot be reached.
    """
    parts = spec.removeprefix(PREFIX).split(":")
    name, config, split = (*parts, "", "")[:3]

    if not name or len(parts) > 3:
        raise ArgumentError(
            f"{spec}: expected datasets:NAME, datasets:NAME:CONFIG or "
            "datasets:NAME:CONFIG:SPLIT."
        )

    if is_saved(name):
        return open_saved(name, wanted, split or config or None)

    datasets = _datasets(spec)
    opened = _load(
        spec,
        lambda: datasets.load_dataset(
            name, config or None, split=split or None, streaming=True
        ),
    )

    if isinstance(opened, dict):
        how = f"name one, such as {PREFIX}{name}:{config}:{{}}"
        opened = opened[_choose(spec, list(opened), None, how)]

    if opened.features is None:  # only the data tells
        opened = _load(spec, opened._resolve_features)

    label = ":".join(filter(None, (name, config, split)))

    return _table(opened, spec, label, wanted, streaming=True)


def _datasets(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ArgumentError(
            f"{spec}: is a Hugging Face dataset, which takes the package datasets; "
            "install it with `pip install 'seamless_w2vbert[datasets]'`."
        ) from None

    return datasets


def _load(spec: str, load: Any) -> Any:
    try:
        return load()
    except OSError as ex:
        raise DumpError(f"{spec}: cannot be loaded: {_first_line(ex)}.") from ex
    # `datasets` says all else, such as an unknown split, in exceptions of many kinds.
    except Exception as ex:
        raise ArgumentError(f"{spec}: cannot be loaded: {_first_line(ex)}.") from ex


def _first_line(ex: Exception) -> str:
    return (str(ex) or type(ex).__name__).splitlines()[0].rstrip(".")


def _choose(spec: str, splits: Sequence[str], split: str | None, how: str) -> str:
    if split is None and len(splits) == 1:
        return splits[0]

    if split is not None and split in splits:
        return split

    problem = f"has no split {split!r}" if split else "has more than one split"
    raise ArgumentError(
        f"{spec}: {problem}; {how.format(splits[0])}. There are {', '.join(splits)}."
    )


def _table(
    dataset: Any, name: str, label: str, wanted: Wanted, *, streaming: bool = False
) -> Table:
    names = list(dataset.features)
    wanted.check(name, names)

    used = {wanted.audio, wanted.id, "start", "end", *wanted.columns}
    dataset = dataset.select_columns([column for column in names if column in used])

    if type(dataset.features[wanted.audio]).__name__ == "Audio":
        dataset = dataset.cast_column(wanted.audio, _undecoded())

    schema = dataset.features.arrow_schema
    check_audio_type(name, wanted, schema.field(wanted.audio).type)

    def rows() -> Rows:
        number = 0
        try:
            for row in dataset:
                yield number, row
                number += 1
        except SeamlessW2vBertError:
            raise
        # From the network, the disk, or the code that makes the rows.
        except Exception as ex:
            raise DumpError(
                f"{name}: row {number} cannot be read: {_first_line(ex)}."
            ) from ex

    return Table(
        name,
        wanted,
        rows,
        names=names,
        types={field.name: field.type for field in schema},
        label=label,
        unit="row",
        streaming=streaming,
    )


def _undecoded() -> Any:
    """Return a type of column that gives what is stored."""
    import datasets

    class Undecoded(datasets.Audio):  # type: ignore[misc,no-any-unimported]
        # `datasets` asks for torchcodec even where it only hands audio on, as out of
        # a folder of files.
        def encode_example(self, value: Any) -> Any:
            if isinstance(value, (str, os.PathLike)):
                return {"bytes": None, "path": os.fspath(value)}
            if isinstance(value, bytes):
                return {"bytes": value, "path": None}
            return {"bytes": value.get("bytes"), "path": value.get("path")}

    return Undecoded(decode=False)
