"""Packed blocks against fairseq2's own."""

from __future__ import annotations

import copy

import pytest
import torch

from seamless_w2vbert import SpeechEncoderPipeline, accelerate, packing, stack
from seamless_w2vbert.model import load_conformer_shaw_model

pytestmark = pytest.mark.skipif(
    not packing.is_available(), reason="this torch has no oneDNN"
)


@pytest.fixture
def pair():
    """A model as fairseq2 makes it, and the same accelerated."""
    stock = load_conformer_shaw_model("tiny-random")
    return stock, accelerate(load_conformer_shaw_model("tiny-random"))


def embed(module, clips, layers=(1, 2, 3)):
    return SpeechEncoderPipeline(module)(clips, layers=layers).hidden_states


def assert_same(states, expected, bound):
    for layer, hidden in expected.items():
        difference = (states[layer].float() - hidden.float()).abs().max()
        assert difference < bound * hidden.abs().max(), layer


def count_packed(monkeypatch):
    """Count how often a packed block runs."""
    calls = []
    run = packing.PackedBlock.__call__
    monkeypatch.setattr(
        packing.PackedBlock,
        "__call__",
        lambda self, *args: calls.append(self) or run(self, *args),
    )
    return calls


def test_packed_blocks_give_what_fairseq2s_do(pair, clips, monkeypatch):
    stock, fast = pair
    calls = count_packed(monkeypatch)

    assert_same(embed(fast, clips), embed(stock, clips), 2e-6)  # padded
    assert_same(embed(fast, clips[:1]), embed(stock, clips[:1]), 2e-6)
    assert len(calls) == 6


def test_packed_blocks_run_in_bfloat16(clips, monkeypatch):
    calls = count_packed(monkeypatch)
    fast = accelerate(load_conformer_shaw_model("tiny-random", dtype=torch.bfloat16))
    stock = load_conformer_shaw_model("tiny-random")

    (hidden,) = embed(fast, clips, layers=3).values()
    (expected,) = embed(stock, clips, layers=3).values()
    assert hidden.dtype == torch.bfloat16
    assert calls
    valid = expected.abs().sum(dim=-1) > 0
    cosine = torch.cosine_similarity(hidden.float(), expected, dim=-1)[valid]
    assert cosine.mean() > 0.999


def test_gradients_take_the_way_of_fairseq2(pair, clips, monkeypatch):
    stock, fast = pair
    calls = count_packed(monkeypatch)
    gradients = []

    for module in (stock, fast):
        pipeline = SpeechEncoderPipeline(module)
        fbank = pipeline.fbank(pipeline.decode(clips[0])).unsqueeze(0)
        seqs = fbank[:, : fbank.size(1) // 2 * 2].reshape(1, -1, 160)
        hidden = module.encoder_frontend.post_extract_layer_norm(seqs)
        hidden = module.encoder_frontend.model_dim_proj(hidden)
        *_, last = stack.load().iter_layers(
            module.encoder, hidden, torch.tensor([hidden.size(1)])
        )
        last.square().sum().backward()
        gradients.append({n: p.grad for n, p in module.encoder.named_parameters()})

    assert not calls
    # That of a key's bias is zero but for rounding.
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        difference = (gradients[1][name] - gradient).abs().max()
        assert difference <= 1e-4 * gradient.abs().max() + 1e-6 * largest, name


@pytest.mark.parametrize("how", ["in place", "replaced", "loaded"])
def test_weights_that_change_are_packed_anew(pair, clips, how):
    stock, fast = pair
    embed(fast, clips[:1])

    for module in (stock, fast):
        block = module.encoder.layers[1]
        with torch.no_grad():
            if how == "in place":
                block.ffn1.inner_proj.weight.mul_(1.5)
            elif how == "replaced":
                weight = block.conv.pointwise_conv2.weight
                block.conv.pointwise_conv2.weight = torch.nn.Parameter(weight * 1.5)
            else:
                state = {n: 1.5 * t for n, t in block.state_dict().items()}
                block.load_state_dict(state)

    assert_same(embed(fast, clips[:1]), embed(stock, clips[:1]), 5e-6)


def test_a_hook_is_not_passed_over(pair, clips):
    _, fast = pair
    embed(fast, clips[:1])
    seen = []
    fast.encoder.layers[1].ffn2.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    embed(fast, clips[:1])
    assert len(seen) == 1


def test_a_part_that_was_put_in_is_not_passed_over(pair, clips):
    stock, fast = pair

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, seqs):
            return self.inner(seqs) + 1.0

    for module in pair:
        block = module.encoder.layers[0]
        block.ffn1.inner_proj = Adapter(block.ffn1.inner_proj)

    assert_same(embed(fast, clips[:1]), embed(stock, clips[:1]), 5e-6)


def test_a_copy_has_weights_of_its_own(pair, clips):
    stock, fast = pair
    embed(fast, clips[:1])
    copied = copy.deepcopy(fast)
    with torch.no_grad():
        copied.encoder.layers[0].ffn1.inner_proj.weight.mul_(2.0)
        stock.encoder.layers[0].ffn1.inner_proj.weight.mul_(2.0)

    assert_same(embed(copied, clips[:1]), embed(stock, clips[:1]), 5e-6)
    assert not torch.equal(embed(fast, clips[:1])[1], embed(copied, clips[:1])[1])


def test_memory_that_is_let_go_is_read_again(tmp_path):
    """Of weights mapped from a file the pages go, and nothing of what they hold."""
    saved = torch.randn(1 << 20)
    torch.save(saved, tmp_path / "w.pt")
    mapped = torch.load(str(tmp_path / "w.pt"), mmap=True, weights_only=True)
    packing.release(mapped)
    assert torch.equal(mapped, saved)

    plain = saved.clone()
    plain.mul_(2)
    packing.release(plain)
    assert torch.equal(plain, 2 * saved)


def test_more_frames_than_go_through_at_a_time_come_out_the_same(
    pair, clips, monkeypatch
):
    stock, fast = pair
    monkeypatch.setattr(packing, "_ROWS", 7)

    assert_same(embed(fast, clips), embed(stock, clips), 2e-6)
