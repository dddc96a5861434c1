"""Which dtype to compute in: the fastest on this machine that keeps the embeddings.

Comes in: a device, and a way to load a model in a dtype. Goes out: the model and a
:class:`Choice` that says why. Speed is measured on a product of the model's size,
fidelity on the model itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import cosine_similarity, linear

from seamless_w2vbert import block, encoder
from seamless_w2vbert.audio import Waveform
from seamless_w2vbert.batch import FbankBatch, pad
from seamless_w2vbert.errors import SeamlessW2vBertError
from seamless_w2vbert.fbank import fbank
from seamless_w2vbert.synthetic import speech_like_noise

LEAST_COSINE = 0.999
"""Of a frame's embedding in a narrow dtype with that in float32, averaged over frames:
what every layer has to keep."""

_LEAST_GAIN = 1.1
"""How much faster than float32 a dtype has to be to be worth its rounding."""

_PROBE_SECONDS = 3.0
_PRODUCT = (512, 1024, 4096)
"""The frames, inputs and outputs of the product that is timed: a feed-forward
network's first in the 600M architecture."""

_REPEATS = 5


@dataclass(frozen=True)
class Choice:
    """A dtype, and why it was taken."""

    dtype: torch.dtype
    reason: str


def choose(
    load: Callable[[torch.dtype], Module], device: torch.device
) -> tuple[Module, Choice]:
    """Load a model in the fastest dtype that keeps a mean cosine over
    :data:`LEAST_COSINE` with float32 in every layer.

    :param load: returns the model in a dtype, on ``device``.
    """
    rates = {dtype: _rate(dtype, device) for dtype in _candidates(device)}
    ours = rates.pop(torch.float32)
    model = load(torch.float32)
    reasons = []

    for dtype, rate in sorted(rates.items(), key=lambda item: -item[1]):
        speed = f"{rate / ours:.2f} times as fast as float32 in products"

        if rate < _LEAST_GAIN * ours:
            reasons.append(f"{_name(dtype)} is {speed}")
            continue

        candidate = load(dtype)
        cosine = _least_cosine(candidate, model)
        reason = f"{speed}, mean cosine {cosine:.5f}"

        if cosine > LEAST_COSINE:
            return candidate, Choice(dtype, reason)

        reasons.append(f"{_name(dtype)} is {reason}")

    return model, Choice(
        torch.float32, "; ".join(reasons) or "nothing narrower runs here"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _candidates(device: torch.device) -> tuple[torch.dtype, ...]:
    if device.type == "cuda":
        return (torch.float32, torch.float16, torch.bfloat16)
    if device.type == "cpu":
        return (torch.float32, torch.bfloat16)

    return (torch.float32,)


# -- speed ---------------------------------------------------------------------------


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the multiply-adds per second of a product as the encoder computes it."""
    frames, inputs, outputs = _PRODUCT
    x = torch.randn(frames, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)

    packed = device.type == "cpu" and block.multiplies_in(dtype)
    product: Callable[[Tensor], Tensor] = (
        block.PackedProduct(weight) if packed else lambda x: linear(x, weight)
    )
    seconds = []

    with torch.inference_mode():
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            product(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)

    return frames * inputs * outputs / median(seconds[1:])


# -- fidelity ------------------------------------------------------------------------


def _least_cosine(candidate: Module, model: Module) -> float:
    """Return the mean cosine over frames in the layer where it is lowest; 0 where the
    candidate overflows."""
    probe = torch.from_numpy(speech_like_noise(_PROBE_SECONDS))
    fbanks = pad([fbank(Waveform(probe))])

    try:
        actual, expected = (_states(one, fbanks) for one in (candidate, model))
    except SeamlessW2vBertError:  # not finite
        return 0.0

    return min(
        float(cosine_similarity(one.double(), other.double(), dim=-1).mean())
        for one, other in zip(actual, expected, strict=True)
    )


def _states(model: Module, fbanks: FbankBatch) -> list[Tensor]:
    """Return the states of every layer, on the CPU. *Shape:* (1, S, model_dim)."""
    frontend, blocks = encoder.frontend_of(model), encoder.encoder_of(model)
    parameter = next(blocks.parameters())

    with torch.inference_mode():
        hidden = encoder.run_frontend(
            frontend, fbanks.to(parameter.device, parameter.dtype)
        )
        layers = range(encoder.num_layers_of(blocks) + 1)
        states = encoder.run_encoder(blocks, hidden, layers).hidden_states

    return [state.cpu() for state in states.values()]
