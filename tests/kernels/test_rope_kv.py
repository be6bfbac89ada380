"""Rotation and cache write in one launch: to the bit what the two operations do one after the other."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import decode_attention, rope_kv_triton, rope_triton
from pronghorn.kernels import rope as rope_module
from pronghorn.kernels import rope_kv as module
from pronghorn.kernels.decode_attention import write_kv
from pronghorn.kernels.reference import rope_kv as reference
from pronghorn.kernels.rope import rotate_
from pronghorn.kernels.rope_kv import rope_and_write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device; the rotation to compare with takes the same one."""
    triton = request.param == "triton"
    monkeypatch.setattr(module, "_path", lambda tensor: rope_kv_triton if triton else reference)
    rotation = rope_triton if triton else rope_module.reference
    monkeypatch.setattr(rope_module, "_path", lambda tensor: rotation)
    monkeypatch.setattr(decode_attention, "_path", lambda tensor: decode_attention.reference)
    return request.param


def _case(B: int, H: int, K: int, E: int, R: int, page: int, dtype: torch.dtype, angles: torch.dtype) -> tuple:
    """q, k and v as slices of one product; a table of angles; caches, table and positions (one row is padding)."""
    packed = torch.randn(B, H + 2 * K, E).to(DEVICE, dtype)
    angle_PE = torch.rand(40, R // 2).mul(6).repeat(1, 2).to(DEVICE)
    caches = [torch.randn(3 * B + 1, page, K, E).to(DEVICE, dtype) for _ in range(2)]
    table = torch.randperm(3 * B + 1)[: 3 * B].view(B, 3).repeat(1, 2).to(DEVICE, torch.int32)[:, :3]
    positions = torch.randint(0, min(3 * page, 40), (B,), dtype=torch.int32)
    positions[B // 2] = -1
    return packed, angle_PE.cos().to(angles), angle_PE.sin().to(angles), caches, table, positions.to(DEVICE)


@pytest.mark.parametrize(
    ("dtype", "angles"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize(
    ("H", "K", "E", "R"),
    [(4, 2, 64, 64), (3, 1, 80, 80), (1, 1, 96, 24), (14, 2, 6, 2), (40, 1, 128, 128), (8, 8, 16, 8)],
)
def test_equals_the_two_operations(
    path: str, H: int, K: int, E: int, R: int, dtype: torch.dtype, angles: torch.dtype
) -> None:
    packed, cos, sin, caches, table, positions = _case(5, H, K, E, R, 4, dtype, angles)
    wanted, expected = packed.clone(), [cache.clone() for cache in caches]
    live = positions >= 0
    q, k, v = wanted[live].split((H, K, K), dim=1)
    rotate_(q, k, cos, sin, positions[live])
    wanted[live] = torch.cat((q, k, v), dim=1)
    q, k, v = wanted.split((H, K, K), dim=1)
    write_kv(k, v, *expected, table, positions)
    rope_and_write_kv(*packed.split((H, K, K), dim=1), cos, sin, *caches, table, positions)
    assert torch.equal(packed, wanted)
    for cache, same in zip(caches, expected):
        assert torch.equal(cache, same)


def test_slots_in_place_of_a_table(path: str) -> None:
    """Several tokens of one row, as a prefill has them: each names its slot, and a padding row none that is read."""
    packed, cos, sin, caches, table, positions = _case(6, 4, 2, 64, 64, 4, torch.float16, torch.float32)
    expected, wanted = [cache.clone() for cache in caches], packed.clone()
    rope_and_write_kv(*wanted.split((4, 2, 2), dim=1), cos, sin, *expected, table, positions)
    blocks = table.gather(1, (positions.clamp(min=0) // 4).long().unsqueeze(1)).squeeze(1)
    slots = torch.where(positions < 0, 1 << 30, blocks * 4 + positions % 4).to(torch.int32)
    rope_and_write_kv(*packed.split((4, 2, 2), dim=1), cos, sin, *caches, slots, positions)
    assert torch.equal(packed, wanted)
    assert all(torch.equal(cache, same) for cache, same in zip(caches, expected))
    q, k, v = packed.split((4, 2, 2), dim=1)
    with pytest.raises(ValueError, match="slots"):
        rope_and_write_kv(q, k, v, cos, sin, *caches, slots[:-1], positions)
    with pytest.raises(ValueError, match="slots"):
        rope_and_write_kv(q, k, v, cos, sin, *caches, slots.long(), positions)


def test_positions_beyond_a_table(path: str) -> None:
    """Blocks for 12 tokens and angles for 40: position 12 has no block; with a page of 16, position 40 has no angle."""
    for page, position in ((4, 12), (16, 40)):
        packed, cos, sin, caches, table, positions = _case(3, 2, 1, 16, 16, page, torch.float32, torch.float32)
        positions[:] = -1
        positions[1] = position
        before = [t.clone() for t in (packed, *caches)]
        arguments = (*packed.split((2, 1, 1), dim=1), cos, sin, *caches, table, positions)
        if path == "reference" and DEVICE == "cpu":
            with pytest.raises(ValueError, match=f"reaches position {position}"):
                rope_and_write_kv(*arguments)
        elif path == "triton":
            rope_and_write_kv(*arguments)
        for tensor, same in zip((packed, *caches), before):
            assert torch.equal(tensor, same)


def test_what_does_not_fit_is_refused() -> None:
    packed, cos, sin, caches, table, positions = _case(3, 4, 2, 16, 16, 4, torch.float32, torch.float32)
    q, k, v = packed.split((4, 2, 2), dim=1)
    with pytest.raises(ValueError, match="divisor"):
        rope_and_write_kv(q[:, :3], k, v, cos, sin, *caches, table, positions)
    with pytest.raises(ValueError, match="cache of 2 heads"):
        rope_and_write_kv(q, k[:, :1], v, cos, sin, *caches, table, positions)
    with pytest.raises(ValueError, match="tables"):
        rope_and_write_kv(q, k, v, cos[:, :3], sin[:, :3], *caches, table, positions)
    with pytest.raises(ValueError, match="unit stride"):
        rope_and_write_kv(q, k, v, cos.t().contiguous().t(), sin, *caches, table, positions)
    with pytest.raises(ValueError, match="int32"):
        rope_and_write_kv(q, k, v, cos, sin, *caches, table, positions.long())
