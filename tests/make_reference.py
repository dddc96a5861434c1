"""Makes tests/data/tiny_random_reference.npz with Transformers alone: its feature
extractor and its Wav2Vec2BertModel, given the weights of tiny-random.

Run once, when the weights of tiny-random change: python tests/make_reference.py
"""

from __future__ import annotations

import numpy as np
from reference import (
    DATA,
    SPEECH,
    hidden_states_from_audio,
    read_mono_16k,
    transformers_twin,
)

from seamless_w2vbert import load_conformer_shaw_model
from seamless_w2vbert.architecture import TINY


def main() -> None:
    twin = transformers_twin(load_conformer_shaw_model("tiny-random"), TINY)
    layers = hidden_states_from_audio(twin, [read_mono_16k(SPEECH)[:16000]])
    arrays = {f"layer_{n}": states[0].numpy() for n, states in enumerate(layers)}
    np.savez(DATA / "tiny_random_reference.npz", **arrays)


if __name__ == "__main__":
    main()
