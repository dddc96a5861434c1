"""Embed every audio file under a folder, one .npy file beside each.

    python scripts/stream_embeddings.py FOLDER [MODEL] [LAYER]

Bad files are named and passed over; what is already there is not computed again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from seamless_w2vbert import SpeechEncoderPipeline

SUFFIXES = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au"}


def main(folder: str, model: str = "conformer_shaw", layer: str = "-1") -> int:
    if not Path(folder).is_dir():
        sys.exit(f"{folder}: there is no such folder.")

    failed = 0
    pipeline = SpeechEncoderPipeline.from_pretrained(model)
    paths = (
        path
        for path in sorted(Path(folder).rglob("*"))
        if path.suffix.lower() in SUFFIXES
        and not path.with_name(path.name + ".npy").exists()
    )

    for item in pipeline.stream(paths, layers=int(layer), on_error="return"):
        if item.error is not None:
            print(item.error, file=sys.stderr)
            failed += 1
            continue

        (hidden,) = item.hidden_states.values()
        np.save(f"{item.id}.npy", hidden.numpy())
        print(f"{item.id}: {len(hidden)} frames")

    return 1 if failed else 0


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
