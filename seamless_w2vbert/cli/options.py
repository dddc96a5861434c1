"""The options that several commands share, and how their text is read.

Comes in: text of the command line. Goes out: values, or an error that names the option.
"""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from seamless_w2vbert.errors import ArgumentError

if TYPE_CHECKING:
    import torch


class DType(str, Enum):
    """The dtypes that a model runs in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Model = Annotated[
    str,
    typer.Option(
        help="conformer_shaw (the published model), tiny-random (untrained, "
        "offline), a checkpoint file, or a Transformers folder."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Of the model.")]

DEFAULT_MODEL = "tiny-random"


def read_paths(audio: list[str]) -> list[str]:
    """Return the paths that are named, with those on stdin in the place of ``-``.

    :raises ArgumentError: if there is none.
    """
    paths: list[str] = []

    for path in audio:
        if path == "-":
            paths += [line.rstrip("\n") for line in sys.stdin if line.strip()]
        else:
            paths.append(path)

    if not paths:
        raise ArgumentError("There is no audio file to work on.")

    return paths


def parse_device(text: str) -> torch.device:
    """Return the device that is named.

    :raises ArgumentError: if torch does not know it or has none here.
    """
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        raise ArgumentError(
            f"--device {text!r} is no device; try cpu or cuda."
        ) from None

    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(
            f"--device {text}: torch sees no CUDA device; `seamless-w2vbert doctor` "
            "says more."
        )

    return device
