from __future__ import annotations

import logging

import pytest
import torch
from reference import mean_cosine

from seamless_w2vbert import (
    SpeechEncoderPipeline,
    load_conformer_shaw_model,
    precision,
)

CPU = torch.device("cpu")


def load(dtype):
    return load_conformer_shaw_model("tiny-random", dtype=dtype)


@pytest.fixture
def rates(monkeypatch):
    """What the products of this machine reach, as a test says it."""

    def set_rates(**given):
        monkeypatch.setattr(
            precision, "_rate", lambda dtype, device: given[precision._name(dtype)]
        )

    return set_rates


def test_a_faster_dtype_that_keeps_the_embeddings_is_chosen(rates):
    rates(float32=100.0, bfloat16=190.0)
    module, choice = precision.choose(load, CPU)

    assert choice.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert choice.reason.startswith("1.90 times as fast as float32 in products, mean")


def test_a_dtype_that_is_no_faster_is_not_chosen(rates):
    rates(float32=100.0, bfloat16=105.0)
    module, choice = precision.choose(load, CPU)

    assert choice.dtype == torch.float32
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert choice.reason == "bfloat16 is 1.05 times as fast as float32 in products"


@pytest.mark.parametrize("damage", [0.1, float("inf")], ids=["noise", "overflow"])
def test_a_faster_dtype_that_loses_the_embeddings_is_not_chosen(rates, damage):
    def load_badly(dtype):
        module = load(dtype)
        if dtype == torch.bfloat16:
            weight = module.encoder.layers[1].ffn1.inner_proj.weight
            noise = torch.randn(
                weight.shape, generator=torch.Generator().manual_seed(0)
            )
            weight.data += damage * noise.to(dtype)
        return module

    rates(float32=100.0, bfloat16=300.0)
    _, choice = precision.choose(load_badly, CPU)

    assert choice.dtype == torch.float32
    _, _, cosine = choice.reason.rpartition(" ")
    assert float(cosine) < precision.LEAST_COSINE


def test_of_two_fast_dtypes_the_second_is_chosen_where_the_first_fails(
    rates, monkeypatch
):
    monkeypatch.setattr(
        precision,
        "_candidates",
        lambda device: (torch.float32, torch.bfloat16, torch.float64),
    )

    def load_badly(dtype):
        module = load(dtype)
        if dtype == torch.bfloat16:
            module.encoder_frontend.model_dim_proj.weight.data.zero_()
        return module

    rates(float32=100.0, bfloat16=300.0, float64=200.0)
    _, choice = precision.choose(load_badly, CPU)
    assert choice.dtype == torch.float64


def test_a_pipeline_chooses_says_so_and_embeds(tiny, clips, caplog):
    with caplog.at_level(logging.INFO, logger="seamless_w2vbert"):
        pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random", dtype="auto")

    assert pipeline.dtype in (torch.float32, torch.bfloat16)
    assert str(pipeline.dtype) in caplog.text
    actual, expected = pipeline(clips[:1]), tiny(clips[:1])
    assert (
        mean_cosine(actual.last_hidden_state.float(), expected.last_hidden_state)
        > 0.999
    )


def test_this_machine_is_measured():
    assert precision._rate(torch.float32, CPU) > 1e8
