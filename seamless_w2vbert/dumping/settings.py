"""What decides the content of a dump, and ``dump.json``, which holds it.

Comes in: the arguments of a dump and its pipeline. Goes out: :class:`Settings`, equal
for two runs exactly if their embeddings may stand in one folder, and the provenance.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.nn import Module

import seamless_w2vbert
from seamless_w2vbert import encoder, stack
from seamless_w2vbert.constants import (
    FBANK_SHIFT,
    FBANK_WINDOW,
    NUM_MEL_BINS,
    SAMPLING_RATE,
    WAVEFORM_SCALE,
)
from seamless_w2vbert.dumping.formats import Layout
from seamless_w2vbert.dumping.store import Store
from seamless_w2vbert.errors import ArgumentError, DumpError
from seamless_w2vbert.pipeline import STAGES, SpeechEncoderPipeline

FILE = "dump.json"

VERSION = 1
"""Of the layout of a dump."""

POOLS = ("mean", "max", "mean+std")
"""How the frames of an utterance become one vector."""

DTYPES = ("float32", "float16", "bfloat16")
"""What embeddings are stored in."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a dump contains, but the audio."""

    format: str
    layers: tuple[int, ...]
    dtype: str
    """Of the stored embeddings."""

    pool: str | None
    dim: int
    """The width of a stored vector."""

    chunk: float | None
    """In seconds, as the overlap."""

    overlap: float
    normalize: str | None
    """SHA-256 of the statistics that the embeddings were normalised with."""

    model: str
    """SHA-256 of the encoder's tensors."""

    compute_dtype: str
    columns: Mapping[str, str]
    """The Arrow types of the carried columns."""

    stages: tuple[str, ...] = ()
    """The stages of the pipeline that are not its own."""

    share: Mapping[str, Any] | None = None
    """The job of an array that this is: ``index``, ``num``, ``from``, ``to``."""

    @property
    def column_types(self) -> dict[str, pa.DataType]:
        """The types of the carried columns."""
        return {name: _arrow_type(name, kind) for name, kind in self.columns.items()}

    @property
    def layout(self) -> Layout:
        """What the arrays look like."""
        return Layout(
            layers=self.layers,
            dim=self.dim,
            dtype=self.dtype,
            pooled=self.pool is not None,
            columns=self.column_types,
        )

    @property
    def bytes_per_vector(self) -> int:
        """What one vector of every layer takes."""
        itemsize = {"float32": 4, "float16": 2, "bfloat16": 2}[self.dtype]
        return len(self.layers) * self.dim * itemsize

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON has them."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Read what :meth:`to_json` wrote."""
        settings = cls(**data)
        return replace(
            settings, layers=tuple(settings.layers), stages=tuple(settings.stages)
        )

    def check_equal(self, there: Settings, where: str) -> None:
        """
        :param there: those of a dump that is there.
        :raises DumpError: if they differ; the message says in what.
        """
        ours, theirs = self.to_json(), there.to_json()
        different = [key for key in ours if ours[key] != theirs[key]]

        if different:
            details = "; ".join(
                f"{key}: {_short(theirs[key])} there, {_short(ours[key])} now"
                for key in different
            )
            raise DumpError(
                f"{where}: holds a dump of other settings ({details}). Dump into "
                "another folder, or with the settings it was begun with."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _arrow_type(name: str, kind: str) -> pa.DataType:
    try:
        return pa.type_for_alias(kind)
    except ValueError:
        raise ArgumentError(
            f"Column {name!r} is of type {kind}; only plain values such as strings "
            "and numbers can be carried into the index."
        ) from None


def column_names(types: Mapping[str, pa.DataType]) -> dict[str, str]:
    """Return the names of Arrow types.

    :raises ArgumentError: if one is no plain value.
    """
    names = {}

    for column, kind in types.items():
        names[column] = str(kind)
        _arrow_type(column, names[column])

    return names


# -- provenance ----------------------------------------------------------------------


def model_digest(module: Module) -> str:
    """Return the SHA-256 of an encoder's tensors, by name, dtype, shape and content.

    The same for a checkpoint in any of its formats, and on any device.
    """
    digest = hashlib.sha256()

    for part in (encoder.frontend_of(module), encoder.encoder_of(module)):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(flat.view(torch.uint8).numpy()))

    return digest.hexdigest()


def replaced_stages(pipeline: SpeechEncoderPipeline) -> tuple[str, ...]:
    """Return which stages of a pipeline were replaced or added to, and by what."""
    names = []

    for stage in STAGES:
        function = getattr(pipeline, stage)
        kind = type(function)
        module = getattr(function, "__module__", kind.__module__)
        name = getattr(function, "__qualname__", kind.__qualname__)
        own = module.startswith("seamless_w2vbert.") and "<locals>" not in name
        if not own:
            names.append(f"{stage}: {module}.{name}")

    return tuple(names)


def attention_of(module: Module) -> str:
    """Return the name of the class that computes the encoder's attention."""
    found = [
        type(part)
        for name, part in encoder.encoder_of(module).named_modules()
        if name.endswith(".sdpa")
    ]

    return f"{found[0].__module__}.{found[0].__qualname__}" if found else "unknown"


def provenance(pipeline: SpeechEncoderPipeline) -> dict[str, Any]:
    """Return what embeddings come from, beside their settings."""
    return {
        "package": f"seamless_w2vbert {seamless_w2vbert.__version__}",
        "fairseq2": version("fairseq2"),
        "stack": stack.fairseq2_generation(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(pipeline.device),
        "attention": attention_of(pipeline.module),
        "fbank": {
            "sampling_rate": SAMPLING_RATE,
            "num_mel_bins": NUM_MEL_BINS,
            "window": FBANK_WINDOW,
            "shift": FBANK_SHIFT,
            "waveform_scale": WAVEFORM_SCALE,
            "standardize": True,
        },
    }


def now() -> str:
    """Return the time as dump.json has it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


# -- the file ------------------------------------------------------------------------


def read_info(store: Store) -> dict[str, Any] | None:
    """Return what ``dump.json`` says; None if there is none.

    :raises DumpError: if it is damaged, or of a version to come.
    """
    damaged = f"{store}/{FILE}: is damaged; dump into another folder"

    try:
        info = json.loads(store.read(FILE))
    except FileNotFoundError:
        return None
    except ValueError as ex:
        raise DumpError(f"{damaged} ({ex}).") from None

    if not isinstance(info, dict) or not isinstance(info.get("version"), int):
        raise DumpError(f"{damaged} (it has no version).")

    if info["version"] != VERSION:
        raise DumpError(
            f"{store}/{FILE}: is of version {info['version']}; this package reads "
            f"{VERSION}. Install a newer one."
        )

    info = {"complete": False, "runs": [], **info}

    try:
        Settings.from_json(info["settings"])
    except (KeyError, TypeError) as ex:
        raise DumpError(f"{damaged} ({ex}).") from None

    return info


def require_info(store: Store) -> dict[str, Any]:
    """Return what ``dump.json`` says.

    :raises DumpError: if there is none, or as :func:`read_info`.
    """
    info = read_info(store)

    if info is None:
        raise DumpError(f"{store}: there is no dump.")

    return info


def write_info(store: Store, info: Mapping[str, Any]) -> None:
    """Write ``dump.json``."""
    store.write(FILE, (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())
