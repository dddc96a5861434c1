"""Packed blocks against fairseq2's own."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from reference import mean_cosine
from torch.nn import Parameter

from seamless_w2vbert import SpeechEncoderPipeline, accelerate, block, packing, stack
from seamless_w2vbert.block import LeanBlock, SharedProduct, multiplies_in
from seamless_w2vbert.model import load_conformer_shaw_model
from seamless_w2vbert.stack import fairseq2_generation

pytestmark = pytest.mark.skipif(
    not multiplies_in(torch.float32), reason="this torch has no oneDNN"
)
needs_02 = pytest.mark.skipif(
    fairseq2_generation() != "0.2", reason="needs fairseq2 0.2"
)
needs_08 = pytest.mark.skipif(
    fairseq2_generation() != "0.8", reason="needs fairseq2 0.8"
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


def assert_close_in_direction(hidden, expected):
    valid = expected.abs().sum(dim=-1) > 0
    assert mean_cosine(hidden[valid], expected[valid]) > 0.999


def count_packed(monkeypatch):
    """Count how often a packed block runs."""
    calls = []
    run = LeanBlock.__call__
    monkeypatch.setattr(
        LeanBlock,
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
    assert_close_in_direction(hidden, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_blocks_do_on_cuda_gives_what_fairseq2s_do(
    pair, clips, monkeypatch, dtype
):
    """But for the kernels, which are tested by themselves."""
    stock, fast = pair
    calls = count_packed(monkeypatch)
    monkeypatch.setattr(
        packing, "packed", lambda block, *_: LeanBlock(block, SharedProduct)
    )
    states, expected = embed(fast.to(dtype), clips), embed(stock, clips)

    assert len(calls) == 3
    if dtype == torch.float32:
        assert_same(states, expected, 2e-6)
    for layer, hidden in expected.items():
        assert_close_in_direction(states[layer], hidden)


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


def write_in_place(block):
    with torch.no_grad():
        block.ffn1.inner_proj.weight.mul_(1.5)


def write_through_data(block):
    block.self_attn.q_proj.weight.data.mul_(1.5)
    block.ffn2.output_proj.bias.data += 0.5


def replace(block):
    weight = block.conv.pointwise_conv2.weight
    block.conv.pointwise_conv2.weight = Parameter(weight.detach() * 1.5)


def replace_again_and_again(block):
    """New memory is likely to be where some has just become free."""
    for factor in (1.1, 1.2, 1.5):
        weight = block.ffn1.output_proj.weight.detach() * factor
        del block.ffn1.output_proj.weight
        block.ffn1.output_proj.weight = Parameter(weight)


def load(block):
    block.load_state_dict({n: 1.2 * t for n, t in block.state_dict().items()})


def assign(block):
    state = {n: 1.2 * t for n, t in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        write_in_place,
        write_through_data,
        replace,
        replace_again_and_again,
        load,
        assign,
    ],
)
def test_weights_that_change_are_packed_anew(pair, clips, change):
    stock, fast = pair
    before = embed(fast, clips[:1])

    for _ in range(3):
        for module in pair:
            change(module.encoder.layers[1])
        after = embed(fast, clips[:1])
        assert not torch.equal(after[2], before[2])
        assert_same(after, embed(stock, clips[:1]), 5e-6)
        before = after


def test_a_part_that_is_written_unseen_is_packed_when_told(pair, clips):
    stock, fast = pair
    embed(fast, clips[:1])
    for module in pair:
        module.encoder.layers[0].ffn1.inner_proj.weight.data[100:200] = 0.5
    accelerate(fast)

    assert_same(embed(fast, clips[:1]), embed(stock, clips[:1]), 5e-6)


def test_weights_made_in_inference_mode_are_packed_anew_too(pair, clips):
    stock, fast = pair
    with torch.inference_mode():
        for module in pair:
            for part in module.modules():
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        made = Parameter(parameter.clone(), requires_grad=False)
                        part._parameters[name] = made
        embed(fast, clips[:1])
        for module in pair:
            module.encoder.layers[0].ffn1.inner_proj.weight.mul_(1.5)

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
    packing.release([mapped])
    assert torch.equal(mapped, saved)

    plain = saved.clone()
    plain.mul_(2)
    packing.release([plain])
    assert torch.equal(plain, 2 * saved)


def test_more_frames_than_go_through_at_a_time_come_out_the_same(
    pair, clips, monkeypatch
):
    stock, fast = pair
    monkeypatch.setattr(block, "_ROWS", 7)

    assert_same(embed(fast, clips), embed(stock, clips), 2e-6)


# -- what a packed block does not know -----------------------------------------------


def patch_a_forward(block):
    stock = block.ffn1.forward
    block.ffn1.forward = lambda seqs: 2 * stock(seqs)


def put_in_a_subclass(block):
    """As loralib does: a class of the same name, with parameters of its own."""
    stock = type(block.ffn1.inner_proj)

    def forward(self, seqs):
        return stock.forward(self, seqs) + self.delta

    block.ffn1.inner_proj.__class__ = type(
        stock.__name__, (stock,), {"forward": forward}
    )
    block.ffn1.inner_proj.delta = Parameter(torch.ones(()))


def mask_the_future_in_08(block):
    from fairseq2.models.transformer import CausalAttentionBias

    sdpa = block.self_attn.sdpa
    getattr(sdpa, "_stock", (sdpa,))[0].bias = CausalAttentionBias()


def mask_the_future_in_02(block):
    from fairseq2.nn.transformer import CausalAttentionMaskFactory

    block.self_attn.attn_mask_factory = CausalAttentionMaskFactory()


def scale_heads(block):
    block.self_attn.head_scale_weight = Parameter(torch.linspace(0.5, 2, 8))


@pytest.mark.parametrize(
    "change",
    [
        patch_a_forward,
        put_in_a_subclass,
        pytest.param(mask_the_future_in_08, marks=needs_08),
        pytest.param(mask_the_future_in_02, marks=needs_02),
        pytest.param(scale_heads, marks=needs_02),
    ],
)
def test_what_is_not_known_is_not_dropped(pair, clips, change):
    stock, fast = pair
    before = embed(fast, clips)
    for module in pair:
        change(module.encoder.layers[1])

    expected = embed(stock, clips)
    assert (expected[2] - before[2]).abs().max() > 0.01 * expected[2].abs().max()
    assert_same(embed(fast, clips), expected, 5e-6)


def test_attention_weights_are_handed_to_those_who_ask(pair, clips):
    stored = []
    for module in pair:
        module.encoder.layers[1].self_attn.register_attn_weight_hook(
            lambda module, attended, weights: stored.append(weights)
        )
        embed(module, clips[:1])

    expected, actual = stored
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_dropout_that_is_in_training_by_itself_drops(pair, clips):
    """As for estimates of uncertainty."""
    fast = pair[1]
    pipeline = SpeechEncoderPipeline(fast)
    fast.encoder.layers[1].ffn1.inner_dropout = torch.nn.Dropout(0.5).train()
    first, second = (pipeline(clips[:1]).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


def test_weights_that_lie_otherwise_in_memory_are_watched_too(pair, clips):
    stock, fast = pair
    for module in pair:
        inner = module.encoder.layers[1].ffn1.inner_proj
        inner.weight = Parameter(inner.weight.detach().T.contiguous().T)
    embed(fast, clips[:1])
    for module in pair:
        module.encoder.layers[1].ffn1.inner_proj.weight.data.mul_(1.5)

    assert_same(embed(fast, clips[:1]), embed(stock, clips[:1]), 5e-6)


def test_a_hook_on_every_module_is_not_passed_over(pair, clips):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(module)
    )
    try:
        embed(pair[1], clips[:1])
    finally:
        handle.remove()
    assert pair[1].encoder.layers[2].conv.depthwise_conv in seen


def test_a_hook_on_a_block_leaves_it_packed(pair, clips, monkeypatch):
    calls, seen = count_packed(monkeypatch), []
    fast = pair[1]
    fast.encoder.layers[1].register_forward_hook(lambda *args: seen.append(args))
    embed(fast, clips[:1])
    assert (len(calls), len(seen)) == (3, 1)


@needs_02
def test_dropout_in_attention_follows_the_mode(pair):
    fast = pair[1]
    attention = fast.encoder.layers[0].self_attn
    attention.sdpa._stock[0].inner_sdpa.attn_dropout_p = 0.5
    seqs = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(0))

    def is_repeated():
        return torch.equal(*(attention(seqs, None, seqs, None, seqs) for _ in "ab"))

    fast.train()
    assert not is_repeated()
    fast.eval()
    assert is_repeated()
    attention.register_attn_weight_hook(lambda *args: None)  # fairseq2's own answers
    assert is_repeated()


def test_under_autocast_blocks_run_as_fairseq2_has_them(pair, clips):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = (embed(module, clips)[3] for module in pair)
    valid = expected.abs().sum(dim=-1) > 0
    cosine = torch.cosine_similarity(actual.float(), expected.float(), dim=-1)[valid]
    assert cosine.min() > 0.999


# -- models that are accelerated -----------------------------------------------------


def test_a_model_may_be_accelerated_twice(pair, clips):
    fast = pair[1]
    expected = embed(fast, clips)
    assert accelerate(fast) is fast
    assert all(torch.equal(embed(fast, clips)[n], expected[n]) for n in expected)


def test_an_accelerated_model_is_saved_and_loaded_whole(
    pair, clips, tmp_path, monkeypatch
):
    expected = embed(pair[1], clips)
    torch.save(pair[1], tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)

    calls = count_packed(monkeypatch)
    assert all(torch.equal(embed(loaded, clips)[n], expected[n]) for n in expected)
    assert len(calls) == 3 * len(expected)


def test_threads_share_a_packed_block(pair, clips, monkeypatch):
    fast, expected = pair[1], embed(pair[0], clips)
    made = []
    make = LeanBlock.__init__
    monkeypatch.setattr(
        LeanBlock,
        "__init__",
        lambda self, *args: made.append(args) or make(self, *args),
    )
    together = Barrier(6)

    def run(_):
        together.wait()
        return embed(fast, clips)

    with ThreadPoolExecutor(6) as threads:
        for states in threads.map(run, range(6)):
            assert_same(states, expected, 2e-6)
    assert len(made) == 3


OLD_PROCESSOR = """
import torch
from seamless_w2vbert import SpeechEncoderPipeline, block
assert not block.multiplies_in(torch.bfloat16)
audio = torch.randn(16000, generator=torch.Generator().manual_seed(0)) / 10
for dtype in (torch.bfloat16, "auto"):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random", dtype=dtype)
    print(pipeline([audio]).last_hidden_state.shape)
"""


def test_bfloat16_runs_where_onednn_cannot_multiply_in_it():
    result = subprocess.run(
        [sys.executable, "-c", OLD_PROCESSOR],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == 2 * "torch.Size([1, 49, 128])\n"
