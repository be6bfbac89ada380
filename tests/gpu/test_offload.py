"""Activations through host memory on a GPU: the same bits back, whatever runs beside; gradients as if kept."""

from __future__ import annotations

import gc

import pytest
import torch

from pronghorn.lora.projection import row_columns, table
from pronghorn.models.attention import PackedAttention
from pronghorn.models.fused_block import Saving, fused_block
from pronghorn.models.keep import Keep
from pronghorn.models.offload import HostStore, Stored
from pronghorn.models.parts import read_parts
from tests.gpu.test_fused_block import error, layer_under_lora


def store() -> HostStore:
    return HostStore(torch.device("cuda", torch.cuda.current_device()))


def test_what_comes_back_is_what_went_out_while_its_memory_is_written_over() -> None:
    own = store()
    torch.manual_seed(0)
    for step in range(3):
        sums: list[torch.Tensor] = []
        stored: list[Stored] = []
        for layer in range(8):
            torch.cuda._sleep(2_000_000 if (layer + step) % 3 == 0 else 100_000)
            tensors = [torch.randn(1 << 20, device="cuda"), None, torch.randn(999, 77, device="cuda").bfloat16()]
            sums.append(torch.stack([t.double().sum() for t in tensors if t is not None]))
            stored.append(own.save(tensors))
            del tensors
            torch.full((1 << 20,), float("nan"), device="cuda")  # takes freed memory at once, if it is free
        for layer in reversed(range(8)):
            torch.cuda._sleep(100_000 if (layer + step) % 3 == 0 else 2_000_000)
            a, nothing, b = stored[layer].take()
            assert nothing is None and a is not None and b is not None
            assert torch.equal(torch.stack([a.double().sum(), b.double().sum()]), sums[layer])
            torch.full((1 << 20,), float("nan"), device="cuda")
    assert own.memory.used == 0


def test_a_table_leaves_and_comes_back_without_being_packed_on_the_gpu() -> None:
    own = store()
    made = table(1000, 1424, torch.bfloat16, torch.device("cuda"))  # as gate and up lie at ranks 4, 8 and 16
    made.normal_()
    expected = made.clone()
    assert not made.is_contiguous()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    stored = own.save([made])
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    del made
    (back,) = stored.take()
    assert back is not None and back.shape == expected.shape and torch.equal(back, expected)
    assert back.stride(0) == row_columns(1424)
    part = torch.randn(100, 4096, device="cuda")[:, 64:1000]  # no table: packed
    (back,) = own.save([part]).take()
    assert back is not None and torch.equal(back, part)
    assert own.memory.used == 0


def test_a_dropped_graph_gives_its_memory_back_and_a_second_backward_is_refused() -> None:
    own = store()
    one = own.save([torch.ones(1 << 16, device="cuda")])
    two = own.save([torch.ones(1 << 16, device="cuda")])
    two.prefetch()
    del one, two
    gc.collect()
    assert own.memory.used == 0
    three = own.save([torch.full((1 << 16,), 3.0, device="cuda")])
    (back,) = three.take()
    assert back is not None and bool((back == 3).all())
    with pytest.raises(RuntimeError, match="backward ran twice"):
        three.take()


def test_a_copy_in_that_was_dropped_writes_to_no_memory_that_others_took() -> None:
    own = store()
    one = own.save([torch.full((1 << 20,), 3.0, device="cuda")])
    own.settle()
    torch.cuda.synchronize()
    with torch.cuda.stream(own.back):
        torch.cuda._sleep(200_000_000)  # the copy comes late
    one.prefetch()
    del one
    gc.collect()
    others = [torch.zeros(1 << 20, device="cuda") for _ in range(4)]
    torch.cuda.synchronize()
    assert not any(bool(t.any()) for t in others)


@pytest.mark.parametrize("keep", list(Keep))
def test_gradients_are_those_of_tensors_kept_on_the_gpu(keep: Keep) -> None:
    model, layer = layer_under_lora(64)
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str)
    lengths = [512, 300, 1]
    hidden = torch.randn(sum(lengths), 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positions = torch.cat([torch.arange(n) for n in lengths]).cuda()
    cos, sin = model.get_base_model().model.rotary_emb(hidden, position_ids=positions[None])
    attention = PackedAttention(lengths, "cuda")
    own = store()
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run(saving: Saving) -> list[torch.Tensor]:
        x = hidden
        for _ in range(5):
            x = fused_block(parts, parts.rounded(x.dtype), x, (cos[0], sin[0]), attention, saving)
        return [x.detach(), *torch.autograd.grad(x.float().square().sum(), [hidden, *trained])]

    kept, offloaded = run(Saving(keep)), run(Saving(keep, own))
    assert torch.equal(kept[0], offloaded[0])
    for a, b in zip(offloaded[1:], kept[1:]):
        assert error(a, b.double()) < 5e-3  # attention's backward adds in any order
    assert own.memory.used == 0
    tiled = run(Saving(keep, own, mlp_rows=256))
    for a, b in zip(tiled, kept):
        assert error(a, b.double()) < 2e-2


def test_kept_tensors_leave_the_gpu() -> None:
    model, layer = layer_under_lora(64)
    parts = read_parts(layer, "silu")
    assert not isinstance(parts, str)
    groups = parts.rounded(torch.bfloat16)
    T, layers = 4096, 24
    hidden = torch.randn(T, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cos, sin = model.get_base_model().model.rotary_emb(hidden, position_ids=torch.arange(T, device="cuda")[None])
    attention, own = PackedAttention([T], "cuda"), store()

    def walk(count: int) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        x = hidden
        for _ in range(count):
            x = fused_block(parts, groups, x, (cos[0], sin[0]), attention, Saving(Keep.ATTENTION, own))
        x.float().sum().backward()
        return torch.cuda.max_memory_allocated() - before

    walk(2)
    few, many = walk(4), walk(layers)
    assert many <= few + hidden.nbytes, f"{layers} layers peaked at {many} bytes, 4 at {few}"
