"""Running sums under deterministic kernels: torch's, to the last bits, and never a draw of what has no probability."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pronghorn.kernels.reference.cumulative import cumulative
from pronghorn.kernels.reference.sample import draw


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("vocab", [3, 50_000])
def test_equals_torchs(deterministic: None, vocab: int) -> None:
    mass_BV = torch.randn(4, vocab, dtype=torch.float64).mul(4).softmax(-1)
    found_BV = cumulative(mass_BV)
    assert torch.allclose(found_BV, mass_BV.cumsum(-1), rtol=0, atol=vocab * 2.0**-61 + 1e-13)
    assert (found_BV.diff(dim=-1) >= 0).all()
    shuffled = torch.randperm(vocab)
    assert torch.equal(cumulative(mass_BV[:, shuffled])[:, -1], found_BV[:, -1])  # in any order


def test_draws_are_those_of_the_plain_sum(deterministic: None) -> None:
    logps_BV = torch.randn(64, 997).log_softmax(-1)
    logps_BV[:, 5::7] = float("-inf")
    uniforms_B = torch.rand(64, dtype=torch.float64)
    found_B = draw(logps_BV, uniforms_B)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(found_B, draw(logps_BV, uniforms_B))
    assert logps_BV.gather(1, found_B[:, None]).isfinite().all()
