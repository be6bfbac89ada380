"""Every attention path of the GPU in bfloat16: error against float64, rows apart, shared prefixes, no waiting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels import attention_merge, shared_prefix
from pronghorn.kernels.attention import Path
from pronghorn.kernels.reference import attention_merge as merge_reference
from pronghorn.models.attention import PackedAttention
from tests.models.test_attention import visible

BF16 = torch.bfloat16
UNEVEN = [300, 1, 511, 64, 129]
GROUPS: list[tuple[list[int], list[int | None]]] = [
    ([256, 200, 130, 1, 77], [None, 0, 0, 0, 0]),  # one group: views
    ([100, 64, 199, 50, 1, 33, 300, 2, 2], [None, 0, 0, None, 3, 3, None, 6, 6]),
    ([17, 5, 9, 40], [None, 0, 0, None]),
    ([3, 1, 4, 1], [None, 0, None, 2]),  # one query a span
]


def normal(T: int, H: int, K: int, E: int, dtype: torch.dtype = BF16) -> list[torch.Tensor]:
    torch.manual_seed(T + E)
    return [torch.randn(T, n, E, device="cuda").to(dtype) for n in (H, K, K)]


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def torchs(inputs: Sequence[torch.Tensor], do: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype) -> list:
    """Output and gradients of torch's own attention with a dense mask."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
    q, k, v = (t.transpose(0, 1)[None] for t in leaves)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    backend = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel(backend.MATH if dtype == torch.float64 else backend.EFFICIENT_ATTENTION):
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen.to("cuda")[None, None])[0].transpose(0, 1)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))]


def ours(attention: PackedAttention, inputs: Sequence[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
    scale = inputs[0].shape[-1] ** -0.5
    o, stats = attention.forward(*inputs, scale)
    return [o, *attention.backward(do, *inputs, o, stats, scale)]


def check(attention: PackedAttention, inputs: Sequence[torch.Tensor], seen: torch.Tensor) -> None:
    """Relative norm below 1e-2, and at most 1.5 times torch's own."""
    do = torch.randn_like(inputs[0])
    exact = torchs(inputs, do, seen, torch.float64)
    theirs = torchs(inputs, do, seen, inputs[0].dtype)
    for name, got, peer, truth in zip(("o", "dq", "dk", "dv"), ours(attention, inputs, do), theirs, exact):
        assert got.dtype == inputs[0].dtype and got.shape == truth.shape
        wrong, bound = error(got, truth), 1.5 * error(peer, truth)
        assert wrong < 1e-2 and wrong <= bound, (name, wrong, bound)


def path(attention: PackedAttention, dtype: torch.dtype, head_dim: int) -> Path:
    return attention.choice(dtype, head_dim).path


def needs_hopper() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is chosen on Hopper and newer")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("H", "K"), [(8, 8), (8, 2)])
def test_cudnn(head_dim: int, H: int, K: int) -> None:
    needs_hopper()
    attention = PackedAttention([512, 512], "cuda")
    assert path(attention, BF16, head_dim) is Path.CUDNN
    check(attention, normal(1024, H, K, head_dim), visible([512, 512]))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize(("H", "K"), [(8, 8), (8, 2)])
def test_flash_on_uneven_rows(head_dim: int, H: int, K: int) -> None:
    attention = PackedAttention(UNEVEN, "cuda")
    if path(attention, BF16, head_dim) is not Path.FLASH:
        pytest.skip(attention.choice(BF16, head_dim).reason)
    check(attention, normal(sum(UNEVEN), H, K, head_dim), visible(UNEVEN))


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [1, 2, 1], [200], [127, 127]], ids=str)
def test_flash_on_short_rows(lengths: list[int]) -> None:
    inputs = normal(sum(lengths), 8, 2, 64)
    attention = PackedAttention(lengths, "cuda")
    assert path(attention, BF16, 64) is Path.FLASH
    check_without_peer(attention, inputs, visible(lengths))


def check_without_peer(attention: PackedAttention, inputs: list[torch.Tensor], seen: torch.Tensor) -> None:
    """For rows of one token: there dq and dk are 0, of which no error is a share."""
    do = torch.randn_like(inputs[0])
    exact = torchs(inputs, do, seen, torch.float64)
    for got, truth in zip(ours(attention, inputs, do), exact):
        assert (got.double() - truth).norm() <= 1e-2 * truth.norm().clamp(min=do.norm().double() * 0.1)


@pytest.mark.parametrize("window", [1, 64, 300])
def test_windows(window: int) -> None:
    attention = PackedAttention(UNEVEN, "cuda", window=window)
    assert path(attention, BF16, 64) is Path.FLASH
    check_without_peer(attention, normal(sum(UNEVEN), 8, 2, 64), visible(UNEVEN, window=window))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("lengths", "prefix"), GROUPS, ids=str)
@pytest.mark.parametrize("copies", [True, False], ids=["copied", "in-two-parts"])
def test_shared_prefix(
    lengths: list[int], prefix: list[int | None], head_dim: int, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not copies:
        monkeypatch.setattr(shared_prefix, "GATHER", 0)
    attention = PackedAttention(lengths, "cuda", prefix)
    assert attention.shared is not None and (attention.shared.gathered is not None) == copies
    check(attention, normal(sum(lengths), 8, 2, head_dim), visible(lengths, prefix))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "bound"), [(torch.float32, 64, 1e-6), (BF16, 320, 1e-2), (BF16, 36, 1e-2)], ids=str
)
def test_what_the_fused_kernels_do_not_take(dtype: torch.dtype, head_dim: int, bound: float) -> None:
    lengths, prefix = GROUPS[1]
    for attention, seen in (
        (PackedAttention(UNEVEN, "cuda"), visible(UNEVEN)),
        (PackedAttention(lengths, "cuda", prefix), visible(lengths, prefix)),
    ):
        assert path(attention, dtype, head_dim) is Path.REFERENCE
        inputs = normal(seen.shape[0], 4, 2, head_dim, dtype)
        do = torch.randn_like(inputs[0])
        exact = torchs(inputs, do, seen, torch.float64)
        assert all(error(got, truth) < bound for got, truth in zip(ours(attention, inputs, do), exact))


CASES = {
    "cudnn": ([512, 512, 512], None, slice(512, 1024)),
    "flash": (UNEVEN, None, slice(301, 812)),
    "prefix": ([100, 64, 199, 50, 3, 33], [None, 0, 0, None, 3, 3], slice(363, 449)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_are_apart_to_the_bit(case: str) -> None:
    """Other numbers in one row or group: the rest keeps its bits; dq nearly, as flash and cuDNN add it in any order."""
    if case == "cudnn":
        needs_hopper()
    lengths, prefix, changed = CASES[case]
    attention = PackedAttention(lengths, "cuda", prefix)
    inputs = normal(sum(lengths), 8, 2, 128)
    do = torch.randn_like(inputs[0])
    before = ours(attention, inputs, do)
    rest = torch.ones(sum(lengths), dtype=torch.bool, device="cuda")
    rest[changed] = False
    for fill in (3.0, float("nan")):
        other = [t.clone() for t in inputs]
        for t in other:
            t[changed] = torch.randn_like(t[changed]) * fill
        o, dq, dk, dv = ours(attention, other, do)
        for got, same in ((o, before[0]), (dk, before[2]), (dv, before[3])):
            assert torch.equal(got[rest], same[rest])
        assert error(dq[rest], before[1][rest].double()) < 4e-3
        assert o[changed].isnan().any() == (fill != fill)


def test_completions_do_not_see_each_other() -> None:
    lengths, prefix = [100, 64, 199, 50], [None, 0, 0, 0]
    attention = PackedAttention(lengths, "cuda", prefix)
    inputs = normal(sum(lengths), 8, 2, 128)
    before = attention.forward(*inputs, 0.1)[0]
    for t in inputs:
        t[164:363] = float("nan")
    after = attention.forward(*inputs, 0.1)[0]
    assert torch.equal(after[:164], before[:164]) and torch.equal(after[363:], before[363:])


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES)
def test_the_host_never_waits(case: str) -> None:
    lengths, prefix, _ = CASES[case]
    inputs = [t.requires_grad_() for t in normal(sum(lengths), 8, 2, 128)]
    PackedAttention(lengths, "cuda", prefix)(0, *inputs, 0.1).sum().backward()  # libraries load, plans are built
    with no_waiting():
        PackedAttention(lengths, "cuda", prefix)(0, *inputs, 0.1).sum().backward()


def test_inputs_cut_from_one_projection() -> None:
    """q, k and v as slices of one tensor, and an expanded gradient."""
    for lengths in (UNEVEN, [512, 512]):
        whole = torch.randn(sum(lengths), 12, 128, device="cuda").to(BF16)
        inputs = [t.detach().requires_grad_() for t in whole.split([8, 2, 2], dim=1)]
        do = torch.ones(1, 1, 1, device="cuda", dtype=BF16).expand(sum(lengths), 8, 128)
        o = PackedAttention(lengths, "cuda")(0, *inputs, 0.1)
        strided = torch.autograd.grad(o, inputs, do)
        packed = [t.detach().contiguous() for t in inputs]
        attention = PackedAttention(lengths, "cuda")
        plain, stats = attention.forward(*packed, 0.1)
        assert torch.equal(o, plain)
        for got, same in zip(strided, attention.backward(do.contiguous(), *packed, plain, stats, 0.1)):
            assert error(got, same.double()) < 4e-3


@pytest.mark.parametrize("E", [64, 80, 128])
def test_merge_of_many_rows(E: int) -> None:
    """The kernel against plain PyTorch in bfloat16; rows that do not merge keep their bits."""
    T, H, N = 5000, 32, 3777
    index = torch.randperm(T, device="cuda")[:N]
    o, part = (torch.randn(n, H, E, device="cuda").to(BF16) for n in (T, N))
    lse, part_lse = (torch.randn(H, n, device="cuda") * 5 for n in (T, N))
    part_lse[:, 7] = float("-inf")
    results = []
    for merge in (attention_merge.merge_, merge_reference.merge_):
        mine, mine_lse = o.clone(), lse.clone()
        merge(mine, mine_lse, part, part_lse, index)
        results.append((mine, mine_lse))
    (mine, mine_lse), (exact, exact_lse) = results
    torch.testing.assert_close(mine, exact, rtol=2**-7, atol=1e-6)
    assert (mine != exact).float().mean() < 1e-3  # halves that round the other way
    torch.testing.assert_close(mine_lse, exact_lse, rtol=1e-6, atol=1e-6)
    rest = torch.ones(T, dtype=torch.bool, device="cuda").index_fill(0, index, False)
    assert torch.equal(mine[rest], o[rest]) and torch.equal(mine_lse[:, rest], lse[:, rest])
    added, expected = o.clone(), o.float().index_add(0, index, part.float()).to(BF16)
    attention_merge.add_rows_((added, part, index))
    assert torch.equal(added, expected)
