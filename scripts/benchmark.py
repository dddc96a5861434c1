"""Measure this package against its peers on this machine, on any checkpoint.

    python scripts/benchmark.py [MODEL] [INPUTS] [NUM_LAYERS]
    python scripts/benchmark.py random-600m 1x5,1x20,4x10,1x60 2

Prints how many times as long as this package each side takes, and its peak memory.
"""

from __future__ import annotations

import sys

from seamless_w2vbert import SeamlessW2vBertError
from seamless_w2vbert.benchmarking import Case, benchmark


def main(
    model: str = "random-600m", inputs: str = "1x5,1x20", num_layers: str = "24"
) -> None:
    result = benchmark(
        model,
        num_layers=int(num_layers),
        cases=[Case.parse(text) for text in inputs.split(",")],
        repeats=3,
        corpus_seconds=0,
    )

    for one in result.measurements:
        ratio = result.ratio(one)
        if one.median is None or ratio is None:
            continue
        peak = "" if one.peak_bytes is None else f"{one.peak_bytes / 1e6:7.0f} MB"
        print(
            f"{one.case.label:8} {one.side:14} {one.dtype:10} {one.median:8.3f} s"
            f"{ratio:8.2f} x {peak}"
        )

    for line in result.skipped:
        print(line, file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) > 4:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except SeamlessW2vBertError as ex:
        sys.exit(str(ex))
