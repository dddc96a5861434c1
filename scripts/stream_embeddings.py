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


def main(folder: str, model: str = "conformer_shaw", layer: str = "-1") -> None:
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
            continue

        (hidden,) = item.hidden_states.values()
        np.save(f"{item.id}.npy", hidden.numpy())
        print(f"{item.id}: {len(hidden)} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])
