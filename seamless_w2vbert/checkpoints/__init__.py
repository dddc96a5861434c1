"""Checkpoints in the formats of fairseq, fairseq2 and Transformers.

Comes in: a path. Goes out: a :class:`Checkpoint`, its tensors under fairseq2's names
and the architecture that they add up to.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from seamless_w2vbert.architecture import Architecture
from seamless_w2vbert.checkpoints import files, names, shapes
from seamless_w2vbert.errors import CheckpointError

__all__ = ["Checkpoint", "read_checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened but not yet loaded into modules."""

    path: Path
    """The file or folder."""

    format: names.Format
    """Whose names it uses."""

    architecture: Architecture
    """The sizes that its shapes, or its config, add up to."""

    tensors: dict[str, Tensor]
    """The model's tensors under fairseq2's names, memory-mapped."""

    other: dict[str, Tensor]
    """Tensors that are no part of the encoder or its pretraining heads, under their
    own names: Transformers' adapters and task heads."""

    config: dict[str, Any] | None
    """Transformers' ``config.json``, if there is one."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint of any of the three formats.

    :param path: a ``.pt`` or ``.safetensors`` file, or a Transformers folder.
    :raises CheckpointError: if it is not a W2v-BERT 2.0 checkpoint.
    """
    raw = files.read_tensors(path)
    config = files.read_config(path)
    format_ = names.format_of(raw)

    if format_ is None:
        raise CheckpointError(
            f"{path}: is not a W2v-BERT 2.0 checkpoint: none of its {len(raw)} tensors "
            "has a name of fairseq's, fairseq2's or Transformers'."
        )

    if format_ == "transformers" and config is None:
        raise CheckpointError(
            f"{path}: has Transformers' names but no config.json beside it; pass the "
            "folder that `save_pretrained` wrote."
        )

    renamed = names.to_fairseq2_names(raw)
    tensors, other = shapes.split(renamed, format_)
    architecture = shapes.architecture_of(tensors, config, path)

    return Checkpoint(path, format_, architecture, tensors, other, config)
