"""GRPO's memory is flat over steps: what lives after the last one is what lived after the first few."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.grpo.support import pronghorn_model, trainer


def live_bytes() -> int:
    """Memory of all tensors that Python can reach, each storage once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout == torch.strided and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    """Memory of this process, as the system counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


class Weigh(TrainerCallback):
    """Memory after some steps."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at = at
        self.live: list[int] = []
        self.resident: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.at:
            self.live.append(live_bytes())
            self.resident.append(resident_bytes())


def run(folder: Path, steps: int, keep_share: float, first: int = 5, lengths: tuple[int, ...] = (2,)) -> Weigh:
    """Completions of 1 to 12 tokens, by the native engine.

    Args:
        first: step that the end is compared with.
        lengths: numbers that are summed in the prompts. With one length the cache has one size from the first step on.
    """
    weigh = Weigh((first, steps))
    texts = [f"What is {' plus '.join(str(i) for i in range(n))}?" for n in lengths]
    rows = Dataset.from_dict({"prompt": [texts[i % len(texts)] for i in range(40)]})
    made = trainer(
        folder, pronghorn_model(), data=rows, max_steps=steps, callbacks=[weigh], learning_rate=1e-3,
        per_device_train_batch_size=8, rollout_keep_share=keep_share, beta=0.01,
    )  # fmt: skip
    made.sampling._engine = None
    made.train()
    assert (made.sampling.engine.cache is None) == (keep_share == 0.0)
    return weigh


@pytest.mark.parametrize("keep_share", [0.1, 0.0], ids=["kept", "given-back"])
def test_memory_ends_where_step_5_was(tmp_path: Path, keep_share: float) -> None:
    weigh = run(tmp_path, 20, keep_share)
    first, last = weigh.live
    # Packed batches of other lengths differ by some bytes; one leaked micro-batch is more than this.
    assert last <= first + 1024, (first, last)


@pytest.mark.slow
def test_memory_after_500_steps_is_that_of_step_50(tmp_path: Path) -> None:
    """Prompts of 9 to 95 tokens; by step 50 the cache has met the longest of them."""
    weigh = run(tmp_path, 500, 0.1, first=50, lengths=(1, 3, 9, 2, 14, 5, 7, 11))
    first, last = weigh.live
    assert last <= first + 1024, (first, last)
    assert weigh.resident[1] <= weigh.resident[0] * 1.02, weigh.resident
