"""Hidden states -> their mean and variance per dimension, over the corpus.

Comes in: one utterance after the other. Goes out: :class:`Moments`, which can be
merged, so that every shard keeps its own and a resumed dump has those of all.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seamless_w2vbert.errors import ArgumentError

FILE = "statistics.npz"
"""The file of a dump that holds ``frames`` and, for each layer, ``mean_<layer>`` and
``var_<layer>`` of shape (model_dim,), float64."""

NORMALIZER = "normalized_with.npz"
"""The file of a dump that was normalised with other statistics: those."""


@dataclass(frozen=True)
class Moments:
    """The first two moments of vectors, merged as Chan, Golub and LeVeque (1979) do."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    """The sum of the squared deviations from the mean. *Shape:* (dim,)."""

    @classmethod
    def of(cls, hidden: Tensor) -> Moments:
        """Return those of (frames, dim), computed in float64."""
        values = hidden.double()
        mean = values.mean(dim=0)
        squares = (values - mean).square_().sum(dim=0)
        return cls(len(values), mean.numpy(), squares.numpy())

    def merge(self, other: Moments) -> Moments:
        """Return those of both together."""
        count = self.count + other.count
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * (other.count / count),
            self.squares
            + other.squares
            + shift**2 * (self.count * other.count / count),
        )

    @property
    def variance(self) -> NDArray[np.float64]:
        """The mean squared deviation: of the corpus itself, not an estimate."""
        return self.squares / self.count

    def to_json(self) -> dict[str, Any]:
        """Return them in a form that keeps every bit."""
        return {
            "count": self.count,
            "mean": base64.b64encode(self.mean.astype("<f8").tobytes()).decode(),
            "squares": base64.b64encode(self.squares.astype("<f8").tobytes()).decode(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Moments:
        """Read what :meth:`to_json` wrote."""
        mean, squares = (
            np.frombuffer(base64.b64decode(data[key]), "<f8").astype(np.float64)
            for key in ("mean", "squares")
        )
        return cls(data["count"], mean, squares)


def merge_into(total: dict[int, Moments], more: Mapping[int, Moments]) -> None:
    """Add the moments of each layer to those of ``total``."""
    for layer, moments in more.items():
        total[layer] = total[layer].merge(moments) if layer in total else moments


def to_npz(moments: Mapping[int, Moments]) -> bytes:
    """Return the content of ``statistics.npz``."""
    arrays: dict[str, Any] = {
        "frames": np.int64(next((m.count for m in moments.values()), 0))
    }

    for layer, of_layer in sorted(moments.items()):
        arrays[f"mean_{layer}"] = of_layer.mean
        arrays[f"var_{layer}"] = of_layer.variance

    file = io.BytesIO()
    np.savez(file, **arrays)

    return file.getvalue()


def to_pt(moments: Moments) -> bytes:
    """Return the content of a ``.pt`` file with ``mean`` and ``var`` of one layer, the
    form that MaskGCT and its kin load (``wav2vec2bert_stats.pt``), float32."""
    file = io.BytesIO()
    torch.save(
        {
            "mean": torch.from_numpy(moments.mean).float(),
            "var": torch.from_numpy(moments.variance).float(),
        },
        file,
    )

    return file.getvalue()


@dataclass(frozen=True)
class Normalizer:
    """(x - mean) / sqrt(var), per dimension and layer."""

    mean: Mapping[int, Tensor]
    std: Mapping[int, Tensor]
    arrays: Mapping[str, NDArray[np.float64]]
    """``mean_<layer>`` and ``var_<layer>``, as they were read."""

    digest: str
    """SHA-256 of the values."""

    def to_npz(self) -> bytes:
        """Return the content of a file that :func:`load_normalizer` reads."""
        file = io.BytesIO()
        np.savez(file, **self.arrays)  # type: ignore[arg-type]
        return file.getvalue()

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """Normalise (frames, dim); float32."""
        return (hidden.float() - self.mean[layer]) / self.std[layer]


def load_normalizer(path: str, layers: tuple[int, ...], dim: int) -> Normalizer:
    """Load the statistics that embeddings are to be normalised with.

    :param path: a dump or its ``statistics.npz``; or a ``.npz`` or ``.pt`` file with
        ``mean`` and ``var``, for one layer.
    :raises ArgumentError: if it does not hold those of each layer.
    """
    file = Path(path)
    if file.is_dir():
        file = file / FILE

    try:
        if file.suffix == ".pt":
            found = torch.load(file, map_location="cpu", weights_only=True)
            arrays = {key: np.asarray(value) for key, value in found.items()}
        else:
            with np.load(file, allow_pickle=False) as opened:
                arrays = dict(opened)
    except Exception as ex:  # whatever a file that is something else makes of it
        reason = str(ex).strip().splitlines() or [type(ex).__name__]
        raise ArgumentError(
            f"{file}: cannot be read as statistics ({reason[0]}); expected the "
            f"{FILE} of a dump that is complete, or a .pt file with mean and var."
        ) from None

    mean, std, used, digest = {}, {}, {}, hashlib.sha256()

    for layer in layers:
        pair = []
        for key in ("mean", "var"):
            name = f"{key}_{layer}" if f"{key}_{layer}" in arrays else key
            if name not in arrays or (name == key and len(layers) > 1):
                raise ArgumentError(
                    f"{file}: has no {key}_{layer}; it has {', '.join(arrays)}."
                )
            values = np.asarray(arrays[name], np.float64).reshape(-1)
            if len(values) != dim or not np.isfinite(values).all():
                raise ArgumentError(
                    f"{file}: {name} has {len(values)} dimensions; expected {dim} "
                    "finite ones."
                )
            digest.update(values.tobytes())
            used[f"{key}_{layer}"] = values
            pair.append(torch.from_numpy(values))

        if not bool((pair[1] > 0).all()):
            raise ArgumentError(f"{file}: a variance of layer {layer} is not positive.")
        mean[layer], std[layer] = pair[0].float(), pair[1].sqrt().float()

    return Normalizer(mean, std, used, digest.hexdigest())
