"""Decode through block tables: both ways in agree with attention over each row's tokens, by the reference kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pronghorn.kernels.rope import rotate_
from pronghorn.rollout.native.kv_cache import KVCache, KVShape
from pronghorn.rollout.native.paged import PagedDecode

H, K, E, PAGE = 4, 2, 8, 4


def test_a_step_stores_and_attends_with_and_without_rotation() -> None:
    """Three rows in tensors made for five; the third is padding."""
    cpu = torch.device("cpu")
    positions = torch.tensor([9, 0, -1, 7, 7], dtype=torch.int32)
    table = torch.randperm(20)[:15].view(5, 3).int()
    angle = torch.rand(12, E // 2).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()
    caches = [KVCache(KVShape(2, K, E, torch.float32, cpu), 20, PAGE) for _ in range(2)]
    for name in ("keys", "values"):
        for ours, other in zip(*(getattr(cache, name) for cache in caches)):
            other.copy_(ours.normal_())
    qkv = torch.randn(3, H + 2 * K, E)
    turned = qkv.clone()
    rotate_(turned[:2, :H], turned[:2, H : H + K], cos, sin, positions[:2])
    once, twice = (PagedDecode(cache, table, positions, positions + 1, query_heads=H) for cache in caches)
    got = once.rotate_and_attend(1, *qkv.split((H, K, K), dim=1), cos, sin, 0.3)
    same = twice(1, *turned.split((H, K, K), dim=1), 0.3)
    assert torch.equal(got, same) and not got[2].any()
    for name in ("keys", "values"):
        assert all(torch.equal(a, b) for a, b in zip(*(getattr(cache, name) for cache in caches)))
    for b, n in enumerate((10, 1)):
        blocks = table[b, : -(-n // PAGE)].long()
        k, v = (t[1][blocks].flatten(0, 1)[:n].transpose(0, 1) for t in (caches[0].keys, caches[0].values))
        assert torch.equal(k[:, -1], turned[b, H : H + K]) and torch.equal(v[:, -1], turned[b, H + K :])
        expected = F.scaled_dot_product_attention(turned[b, :H, None], k, v, scale=0.3, enable_gqa=True)[:, 0]
        torch.testing.assert_close(got[b], expected, rtol=1e-5, atol=1e-6)


def test_of_rows_that_the_host_knows() -> None:
    cache = KVCache(KVShape(1, K, E, torch.float32, torch.device("cpu")), 20, PAGE)
    core = PagedDecode.of(cache, [[3, 1], [7]], [6, 4])
    assert core.block_table_BN.tolist() == [[3, 1], [7, 0]] and core.block_table_BN.dtype == torch.int32
    assert core.positions_B.tolist() == [5, 3] and core.lengths_B.tolist() == [6, 4]
    assert core.positions_B.dtype == core.lengths_B.dtype == torch.int32
