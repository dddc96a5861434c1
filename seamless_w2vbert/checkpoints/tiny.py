"""The weights of ``tiny-random``: drawn from a fixed seed, the same everywhere.

Comes in: the names and shapes of a small encoder. Goes out: its tensors. NumPy's legacy
generator draws them, since its stream is frozen for good; torch's is not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

_SEED = 20231208  # the day W2v-BERT 2.0 came out with Seamless


def draw(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Draw float32 tensors of ``shapes``, in the order of their names.

    Projections keep the scale of their input (variance 1 / fan-in); norms are near the
    identity; biases and relative positions are large enough that a mistake in any of
    them shows.
    """
    random = np.random.RandomState(_SEED)
    tensors = {}

    for name in sorted(shapes):
        shape = tuple(shapes[name])
        values = random.standard_normal(shape)

        if "norm" in name and name.endswith("weight"):
            values = 1 + 0.1 * values
        elif name.endswith("bias"):
            values = 0.1 * values
        elif "rel_k_embed" not in name:
            values = values / np.sqrt(np.prod(shape[1:]))

        tensors[name] = torch.from_numpy(values.astype(np.float32))

    return tensors
