"""The kernel for CUDA: its arithmetic where there is no GPU, itself where there is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import mean_cosine, plain, relative_difference
from torch._subclasses.fake_tensor import FakeTensorMode

from seamless_w2vbert import SpeechEncoderPipeline, attention, fused_attention
from seamless_w2vbert.attention import shaw_attention

triton = pytest.importorskip("triton", reason="there is no Triton for this system")
is_new = int(triton.__version__.split(".")[0]) >= 3
has_cuda = torch.cuda.is_available()


@pytest.mark.skipif(not is_new, reason="the interpreter of Triton 2 lacks casts")
def test_the_kernel_interpreted_gives_the_plain_formula():
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret_kernel.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "exact\n", result.stderr


@pytest.mark.skipif(not is_new, reason="Triton 2 compiles beside a CUDA driver only")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability, dtype):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {
        "relative": 73,
        "max_left": 64,
        "width": 64,
        "block_queries": 64,
        "block_keys": 32,
        "has_keep": True,
    }
    types = {
        **dict.fromkeys(
            ("q_ptr", "k_ptr", "v_ptr", "scores_ptr", "output_ptr"), f"*{dtype}"
        ),
        "keep_ptr": "*u8",
        "lengths_ptr": "*i32",
        "scale": "fp32",
        "log2_e": "fp32",
        **dict.fromkeys(constants, "constexpr"),
    }
    kernel = fused_attention._attend
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs={
            (kernel.arg_names.index(name),): value for name, value in constants.items()
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))

    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024  # what any of these GPUs has


@pytest.mark.skipif(not is_new, reason="fake tensors of torch 2.2 take a real GPU")
def test_queries_that_the_kernel_is_not_made_for_are_not_given_to_it():
    with FakeTensorMode():  # there may be no GPU
        taken = {
            (dtype, width, positions): fused_attention.takes(
                torch.empty(1, 2, positions, width, device="cuda", dtype=dtype)
            )
            for dtype in (torch.bfloat16, torch.float64)
            for width in (48, 64)
            for positions in (40, 2**26)
        }

    assert [case for case, is_taken in taken.items() if is_taken] == [
        (torch.bfloat16, 64, 40)
    ]
    assert not fused_attention.takes(torch.empty(1, 2, 40, 64))


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(
        fused_attention, "fused_attention", lambda q, *rest: torch.zeros_like(q)
    )
    with pytest.warns(UserWarning, match="off by 1.0e"):
        assert not attention._has_fused.__wrapped__(
            torch.device("cpu"), torch.float32, 16
        )


def test_a_kernel_that_cannot_be_compiled_is_not_used(monkeypatch):
    def fail(*args):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(fused_attention, "fused_attention", fail)
    with pytest.warns(UserWarning, match="RuntimeError: no C compiler"):
        assert not attention._has_fused.__wrapped__(
            torch.device("cpu"), torch.bfloat16, 64
        )


@pytest.mark.skipif(not has_cuda, reason="there is no GPU")
@pytest.mark.parametrize("dtype", list(fused_attention.TOLERANCES))
@pytest.mark.parametrize("positions", [1, 63, 64, 65, 200, 1500])
def test_on_a_gpu_the_kernel_gives_what_the_cpu_does(dtype, positions):
    assert attention._has_fused(torch.device("cuda"), dtype, 64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 16, positions, 64, generator=generator) for _ in range(3))
    table = torch.randn(73, 64, generator=generator) * 0.1
    lengths = torch.tensor([positions, 1, max(1, positions // 2)])
    keep = torch.arange(positions) < lengths.unsqueeze(1)

    expected = plain(q, k, v, table, 64, keep)
    inputs = (tensor.to("cuda", dtype) for tensor in (q, k, v, table))
    actual = shaw_attention(*inputs, 64, keep.to("cuda")).float().cpu()

    for row, length in enumerate(lengths.tolist()):
        assert (
            relative_difference(actual[row, :, :length], expected[row, :, :length])
            < fused_attention.TOLERANCES[dtype]
        )


@pytest.mark.skipif(not has_cuda, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_embeddings_are_those_of_the_cpu(tiny, clips, dtype):
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random", "cuda", dtype)
    actual = pipeline(clips)
    expected = tiny(clips)

    for row, length in enumerate(expected.lengths.tolist()):
        one = actual.last_hidden_state[row, :length].float().cpu()
        other = expected.last_hidden_state[row, :length]
        assert mean_cosine(one, other) > 0.999
