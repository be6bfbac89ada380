"""``x A^T`` on a GPU: the same bits for a row, whatever the number of rows and whichever launch that number takes."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.low_rank import low_rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("R", [8, 32, 64, 96, 160])
@pytest.mark.parametrize("I", [4096, 14336])
def test_a_row_does_not_depend_on_how_many_there_are(I: int, R: int, dtype: torch.dtype) -> None:  # noqa: E741
    """6 to 4,096 rows by runs (up to 128 ranks), 4,100 in one program; all beside x, in the columns of a table."""
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
