"""``x A^T`` on a GPU: the same bits for a row, whatever the number of rows and whichever launch that number takes."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import low_rank_cuda, low_rank_triton
from pronghorn.kernels.launch import chained
from pronghorn.kernels.low_rank import low_rank
from pronghorn.kernels.rms_norm import norm_forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("R", [8, 32, 64, 96, 160])
@pytest.mark.parametrize("I", [4096, 14336])
def test_a_row_does_not_depend_on_how_many_there_are(I: int, R: int, dtype: torch.dtype) -> None:  # noqa: E741
    """By runs, in one program, or by the wide instruction (Hopper, from 2,049 rows on, up to 128 ranks); all beside
    x, in the columns of a table.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4100, I + R, generator=generator, device="cuda").to(dtype)
    a = (torch.randn(R, I, generator=generator, device="cuda") * I**-0.5).to(dtype)
    all_TR, also_TR = low_rank(x[:, :I], a), torch.empty(4100, R, dtype=dtype, device="cuda")
    assert ((all_TR.double() - x[:, :I].double() @ a.double().T).norm() / all_TR.double().norm()).item() < 5e-3
    for T in (6, 16, 200, 300, 2048, 2100, 4096, 4100):
        low_rank(x[:T, :I], a, x[:T, I:], also_TR[:T])
        assert torch.equal(x[:T, I:], all_TR[:T]) and torch.equal(also_TR[:T], all_TR[:T]), T


def test_what_the_copy_engine_cannot_bring_comes_otherwise() -> None:
    """Rows of x, or A, that begin beside a multiple of 16 bytes: the same bits."""
    x = torch.randn(2100, 4100, device="cuda").bfloat16()
    wide = torch.randn(32 * 4096 + 1, device="cuda").bfloat16()
    a, other = wide[:-1].view(32, 4096), wide[1:].view(32, 4096)
    other.copy_(a.clone())
    expected = low_rank(x[:, :4096].contiguous(), other.clone())
    assert torch.equal(low_rank(x[:, :4096], other), expected)
    assert torch.equal(low_rank(x[:, :4096].contiguous(), other), expected)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper's alone"
)
@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("R", [8, 32, 64, 96, 128])
def test_many_rows_by_the_wide_instruction_have_the_bits_of_programs(R: int, blocks: int) -> None:
    for T, I in ((2049, 4096), (4096, 1000), (8200, 1088), (300, 14336)):  # noqa: E741 - shape letters
        x, a = (torch.randn(n, I, device="cuda").bfloat16() for n in (T, R))
        out, also, expected = (torch.full((T, R + 2), 7.0, dtype=x.dtype, device="cuda") for _ in range(3))
        low_rank_cuda.low_rank(x, a, out[:, :R], also[:, :R], blocks)
        low_rank_triton.low_rank(x, a, expected[:, :R])
        assert torch.equal(out, expected) and torch.equal(also, expected), (T, I)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="Hopper's alone"
)
@pytest.mark.parametrize("R", [32, 96])
def test_many_rows_in_a_chain_wait_for_x(R: int) -> None:
    """A norm of changing inputs and its ``x A^T``, twice, then both again: a graph of that, 20 times, every bit."""
    x, weight, a = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((4096, 4096), (4096,), (R, 4096)))
    normed, low = torch.empty_like(x), [torch.empty(4096, R, dtype=x.dtype, device="cuda") for _ in range(4)]

    def step() -> None:
        with chained():
            for i, out in enumerate(low):
                norm_forward(x if i % 2 else x.flip(0), weight, 1e-5, normed)
                low_rank(normed, a, out)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        for _ in range(20):
            x.copy_(torch.randn_like(x))
            graph.replay()
            own = torch.empty_like(low[0])
            low_rank_triton.low_rank(norm_forward(x, weight, 1e-5)[0], a, own)
            assert all(torch.equal(out, own.flip(0) if i % 2 == 0 else own) for i, out in enumerate(low))
