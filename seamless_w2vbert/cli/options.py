"""The options that several commands share, and how their text is read.

Comes in: text of the command line. Goes out: values, or an error that names the option.
"""

from __future__ import annotations

import re
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


class ModelDType(str, Enum):
    """As :class:`DType`, or whichever is fastest here and keeps the embeddings."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    auto = "auto"


Model = Annotated[
    str,
    typer.Option(
        help="conformer_shaw (the published model), tiny-random (untrained, "
        "offline), a checkpoint file, or a Transformers folder."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Of the model.")]

LayersOption = Annotated[
    str,
    typer.Option(
        "--layers",
        help="Layers, as 17,24 or -1. 17 is the output of block 17, Transformers' "
        "hidden_states[17]; 0 the frontend's output.",
    ),
]

DEFAULT_MODEL = "tiny-random"


def printable(text: str) -> str:
    """Return ``text`` on one line and in valid Unicode: control characters, and bytes
    of file names that are no UTF-8, as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def read_paths(audio: list[str]) -> list[str]:
    """Return the paths that are named, with those on stdin in the place of ``-``.

    :raises ArgumentError: if there is none.
    """
    paths: list[str] = []

    for path in audio:
        if path == "-":
            # A process can be started without one.
            lines = sys.stdin or ()
            paths += [line.rstrip("\r\n") for line in lines if line.strip()]
        else:
            paths.append(path)

    if not paths:
        raise ArgumentError("There is no audio file to work on.")

    return paths


def parse_layers(text: str) -> tuple[int, ...]:
    """Return the layer numbers in a list such as ``17,24``.

    :raises ArgumentError: if it is none.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(
            f"--layers {text!r} is not a list of numbers such as 17,24."
        ) from None


def parse_device(text: str) -> torch.device:
    """Return the device that is named.

    :raises ArgumentError: if torch does not know it or has none here.
    """
    from seamless_w2vbert.model import check_device

    return check_device(text)


def parse_size(option: str, text: str) -> int:
    """Return the bytes that a size such as ``5GB`` names.

    :raises ArgumentError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())

    if match is None:
        raise ArgumentError(f"{option} {text!r} is no size such as 5GB.")

    return int(
        float(match[1])
        * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2]]
    )
