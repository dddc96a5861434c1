"""The kernels for CUDA: their arithmetic where there is no GPU, themselves where there
is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import mean_cosine, plain, relative_difference
from torch._subclasses.fake_tensor import FakeTensorMode

from seamless_w2vbert import (
    SpeechEncoderPipeline,
    attention,
    convolution,
    fused_attention,
    fused_convolution,
)
from seamless_w2vbert.attention import shaw_attention
from seamless_w2vbert.block import LeanBlock
from seamless_w2vbert.convolution import causal_convolution
from seamless_w2vbert.trial import TOLERANCES

triton = pytest.importorskip("triton", reason="there is no Triton for this system")
is_new = int(triton.__version__.split(".")[0]) >= 3
has_cuda = torch.cuda.is_available()


@pytest.mark.skipif(not is_new, reason="the interpreter of Triton 2 lacks casts")
def test_the_kernels_interpreted_give_the_plain_formulas():
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpret_kernels.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "exact\n", result.stderr


@pytest.mark.skipif(not is_new, reason="Triton 2 compiles beside a CUDA driver only")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_the_attention_compiles_for_gpus_that_are_not_here(width, dtype, capability):
    block_queries, block_keys = fused_attention.block_sizes(dtype, width)
    check_compiles(
        fused_attention._attend,
        fused_attention.NUM_WARPS,
        dtype,
        capability,
        constants={
            "relative": 73,
            "max_left": 64,
            "width": width,
            "block_queries": block_queries,
            "block_keys": block_keys,
            "has_keep": True,
        },
        types={"keep_ptr": "*u8", "lengths_ptr": "*i32"}
        | dict.fromkeys(("scale", "log2_e"), "fp32"),
    )


@pytest.mark.skipif(not is_new, reason="Triton 2 compiles beside a CUDA driver only")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_convolution_compiles_for_gpus_that_are_not_here(dtype, capability):
    check_compiles(
        fused_convolution._convolve,
        fused_convolution.NUM_WARPS,
        dtype,
        capability,
        constants={
            "taps": 31,
            "block_positions": 16,
            "block_channels": 1024,
            "has_bias": False,
        },
        types={"eps": "fp32"},
    )


def check_compiles(kernel, num_warps, dtype, capability, constants, types):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: pointer if name.endswith("_ptr") else "i32" for name in names}
        | types
        | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): each for name, each in constants.items()},
        attrs={  # what torch allocates, a product can read fast
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name.endswith(("_ptr", "_stride", "_head", "_batch"))
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )

    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 99 * 1024  # what any of these GPUs has


@pytest.mark.skipif(not is_new, reason="fake tensors of torch 2.2 take a real GPU")
def test_queries_that_the_kernel_is_not_made_for_are_not_given_to_it():
    with FakeTensorMode():  # there may be no GPU
        taken = {
            (dtype, width, positions): fused_attention.takes(
                torch.empty(1, 2, positions, width, device="cuda", dtype=dtype),
                torch.empty(73, width),
            )
            for dtype in (torch.bfloat16, torch.float64)
            for width in (48, 64)
            for positions in (40, 2**26)
        }

    assert [case for case, is_taken in taken.items() if is_taken] == [
        (torch.bfloat16, 64, 40)
    ]
    assert not fused_attention.takes(torch.empty(1, 2, 40, 64), torch.empty(73, 64))


def test_convolutions_that_the_kernel_is_not_made_for_are_not_given_to_it():
    norm = ((64,), torch.ones(64), torch.zeros(64), 1e-5)
    assert not fused_convolution.takes(torch.empty(1, 40, 64), norm)


WAYS = {
    "attention": (fused_attention, attention._has_fused, (64,), shaw_attention),
    "convolution": (
        fused_convolution,
        convolution._has_fused,
        (64, 31),
        convolution._convolve_plainly,
    ),
}


@pytest.fixture(params=WAYS)
def trial(request, monkeypatch):
    """Tries, as if for the first time, what is put in the place of a kernel; without
    that the plain way."""
    module, has_fused, sizes, plain_way = WAYS[request.param]

    def run(dtype, kernel=plain_way):
        monkeypatch.setattr(module, f"fused_{request.param}", kernel)
        return has_fused.__wrapped__(torch.device("cpu"), dtype, *sizes)

    return run


def test_a_kernel_that_is_wrong_is_not_used(trial):
    with pytest.warns(UserWarning, match="off by 1.0e"):
        assert not trial(torch.float32, lambda first, *rest: torch.zeros_like(first))


def test_a_kernel_that_gives_nan_is_not_used(trial):
    with pytest.warns(UserWarning, match="off by nan"):
        assert not trial(torch.float32, lambda first, *rest: first * torch.nan)


def test_a_kernel_that_cannot_be_compiled_is_not_used(trial):
    def fail(*args):
        raise RuntimeError("no C compiler")

    with pytest.warns(UserWarning, match="RuntimeError: no C compiler"):
        assert not trial(torch.bfloat16, fail)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_right_is_used(trial, dtype):
    assert trial(dtype)


@pytest.mark.skipif(not has_cuda, reason="there is no GPU")
@pytest.mark.parametrize("dtype", list(TOLERANCES))
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
            < TOLERANCES[dtype]
        )


@pytest.mark.skipif(not has_cuda, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_embeddings_are_those_of_the_cpu(tiny, clips, dtype, monkeypatch):
    calls = []
    run = LeanBlock.__call__
    monkeypatch.setattr(
        LeanBlock, "__call__", lambda self, *args: calls.append(1) or run(self, *args)
    )
    pipeline = SpeechEncoderPipeline.from_pretrained("tiny-random", "cuda", dtype)
    actual = pipeline(clips)
    assert calls
    assert convolution._has_fused.cache_info().currsize
    expected = tiny(clips)

    for row, length in enumerate(expected.lengths.tolist()):
        one = actual.last_hidden_state[row, :length].float().cpu()
        other = expected.last_hidden_state[row, :length]
        assert mean_cosine(one, other) > 0.999


@pytest.mark.skipif(not has_cuda, reason="there is no GPU")
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 1500])
def test_on_a_gpu_the_convolution_gives_what_the_cpu_does(dtype, positions):
    assert convolution._has_fused(torch.device("cuda"), dtype, 1024, 31)
    generator = torch.Generator().manual_seed(0)
    seqs = torch.randn(3, positions, 1024, generator=generator)
    weight = torch.randn(1024, 1, 31, generator=generator)
    gain, offset = torch.randn(2, 1024, generator=generator)

    def run(device, dtype):
        x, w, g, o = (each.to(device, dtype) for each in (seqs, weight, gain, offset))
        with torch.no_grad():
            return causal_convolution(x, w, None, ((1024,), g, o, 1e-5))

    actual = run("cuda", dtype).float().cpu()
    assert relative_difference(actual, run("cpu", torch.float32)) < TOLERANCES[dtype]
