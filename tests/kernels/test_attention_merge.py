"""Merging partial attentions: both paths against the softmax over all keys in float64."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import attention_merge as module
from pronghorn.kernels import attention_merge_triton
from pronghorn.kernels.attention_merge import Copies, add_rows_, merge_, sum_copies
from pronghorn.kernels.reference import attention_merge as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}  # the parts are rounded, and their merge


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device."""
    backend = attention_merge_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    return request.param


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def _part(scores_HNU: torch.Tensor, v_UHE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    o_NHE = torch.einsum("hnu,uhe->nhe", scores_HNU.softmax(-1), v_UHE).contiguous()
    return o_NHE, scores_HNU.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("N", "H", "E", "shift"), [(1, 1, 8, 0.0), (5, 3, 80, 0.0), (70, 2, 64, 0.0), (5, 3, 8, 200.0)]
)
def test_is_the_softmax_over_all_keys(path: str, N: int, H: int, E: int, shift: float, dtype: torch.dtype) -> None:
    """Scores moved by ``shift`` are far above exp's range; their lse has 1.5e-5 from one float32 to the next."""
    T = N + 3
    index = torch.randperm(T)[:N]
    scores, v = torch.randn(H, N, 9, dtype=torch.float64) * 3, torch.randn(9, H, E, dtype=torch.float64)
    scores += shift
    o_own, lse_own = _part(scores[..., :4], v[:4])
    o_part, lse_part = _part(scores[..., 4:], v[4:])
    o_true, lse_true = _part(scores, v)
    o, lse = torch.randn(T, H, E, device=DEVICE).to(dtype), torch.randn(H, T, device=DEVICE)
    untouched = torch.ones(T, dtype=torch.bool).index_fill(0, index, False).to(DEVICE)
    before, lse_before = o[untouched].clone(), lse[:, untouched].clone()
    index = index.to(DEVICE)
    o[index], lse[:, index] = o_own.to(DEVICE, dtype), lse_own.to(DEVICE, torch.float32)
    merge_(o, lse, o_part.to(DEVICE, dtype), lse_part.to(DEVICE, torch.float32), index)
    assert _error(o[index].cpu(), o_true) <= TOLERANCE[dtype] + shift * 5e-8
    assert _error(lse[:, index].cpu(), lse_true) <= 1e-6
    assert torch.equal(o[untouched], before) and torch.equal(lse[:, untouched], lse_before)


def test_a_query_that_saw_no_other_key_keeps_its_own(path: str) -> None:
    o, lse = torch.randn(4, 2, 8, device=DEVICE), torch.randn(2, 4, device=DEVICE)
    before, lse_before = o.clone(), lse.clone()
    none = torch.full((2, 4), float("-inf"), device=DEVICE)
    merge_(o, lse, torch.zeros_like(o), none, torch.arange(4, device=DEVICE))
    assert torch.equal(o, before)
    torch.testing.assert_close(lse, lse_before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_are_added_and_rounded_once(path: str, count: int, dtype: torch.dtype) -> None:
    """Sums of unlike sizes in one call."""
    shapes = [((7, 3, 20), [6, 0, 3, 2]), ((5, 1, 20), [4]), ((9, 2, 8), [1, 8, 0, 2, 3, 7])][:count]
    sums, expected = [], []
    for shape, rows in shapes:
        x, part = (torch.randn(n, *shape[1:], device=DEVICE).to(dtype) for n in (shape[0], len(rows)))
        index = torch.tensor(rows, device=DEVICE)
        expected.append(x.clone())
        expected[-1][index] = (x[index].double() + part.double()).to(dtype)
        sums.append((x, part, index))
    add_rows_(*sums)
    assert all(torch.equal(x, wanted) for (x, _, _), wanted in zip(sums, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_copies_are_added_up_and_rounded_once(path: str, dtype: torch.dtype) -> None:
    """Small whole numbers, whose sums are exact in any order."""
    tokens = torch.tensor([0, 1, 2, 0, 1, 3, 0, 1, 4, 5])
    copies = Copies(tokens, 6, torch.device(DEVICE))
    dk, dv = (torch.randint(-20, 20, (10, 3, 700), device=DEVICE).to(dtype) for _ in range(2))
    for got, parts in zip(sum_copies(dk, dv, copies), (dk, dv)):
        wanted = torch.stack([parts[tokens.to(DEVICE) == t].double().sum(0) for t in range(6)])
        assert got.dtype == dtype and torch.equal(got.double(), wanted)


def test_what_does_not_fit_is_refused() -> None:
    o, lse, index = torch.zeros(4, 2, 8), torch.zeros(2, 4), torch.arange(3)
    with pytest.raises(ValueError, match="part is"):
        merge_(o, lse, torch.zeros(4, 2, 8), torch.zeros(2, 3), index)
    with pytest.raises(ValueError, match="contiguous"):
        merge_(o, torch.zeros(4, 2).t(), torch.zeros(3, 2, 8), torch.zeros(2, 3), index)
    with pytest.raises(ValueError, match="rows"):
        add_rows_((o, torch.zeros(4, 2, 8), index))
    with pytest.raises(ValueError, match="one to three"):
        add_rows_()
    copies = Copies(index, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="give each a row"):
        sum_copies(o, o, copies)
    with pytest.raises(ValueError, match="contiguous"):
        sum_copies(o[:3].transpose(1, 2), o[:3].transpose(1, 2), copies)
