"""Slots of host memory: never two over the same bytes, and a step's pattern needs no more memory the second time."""

from __future__ import annotations

import random

import torch

from pronghorn.models.host_memory import HostMemory, Slot


def overlaps(a: Slot, b: Slot) -> bool:
    return a.segment == b.segment and a.start < b.start + b.size and b.start < a.start + a.size


def test_random_taking_and_giving_never_overlaps_and_all_comes_back() -> None:
    memory = HostMemory(pinned=False, segment=1 << 16)
    rng, held = random.Random(0), list[Slot]()
    for _ in range(2000):
        if held and rng.random() < 0.48:
            memory.give(held.pop(rng.randrange(len(held))))
        else:
            new = memory.take(rng.choice([1, 513, 4096, 20000, 70000]))
            assert not any(overlaps(new, old) for old in [*held, *memory.free])
            held.append(new)
        assert memory.used == sum(slot.size for slot in held)
    for slot in held:
        memory.give(slot)
    assert memory.used == 0
    assert len(memory.free) == len(memory.segments)  # neighbours have joined


def test_steps_of_one_pattern_reserve_once() -> None:
    memory = HostMemory(pinned=False, segment=1 << 16)
    for step in range(5):
        slots = [memory.take(size) for _ in range(32) for size in (3000, 500, 12000)]
        for slot in reversed(slots):
            memory.give(slot)
        if step == 0:
            reserved = memory.reserved
    assert memory.reserved == reserved


def test_a_view_is_over_the_slot_and_keeps_bits() -> None:
    memory = HostMemory(pinned=False, segment=1 << 12)
    memory.take(100)
    slot = memory.take(3 * 5 * 2)
    x = torch.randn(3, 5).to(torch.bfloat16)
    memory.view(slot, (3, 5), torch.bfloat16).copy_(x)
    assert torch.equal(memory.view(slot, (3, 5), torch.bfloat16), x)
    assert memory.take(1 << 13).segment == 1  # larger than a segment: one of its own
