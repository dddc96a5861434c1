from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import SPEECH, transformers_twin

from seamless_w2vbert import SpeechEncoderPipeline, stack
from seamless_w2vbert.architecture import TINY, Architecture, PretrainingHeads


@pytest.fixture(scope="session")
def tiny() -> SpeechEncoderPipeline:
    return SpeechEncoderPipeline.from_pretrained("tiny-random")


@pytest.fixture(scope="session")
def tiny_twin(tiny):
    """Transformers' model with the weights of tiny-random."""
    return transformers_twin(tiny.module, TINY)


@pytest.fixture(scope="session")
def speech(tiny):
    """The sample recording, decoded. Its embedding is tested elsewhere."""
    return tiny.decode(SPEECH)


@pytest.fixture(scope="session")
def clips(speech) -> list[np.ndarray]:
    """Stretches of speech of mixed lengths, odd and even in fbank frames."""
    samples = speech.samples.numpy()
    return [samples[4000 : 4000 + n] for n in (16000, 9043, 30720, 560, 25203)]


@pytest.fixture(scope="session")
def small_architecture() -> Architecture:
    """Another width, depth and head count than any default, with pretraining heads."""
    return Architecture(
        num_layers=2,
        model_dim=48,
        num_heads=3,
        ffn_inner_dim=96,
        pretraining=PretrainingHeads(
            final_dim=24, quantized_dim=32, num_codebooks=2, num_codebook_entries=5
        ),
    )


@pytest.fixture(scope="session")
def small_model(small_architecture) -> torch.nn.Module:
    """A model of that architecture with weights of its own."""
    model = stack.load().build_model(small_architecture)
    generator = torch.Generator().manual_seed(5)
    state = {
        name: torch.zeros((), dtype=torch.int64)
        if name == "quantizer.num_updates"
        else torch.randn(tensor.shape, generator=generator) / 4
        for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)
    return model.eval()
