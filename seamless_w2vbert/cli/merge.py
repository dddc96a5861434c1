"""``seamless-w2vbert merge``: the dumps of a job array -> one.

Comes in: dumps. Goes out: one dump of all.
"""

from __future__ import annotations

from typing import Annotated

import typer


def merge(
    dumps: Annotated[
        list[str],
        typer.Argument(help="Dumps; of a job array the folder that holds its parts."),
    ],
    out: Annotated[str, typer.Argument(help="The folder to make, empty or new.")],
) -> None:
    """Make one dump of several that are complete and of the same settings.

    On one disk the files are linked and take no room twice.
    """
    from seamless_w2vbert.dumping.merge import merge_dumps

    report = merge_dumps(dumps, out)
    print(
        f"{report.location}: {report.utterances} utterances: {report.embedded} "
        f"embedded ({report.hours:.2f} h), {report.failed} failed"
    )
