"""Host memory over the mixed lengths that the GPU test trains on: what the first steps took serves all later ones."""

from __future__ import annotations

import pytest
import torch

from pronghorn.models.host_memory import HostMemory
from tests.gpu.test_flat_memory import BUCKETS, LAYERS, SEGMENT, STEPS, mixed_lengths, small_model, train


@pytest.mark.parametrize("seed", range(4))
def test_no_growth_after_step_50(seed: int) -> None:
    """Each layer's input, q, k, v, o, log-sum-exps and middle, given back from the last layer to the first."""
    memory, reserved = HostMemory(pinned=False, segment=SEGMENT), []
    for lengths in mixed_lengths(STEPS, seed):
        tokens = sum(lengths)
        sizes = [tokens * width * 2 for width in (256, 256, 128, 128, 256, 256)] + [tokens * 4 * 4]
        taken = [[memory.take(size) for size in sizes] for _ in range(LAYERS)]
        for slot in (slot for layer in reversed(taken) for slot in layer):
            memory.give(slot)
        reserved.append(memory.reserved)
        assert memory.used == 0
    assert reserved[-1] == reserved[49] >= 2 * SEGMENT


def test_lengths_are_mixed_and_fill_their_buckets() -> None:
    found = mixed_lengths(60)
    assert {len(rows) for rows in found} == {1, 2, 3, 4}
    assert all(n >= 1 for rows in found for n in rows)
    for step, rows in enumerate(found):
        most = BUCKETS[step % len(BUCKETS)]
        assert 0.8 * most - 1 <= sum(rows) <= most
    assert sum(found[5]) == BUCKETS[-1]
    assert len({tuple(rows) for rows in found}) > 55


def test_the_steps_train_and_hold_nothing() -> None:
    model = small_model("cpu")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    for _ in train(model, [[5, 9], [1, 20, 3]], "cpu", optimizer):
        assert all(p.grad is None for p in trained.values())
    assert any(not torch.equal(p, before[name]) for name, p in trained.items() if "lora_B" in name)
