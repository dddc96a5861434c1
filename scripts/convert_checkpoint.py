"""Convert a checkpoint of W2v-BERT 2.0, and say what has no place in the other format.

    python scripts/convert_checkpoint.py conformer_shaw.pt w2v-bert-2.0/
    python scripts/convert_checkpoint.py w2v-bert-2.0/ conformer_shaw.pt

A name that ends in .pt is written in fairseq2's format, any other as a Transformers
folder. Of a UnitY or SeamlessM4T v2 model the speech encoder is taken.
"""

from __future__ import annotations

import sys

from seamless_w2vbert.checkpoints.convert import convert_checkpoint
from seamless_w2vbert.errors import SeamlessW2vBertError


def main(src: str, dst: str) -> None:
    to = "fairseq2" if dst.endswith(".pt") else "transformers"

    try:
        conversion = convert_checkpoint(src, dst, to)
    except SeamlessW2vBertError as ex:
        sys.exit(str(ex))

    print(f"{conversion.num_tensors} tensors carried from {conversion.source}'s format")

    for name in conversion.dropped:
        print(f"dropped: {name}")

    for name in conversion.initialised:
        print(f"initialised, untrained: {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
