"""Blocks copied with a factor: both paths against ``torch.mul``, bit for bit."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import scaled_blocks as module
from pronghorn.kernels import scaled_blocks_triton
from pronghorn.kernels.reference import scaled_blocks as reference
from pronghorn.kernels.scaled_blocks import scaled_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device."""
    backend = scaled_blocks_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_block_is_its_source_times_its_factor(path: str, dtype: torch.dtype) -> None:
    """Sizes below, at and above one tile, rows apart on both sides; what lies beside a block stays."""
    torch.manual_seed(0)
    wide = torch.randn(130, 200, device=DEVICE).to(dtype)
    table = torch.full((400, 300), 7.0, device=DEVICE).to(dtype)
    blocks = [
        (wide[:64, :64], table[:64, 3:67], 2.0),
        (wide[:, 5:38], table[64:194, 10:43], 0.3),
        (wide[:1, :7], table[194:195, :7], -1.7),
        (torch.randn(9, 1, device=DEVICE).to(dtype), table[200:209, 299:], 1.0),
        (wide[:0], table[:0, :200], 1.0),
    ]
    write = scaled_blocks(blocks)
    expected = table.clone()
    for change in (1.0, 1.5):  # a second call sees the sources as they are then
        wide *= change
        for source, target, factor in blocks:
            rows, column = divmod(target.storage_offset(), 300)
            expected[rows : rows + len(target), column : column + target.shape[1]] = source * factor
        write()
        assert torch.equal(table, expected)


def test_what_does_not_fit_is_refused() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="no blocks"):
        scaled_blocks([])
    with pytest.raises(ValueError, match="one shape"):
        scaled_blocks([(a, b, 1.0)])
    with pytest.raises(ValueError, match="one shape"):
        scaled_blocks([(a, a.half(), 1.0)])
    with pytest.raises(ValueError, match="contiguous"):
        scaled_blocks([(b.t(), a, 1.0)])
