"""``seamless-w2vbert verify``: a dump -> whether it is what it was when written.

Comes in: the folder of a dump. Goes out: counts on stdout and problems on stderr; exit
code 0 if there are none, else 1.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from seamless_w2vbert.cli import options
from seamless_w2vbert.cli.dump import size


def verify(
    dump: Annotated[str, typer.Argument(help="The folder or URL of a dump.")],
    sample: Annotated[
        int, typer.Option(help="How many utterances to embed again.", min=0)
    ] = 8,
    model: Annotated[
        str | None,
        typer.Option(help="The model to do so with, where it is elsewhere now."),
    ] = None,
    device: options.Device = "cpu",
) -> None:
    """Read a dump again: checksums, counts, index against shards; and embed a sample
    again."""
    from seamless_w2vbert.dumping.verify import verify_dump

    found = verify_dump(
        dump, sample=sample, model=model, device=options.parse_device(device)
    )

    print(
        f"{dump}: {found.utterances} utterances: {found.embedded} embedded, "
        f"{found.failed} failed; {found.shards} shards, {size(found.bytes)}"
    )
    if found.sampled:
        print(
            f"{found.sampled} embedded again, largest difference "
            f"{found.largest_difference:.1e}"
        )

    for problem in found.problems:
        print(f"seamless-w2vbert: {options.printable(problem)}", file=sys.stderr)

    if found.problems:
        raise typer.Exit(1)
