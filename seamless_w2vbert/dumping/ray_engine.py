"""Shards -> the same files, embedded by the actors of Ray Data.

Comes in: shards, cut by the driver. Goes out: committed parts. An actor is a process
with a model of its own, on one GPU or a group of cores, and commits what it embeds; a
worker that dies is started again, and its shard is embedded anew.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable, Iterator
from itertools import islice
from threading import Event
from typing import Any

import torch

from seamless_w2vbert.dumping import index
from seamless_w2vbert.dumping.embedding import ShardEmbedder, StorageWatch, commit
from seamless_w2vbert.dumping.index import Part
from seamless_w2vbert.dumping.planning import Shard
from seamless_w2vbert.dumping.run import load_pipeline
from seamless_w2vbert.dumping.settings import Settings, model_digest
from seamless_w2vbert.dumping.statistics import Normalizer
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import ArgumentError, DumpError, SeamlessW2vBertError

_WAVE = 4096
"""The shards that are handed to Ray at a time: what it keeps of them is bounded."""


class ShardActor:
    """Embeds and commits shards, in a process of its own."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        normalizer: Normalizer | None,
        *,
        model: str,
        device: str,
        compute_dtype: torch.dtype,
        strict: bool,
        max_frames: int | None,
        root: str | None,
        attempt: int,
        num_threads: int | None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)

        pipeline = load_pipeline(model, device, compute_dtype)
        if model_digest(pipeline.module) != settings.model:
            raise DumpError(f"{model}: is another model on this worker.")

        self._store = store
        self._settings = settings
        self._attempt = attempt
        self._watch = StorageWatch(root)
        self._embedder = ShardEmbedder(
            pipeline, settings, normalizer, strict=strict, max_frames=max_frames
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        names, errors = [], []

        for data in batch["shard"]:
            name, error = "", ""
            shard: Shard = pickle.loads(data)
            try:
                for embedded, outcomes, moments in self._embedder.embed([shard]):
                    self._watch.check(embedded, outcomes)
                    name = commit(
                        self._store,
                        self._settings,
                        embedded,
                        outcomes,
                        moments,
                        self._attempt,
                    ).name
            except SeamlessW2vBertError as ex:  # Ray would try again, to no avail
                error = str(ex)
            names.append(name)
            errors.append(error)

        return {"name": names, "error": errors}


def embed(
    shards: Iterable[Shard],
    store: Store,
    settings: Settings,
    normalizer: Normalizer | None,
    *,
    workers: int | None,
    device: str,
    stop: Event,
    **options: Any,
) -> Iterator[Part]:
    """Embed shards on ``workers`` actors.

    :param workers: as many as there is room for, if None.
    :param device: ``cpu``, or ``cuda`` for a GPU to each actor.
    :param stop: when set, what is committed is all that is embedded.
    :raises DumpError: if a shard cannot be embedded or written.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ArgumentError(
            "The engine `ray` needs Ray, which is not installed: "
            "`pip install '.[ray]'`."
        ) from None

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    ray.data.DataContext.get_current().enable_progress_bars = False

    on_gpu = device.startswith("cuda")
    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    there = int(resources.get("GPU" if on_gpu else "CPU", 0))
    if not there:
        raise ArgumentError(f"Ray has no {'GPU' if on_gpu else 'CPU'} here.")

    # A model uses several cores well, and many processes of one core each do not.
    num_actors = workers or (there if on_gpu else max(1, there // 4))
    cores = max(1, there // num_actors)
    room: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": cores}
    constructor = {
        "device": "cuda" if on_gpu else device,
        "num_threads": None if on_gpu else cores,
        **options,
    }
    remaining = iter(shards)

    while wave := [
        # As bytes: Ray looks into what it can, to make columns of it.
        {"shard": pickle.dumps(shard)}
        for shard in islice(remaining, _WAVE)
    ]:
        rows = (
            ray.data.from_items(wave, override_num_blocks=len(wave))
            .map_batches(
                ShardActor,
                fn_constructor_args=(store, settings, normalizer),
                fn_constructor_kwargs=constructor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=num_actors),
                **room,
            )
            .iter_rows()
        )
        for row in rows:
            if row["error"]:
                raise DumpError(row["error"])
            yield index.read_part(store, row["name"])
            if stop.is_set():
                return
