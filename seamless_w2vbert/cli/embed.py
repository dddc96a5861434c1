"""``seamless-w2vbert embed``: audio files -> a table, and their embeddings in a file.

Comes in: paths. Goes out: one row per file on stdout, one array per file and layer in
``.npz``, ``.npy`` or ``.safetensors``.
"""

from __future__ import annotations

import sys
import zipfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seamless_w2vbert.cli import options
from seamless_w2vbert.cli.tables import make_console
from seamless_w2vbert.errors import ArgumentError, SeamlessW2vBertError

if TYPE_CHECKING:
    from torch import Tensor


class Pool(str, Enum):
    mean = "mean"


def embed(
    audio: Annotated[
        list[str], typer.Argument(help="Audio files; - reads paths from stdin.")
    ],
    model: options.Model = options.DEFAULT_MODEL,
    layers: options.LayersOption = "-1",
    device: options.Device = "cpu",
    dtype: Annotated[
        options.ModelDType,
        typer.Option(
            help="Of the model; auto is the fastest here that keeps a mean cosine "
            "over 0.999 with float32."
        ),
    ] = options.ModelDType.float32,
    pool: Annotated[
        Pool | None, typer.Option(help="One vector per file, over its frames.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Write the arrays to FILE.npz, FILE.npy or FILE.safetensors."
        ),
    ] = None,
) -> None:
    """Embed audio files: print a table, and write the arrays if asked to.

    Bad files are named on stderr and the rest embedded; the exit code is then 1.
    """
    numbers = options.parse_layers(layers)
    paths = options.read_paths(audio)
    _check_output(output, len(paths), len(numbers))

    import torch

    from seamless_w2vbert.pipeline import SpeechEncoderPipeline

    pipeline = SpeechEncoderPipeline.from_pretrained(
        model,
        device=options.parse_device(device),
        dtype="auto" if dtype.value == "auto" else getattr(torch, dtype.value),
    )

    if dtype.value == "auto":
        taken = str(pipeline.dtype).removeprefix("torch.")
        print(f"seamless-w2vbert: computing in {taken}", file=sys.stderr)

    arrays: dict[str, Tensor] = {}
    rows: list[tuple[str, ...]] = []
    failed = 0

    for item in pipeline.stream(paths, layers=numbers, on_error="return"):
        if item.error is not None:
            failed += 1
            message = options.printable(str(item.error))
            print(f"seamless-w2vbert: {message}", file=sys.stderr)
            continue

        for number, hidden in item.hidden_states.items():
            vectors = hidden.float().mean(dim=0) if pool else hidden
            name = options.printable(item.id)
            key = f"{name}#{number}" if len(numbers) > 1 else name
            arrays[key] = vectors
            rows.append(_row(name, item.samples, number, hidden, vectors))

    # First what took long to compute: printing may fail, where nobody reads.
    if output is not None and arrays:
        _write(output, arrays)

    if rows:
        _print_table(rows, model)

    if failed:
        print(
            f"seamless-w2vbert: {failed} of {len(paths)} files failed", file=sys.stderr
        )
        raise typer.Exit(1)


def _check_output(output: Path | None, num_files: int, num_layers: int) -> None:
    if output is None:
        return

    if output.suffix not in (".npz", ".npy", ".safetensors"):
        raise ArgumentError(f"--output {output}: use .npz, .npy or .safetensors.")

    if output.suffix == ".npy" and num_files * num_layers > 1:
        raise ArgumentError(
            f"--output {output}: .npy holds one array, and there would be "
            f"{num_files * num_layers}; use .npz or .safetensors."
        )

    if not output.parent.is_dir():
        raise ArgumentError(f"--output {output}: there is no folder {output.parent}.")


def _row(
    name: str, samples: int, layer: int, hidden: Tensor, vectors: Tensor
) -> tuple[str, ...]:
    from seamless_w2vbert.constants import SAMPLING_RATE

    # The norm of a frame, on average; of the one vector when pooled.
    norm = vectors.float().norm(dim=-1).mean().item()

    return (
        name,
        f"{samples / SAMPLING_RATE:.2f}",
        str(layer),
        str(len(hidden)),
        str(hidden.size(1)),
        f"{norm:.3f}",
    )


def _print_table(rows: list[tuple[str, ...]], model: str) -> None:
    from rich import box
    from rich.table import Table

    untrained = " (untrained)" if model == "tiny-random" else ""
    table = Table(title=f"{model}{untrained}", box=box.SIMPLE, title_justify="left")

    for heading in ("file", "seconds", "layer", "frames", "dim", "norm"):
        justify: Any = "left" if heading == "file" else "right"
        table.add_column(heading, justify=justify, overflow="fold")

    for row in rows:
        table.add_row(*row)

    make_console().print(table)


def _write(output: Path, arrays: dict[str, Tensor]) -> None:
    import torch

    try:
        if output.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import save_file

            if "__metadata__" in arrays:
                raise ArgumentError(
                    f"--output {output}: safetensors keeps the name __metadata__ for "
                    "itself; use .npz."
                )
            try:
                save_file({k: v.contiguous() for k, v in arrays.items()}, output)
            except SafetensorError as ex:
                raise SeamlessW2vBertError(
                    f"{output}: cannot be written: {ex}."
                ) from None
            return

        import numpy as np

        # NumPy has no bfloat16; float32 holds every one of its values.
        numpy_arrays = {
            key: (v.float() if v.dtype == torch.bfloat16 else v).numpy()
            for key, v in arrays.items()
        }

        if output.suffix == ".npy":
            np.save(output, next(iter(numpy_arrays.values())))
            return

        # np.savez takes names as keyword arguments, of which some are its own.
        with zipfile.ZipFile(output, "w") as archive:
            for name, array in numpy_arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    except OSError as ex:
        raise SeamlessW2vBertError(
            f"{output}: cannot be written: {ex.strerror or ex}."
        ) from None
