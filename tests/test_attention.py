from __future__ import annotations

import copy
import io
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import (
    hidden_states_from_fbanks,
    plain,
    relative_difference,
    transformers_config,
    transformers_twin,
)
from transformers import Wav2Vec2BertForCTC

from seamless_w2vbert import (
    ArgumentError,
    SpeechEncoderPipeline,
    accelerate,
    attention,
    load_conformer_shaw_model,
)
from seamless_w2vbert.architecture import TINY
from seamless_w2vbert.attention import shaw_attention


def draw(n, heads, positions, width, relative, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(n, heads, positions, width, generator=generator).double()
        for _ in range(3)
    )
    return q, k, v, torch.randn(relative, width, generator=generator).double()


@pytest.fixture(params=["small blocks", "blocks", "whole"])
def block(request, monkeypatch):
    scores, rows, tile = {
        "small blocks": (1, 1, 1),
        "blocks": (3_000, 40, 4_000),
        "whole": (4 * 2**20, 256, 2**18),
    }[request.param]
    monkeypatch.setitem(attention._MAX_SCORES, "cpu", scores)
    monkeypatch.setattr(attention, "_ROWS", rows)
    monkeypatch.setattr(attention, "_TILE", tile)


@pytest.fixture(params=["inference", "gradients"])
def attend(request):
    """Both ways to compute it: without gradients, and with."""
    if request.param == "inference":
        return shaw_attention

    def with_gradients(q, *rest):
        return shaw_attention(q.requires_grad_(), *rest).detach()

    return with_gradients


@pytest.mark.usefixtures("block")
def test_every_length_around_the_window_and_block_edges_is_exact(attend):
    for positions in range(1, 201):
        q, k, v, table = draw(1, 2, positions, 4, 73, seed=positions)
        expected = plain(q, k, v, table, 64)
        torch.testing.assert_close(attend(q, k, v, table, 64), expected)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 3),
    heads=st.integers(1, 4),
    positions=st.integers(1, 120),
    width=st.integers(1, 9),
    left=st.integers(0, 90),
    right=st.integers(0, 90),
    rows=st.sampled_from([1, 16, 50, 256]),
    tile=st.sampled_from([1, 1_000, 4 * 2**20]),
    seed=st.integers(0, 1000),
)
def test_any_shape_window_and_padding_is_exact(
    attend, n, heads, positions, width, left, right, rows, tile, seed
):
    q, k, v, table = draw(n, heads, positions, width, left + 1 + right, seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, positions + 1, (n,), generator=generator)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention._MAX_SCORES, "cpu", tile)
        patch.setattr(attention, "_ROWS", rows)
        patch.setattr(attention, "_TILE", tile)
        assert_exact_where_kept(attend, q, k, v, table, left, lengths)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("positions", [1, 2, 63, 64, 65, 73, 130])
def test_rows_of_one_frame_and_rows_padded_but_for_one_are_exact(attend, positions):
    q, k, v, table = draw(3, 2, positions, 4, 73)
    lengths = torch.tensor([positions, 1, max(1, positions - 1)])

    assert_exact_where_kept(attend, q, k, v, table, 64, lengths)


def test_keys_left_out_in_the_middle_are_left_out(attend):
    q, k, v, table = draw(2, 2, 100, 4, 73)
    keep = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) < 0.5

    torch.testing.assert_close(
        attend(q, k, v, table, 64, keep), plain(q, k, v, table, 64, keep)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [40, 300, 1_100])
def test_it_is_as_exact_as_its_dtype(attend, dtype, positions):
    q, k, v, table = draw(1, 16, positions, 64, 73)
    inputs = [tensor.to(dtype) for tensor in (q, k, v, table * 0.1)]

    actual = attend(*inputs, 64)
    assert actual.dtype == dtype
    expected = plain(*(tensor.double() for tensor in inputs), 64)
    bound = 2e-6 if dtype == torch.float32 else 5e-2
    assert relative_difference(actual.double(), expected) < bound


def test_a_sequence_of_which_nothing_is_kept_spoils_nothing(attend):
    """Not even one whose gaps take another way than padding at the end."""
    q, k, v, table = draw(3, 2, 9, 4, 73)
    keep = torch.ones(3, 9, dtype=torch.bool)
    keep[1] = False
    keep[2, 4] = False

    actual = attend(q, k, v, table, 64, keep)
    assert actual.isfinite().all()
    expected = plain(q, k, v, table, 64, keep)
    torch.testing.assert_close(actual[[0, 2]], expected[[0, 2]])


def test_nothing_at_all_is_attended_to_nothing(attend):
    for n, positions in ((0, 5), (2, 0), (0, 0)):
        q, k, v, table = draw(n, 2, positions, 4, 73)
        assert attend(q, k, v, table, 64).shape == (n, 2, positions, 4)


def assert_exact_where_kept(attend, q, k, v, table, left, lengths):
    keep = torch.arange(q.size(2)) < lengths.unsqueeze(1)
    expected = plain(q, k, v, table, left, keep)
    actual = attend(q, k, v, table, left, keep)
    assert actual.isfinite().all()

    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(actual[row, :, :length], expected[row, :, :length])


@pytest.mark.usefixtures("block")
def test_gradients_are_those_of_the_plain_formula():
    inputs = [t.requires_grad_() for t in draw(2, 2, 40, 3, 13)]
    keep = torch.arange(40) < torch.tensor([[40], [25]])

    gradients = []
    for attend in (shaw_attention, plain):
        output = attend(*inputs, 8, keep)
        gradients.append(torch.autograd.grad(output.sin().sum(), inputs))

    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_memory_for_gradients_is_for_each_frame_not_for_each_pair(monkeypatch):
    monkeypatch.setitem(attention._MAX_SCORES, "cpu", 20_000)

    def bytes_kept(positions):
        kept = {}

        def keep(tensor):
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        inputs = [t.requires_grad_() for t in draw(1, 2, positions, 16, 73)]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            shaw_attention(*inputs, 64)
        return sum(kept.values())

    assert bytes_kept(2_000) < 2.2 * bytes_kept(1_000)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_compiling"), reason="needs torch 2.3 or newer"
)
def test_it_compiles_whole():
    q, k, v, table = draw(2, 2, 50, 4, 73)
    keep = torch.arange(50) < torch.tensor([[50], [20]])
    compiled = torch.compile(shaw_attention, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(q, k, v, table, 64, keep), plain(q, k, v, table, 64, keep)
        )


def test_ten_minutes_in_one_piece_take_memory_for_each_frame_not_for_each_pair():
    """With a number for each pair a single head would take 3.6 GB."""
    program = """
import torch, warnings
warnings.simplefilter("ignore")
from seamless_w2vbert import SpeechEncoderPipeline
from seamless_w2vbert.benchmarking.memory import HostMeter

pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random")
meter = HostMeter()
for frames in (200, 60_000):
    batch = pipeline.pad([torch.randn(frames, 80)])
    meter.reset()
    before = meter.now()
    hidden = pipeline.encoder(pipeline.encoder_frontend(batch)).last_hidden_state
    assert hidden.shape == (1, frames // 2, 128) and hidden.isfinite().all()
print(meter.peak() - before)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 0.5e9


def test_a_window_outside_its_table_is_refused():
    q, k, v, table = draw(1, 1, 5, 2, 4)
    for left in (-1, 4):
        with pytest.raises(ValueError, match="4 relative positions"):
            shaw_attention(q, k, v, table, left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerated_model_is_the_same_model(tiny, clips, dtype):
    stock = load_conformer_shaw_model("tiny-random", dtype=dtype)
    fast = accelerate(load_conformer_shaw_model("tiny-random", dtype=dtype))
    assert fast.state_dict().keys() == stock.state_dict().keys()
    assert sum(1 for _ in fast.parameters()) == sum(1 for _ in stock.parameters())

    actual = SpeechEncoderPipeline(fast)(clips, layers=range(4))
    expected = SpeechEncoderPipeline(stock)(clips, layers=range(4))
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    for layer in range(4):
        for row, length in enumerate(actual.lengths.tolist()):
            assert (
                relative_difference(
                    actual.hidden_states[layer][row, :length],
                    expected.hidden_states[layer][row, :length],
                )
                < bound
            )


def test_an_accelerated_model_of_transformers_is_the_same_model(tiny, clips):
    fbanks = [tiny.fbank(tiny.decode(clip)) for clip in clips]
    stock = transformers_twin(tiny.module, TINY)
    fast = accelerate(copy.deepcopy(stock))

    expected = hidden_states_from_fbanks(stock, fbanks)
    actual = hidden_states_from_fbanks(fast, fbanks)
    for layer in range(4):
        for one, other in zip(actual[layer], expected[layer], strict=True):
            assert relative_difference(one, other) < 1e-5

    file = io.BytesIO()
    torch.save(accelerate(fast), file)  # twice is as once
    file.seek(0)
    loaded = hidden_states_from_fbanks(torch.load(file, weights_only=False), fbanks)
    for one, other in zip(loaded[3], actual[3], strict=True):
        assert torch.equal(one, other)

    # What the fast path does not give is given by the stock one.
    features = fbanks[0][:98].reshape(1, 49, 160)
    weights = fast(features, output_attentions=True).attentions
    assert weights[0].shape == (1, 8, 49, 49)


def test_a_task_head_of_transformers_trains_the_same(small_architecture):
    torch.manual_seed(0)
    config = transformers_config(
        small_architecture,
        vocab_size=6,
        hidden_dropout=0.0,
        final_dropout=0.0,
        conformer_conv_dropout=0.0,
        apply_spec_augment=False,
    )
    stock = Wav2Vec2BertForCTC(config).train()
    fast = accelerate(copy.deepcopy(stock))
    features = torch.randn(2, 90, 160)
    mask = (torch.arange(90) < torch.tensor([[90], [61]])).long()

    for model in (stock, fast):
        model(
            features, attention_mask=mask, labels=torch.ones(2, 4).long()
        ).loss.backward()

    for one, other in zip(fast.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-3)


def test_a_model_without_shaw_attention_is_refused():
    with pytest.raises(ArgumentError, match="Linear has no Shaw relative attention"):
        accelerate(torch.nn.Linear(2, 2))
