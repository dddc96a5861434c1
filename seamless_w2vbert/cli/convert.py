"""``seamless-w2vbert convert``: a checkpoint -> the same in another format.

Comes in: a checkpoint's path. Goes out: a Transformers folder or a fairseq2 file, and
on stdout an account of what was carried, left out and made up, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seamless_w2vbert.cli import options
from seamless_w2vbert.cli.options import DType

if TYPE_CHECKING:
    from seamless_w2vbert.checkpoints.convert import Conversion


class To(str, Enum):
    transformers = "transformers"
    fairseq2 = "fairseq2"


def convert(
    src: Annotated[
        Path,
        typer.Argument(
            help="A fairseq, fairseq2 or safetensors file, or a Transformers folder; "
            "of a UnitY or SeamlessM4T v2 model the speech encoder is taken."
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(
            help="The folder (transformers) or .pt file (fairseq2) to make."
        ),
    ],
    to: Annotated[To, typer.Option(help="The format to write.")],
    dtype: Annotated[
        DType | None, typer.Option(help="Of the tensors; as they are if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DST.")] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="How large a safetensors file may get.")
    ] = "5GB",
) -> None:
    """Convert a checkpoint between the formats of fairseq, fairseq2 and Transformers.

    Every tensor that both formats have stays the same to the bit; every other one is
    named. Memory does not grow with the model, and DST appears whole or not at all.
    """
    max_shard_bytes = options.parse_size("--max-shard-size", max_shard_size)

    import torch

    from seamless_w2vbert.checkpoints.convert import convert_checkpoint

    conversion = convert_checkpoint(
        src,
        dst,
        to.value,
        dtype=getattr(torch, dtype.value) if dtype else None,
        force=force,
        max_shard_bytes=max_shard_bytes,
    )
    print("\n".join(_report(conversion)))


def _report(conversion: Conversion) -> list[str]:
    source = f"{conversion.source}, speech encoder only"
    lines = [
        f"{conversion.src} ({source if conversion.extracted else conversion.source})",
        f"-> {conversion.dst} ({conversion.target})",
        f"{conversion.num_tensors} tensors carried, "
        f"{conversion.num_bytes / 1e6:.1f} MB written",
    ]

    if conversion.dropped:
        count = len(conversion.dropped)
        lines.append(f"{count} tensors dropped, {conversion.target} has no place:")
        lines += [f"  {line}" for line in grouped(conversion.dropped)]

    if conversion.initialised:
        count = len(conversion.initialised)
        lines.append(f"{count} tensors initialised, untrained:")
        lines += [f"  {line}" for line in grouped(conversion.initialised)]

    if conversion.copied:
        lines.append(f"files copied: {', '.join(conversion.copied)}")

    if conversion.left:
        lines.append(f"files left behind: {', '.join(conversion.left)}")

    return lines


def grouped(names: Iterable[str]) -> list[str]:
    """Write many tensor names in few lines and leave none out: layers as ``{0-23}``,
    the parameters of a module as ``{bias,weight}``."""
    modules: dict[str, list[str]] = {}

    for name in names:
        module, dot, parameter = name.rpartition(".")
        modules.setdefault(module + dot, []).append(parameter)

    # Modules that differ in their first number alone, and have the same parameters.
    layers: dict[tuple[str, str, str], list[int]] = {}

    for module, parameters in modules.items():
        parameter = _braced(sorted(parameters))
        match = re.match(r"([^\d]*\.)(\d+)(\..*)$", module)
        if match is None:
            layers[module, "", parameter] = []
        else:
            key = (match[1], match[3], parameter)
            layers.setdefault(key, []).append(int(match[2]))

    return [
        head + (_braced(_ranges(numbers)) if numbers else "") + tail + parameter
        for (head, tail, parameter), numbers in layers.items()
    ]


def _braced(items: list[str]) -> str:
    one = len(items) == 1 and not re.fullmatch(r"\d+-\d+", items[0])
    return items[0] if one else "{" + ",".join(items) + "}"


def _ranges(numbers: list[int]) -> list[str]:
    ranges: list[list[int]] = []

    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])

    return [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
