"""A micro-batch's graph goes with its own backward: the next one never finds it in memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.grpo.support import pronghorn_model, trainer

ACCUMULATION, STEPS = 3, 2


class Saved:
    """A tensor that the graph holds for its backward."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def on_a_graph() -> list[torch.Tensor]:
    """Tensors of a graph that Python can reach."""
    gc.collect()
    return [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.grad_fn is not None]


def left_behind(folder: Path, keep: str | None = None, **settings: Any) -> list[tuple[int, int, int]]:
    """As each micro-batch but the first begins: losses of earlier ones, tensors on a graph, and saved tensors.

    Args:
        keep: "loss" keeps each loss, "graph" also what its backward would have freed: what the test must see.
    """
    made = trainer(
        folder, pronghorn_model(), per_device_train_batch_size=4, gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS, **settings,
    )  # fmt: skip
    before = {id(t) for t in on_a_graph()}  # of other tests
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()
    losses: list[weakref.ref[torch.Tensor]] = []
    kept: list[torch.Tensor] = []
    found: list[tuple[int, int, int]] = []
    micro_step, backward = made._micro_step, made.accelerator.backward

    def pack(tensor: torch.Tensor) -> Saved:
        held = Saved(tensor)
        saved.add(held)
        return held

    def watched(model: Any) -> torch.Tensor:
        if losses:  # before anything is collected: a graph must not wait for the collector either
            alive = sum(loss() is not None for loss in losses)
            count = len(saved)
            found.append((alive, sum(id(t) not in before for t in on_a_graph()), count))
        with saved_tensors_hooks(pack, lambda held: held.tensor):
            return micro_step(model)

    def noted(loss: torch.Tensor, **kwargs: Any) -> None:
        losses.append(weakref.ref(loss))
        if keep is not None:
            kept.append(loss)
        backward(loss, retain_graph=keep == "graph", **kwargs)

    made._micro_step, made.accelerator.backward = watched, noted
    made.train()
    assert len(losses) == ACCUMULATION * STEPS and len(found) == len(losses) - 1
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_a_micro_batch_is_alive_when_the_next_begins(tmp_path: Path, checkpointing: bool) -> None:
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing, "beta": 0.04, "entropy_coef": 0.01}
    assert left_behind(tmp_path, **settings) == [(0, 0, 0)] * 5


def test_what_is_kept_is_seen(tmp_path: Path) -> None:
    """The control: a loss that somebody holds, and one with its whole graph."""
    losses = left_behind(tmp_path / "loss", keep="loss")
    assert [alive for alive, _, _ in losses] == [1, 2, 3, 4, 5]
    assert all(reachable >= alive for alive, reachable, _ in losses)
    graphs = left_behind(tmp_path / "graph", keep="graph")
    counts = [saved for _, _, saved in graphs]
    assert counts[0] > 5 and counts == sorted(set(counts))
