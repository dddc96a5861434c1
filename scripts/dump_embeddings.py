"""Dump the embeddings of a corpus, and read them back.

    python scripts/dump_embeddings.py SOURCE OUT [MODEL] [LAYER]

SOURCE is a folder, a glob, a list of paths or a manifest. Run it again to go on after
an interruption.
"""

from __future__ import annotations

import sys

from seamless_w2vbert import SeamlessW2vBertError, dump, open_dump


def main(
    source: str, out: str, model: str = "conformer_shaw", layer: str = "-1"
) -> int:
    try:
        report = dump(
            source,
            out,
            model,
            layers=int(layer),
            format="parquet",
            dtype="float16",
            progress=lambda p: print(f"\r{p.done}/{p.total}", end="", file=sys.stderr),
        )
    except (SeamlessW2vBertError, ValueError) as ex:
        sys.exit(f"{ex}")

    print(f"\n{report.embedded} embedded, {report.failed} failed")

    opened = open_dump(out)

    for id, reason in opened.failures.items():
        print(f"{id}: {reason}")

    for id in opened.ids[:5]:
        frames = opened[id]  # (frames, dim), memory-mapped where the format allows
        print(f"{id}: {len(frames)} frames of 20 ms, {frames.shape[1]} dimensions")

    if not report.embedded:
        return 3

    mean, variance = opened.statistics(opened.settings["layers"][0])
    print(f"the corpus: mean {mean.mean():.3f}, variance {variance.mean():.3f}")

    return 3 if report.failed else 0


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
