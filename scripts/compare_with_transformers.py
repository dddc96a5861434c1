"""Compare this package with Transformers on your own audio, stage by stage.

    python scripts/compare_with_transformers.py MODEL AUDIO [AUDIO ...]

Prints each stage and a sentence, and writes comparison.html beside you.
"""

from __future__ import annotations

import sys
from pathlib import Path

from seamless_w2vbert import SeamlessW2vBertError, compare
from seamless_w2vbert.comparison.report import render


def main(model: str, *audio: str) -> int:
    comparison = compare(audio, model, "transformers")

    for stage in comparison.stages:
        same = "" if stage.same is None else f"{stage.same.max_relative:8.1e}"
        print(
            f"{stage.stage:10} {'ok' if stage.passed else 'DIFFERS':8}"
            f"largest {stage.own.max_relative:8.1e}   on the same input {same}"
        )

    print(comparison.sentence)
    Path("comparison.html").write_text(render(comparison), encoding="utf-8")

    return 0 if comparison.passed else 1


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except SeamlessW2vBertError as ex:
        sys.exit(str(ex))
