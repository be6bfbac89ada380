"""The steps that the long-context benchmark times, on a tiny model: they train, and pack the prompt once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.long_context import case_of, grpo_loss, sft_loss, step
from pronghorn.config.load import LoadConfig
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.models import unwrap
from tests.helpers import tiny_llama


@pytest.mark.parametrize("task", ["sft", "grpo"])
def test_a_step_trains_the_adapters(tmp_path: Path, task: str) -> None:
    folder = tiny_llama(tmp_path, vocab_size=16001)
    model, _ = from_pretrained(LoadConfig(str(folder), load_in_4bit=True))
    model = get_peft_model(model, r=4)
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    rows: list[list[int]] = []
    walk = unwrap(model).model.layers[0].forward

    def seen(hidden: torch.Tensor, **given: object) -> torch.Tensor:
        rows.append(given["packed_attention"].row_lengths)  # type: ignore[attr-defined]
        return walk(hidden, **given)

    unwrap(model).model.layers[0].forward = seen
    loss = sft_loss(model, 33) if task == "sft" else grpo_loss(model, 5, 3, 7)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    assert step(loss, optimizer, trained) > 0
    assert rows[0] == ([33] if task == "sft" else [5, 6, 6, 6])
    changed = [not torch.equal(a, b) for a, b in zip(before, trained)]
    assert sum(changed) == len(trained) // 2  # B moves from 0; A's gradient is 0 at first
    torch.nn.init.constant_(trained[1], float("nan"))
    with pytest.raises(FloatingPointError, match="nan"):
        step(loss, optimizer, trained)


def test_a_case_counts_what_is_trained_on() -> None:
    from types import SimpleNamespace

    sizes = {"tokens": 102400, "prompt": 1024, "completions": 8, "length": 20000}
    assert case_of(SimpleNamespace(task="sft", **sizes)) == ("long-context/sft/1x102400", 102400)
    assert case_of(SimpleNamespace(task="grpo", **sizes)) == ("long-context/grpo/1024+8x20000", 160000)
