"""Bytes against a count by hand, and against what the fused layer really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.models import attach
from pronghorn.models.checkpointing import set_plans
from pronghorn.models.keep import Keep
from pronghorn.models.plan import LayerPlan
from pronghorn.models.plan.read import read_shape
from pronghorn.models.plan.sizes import kept_bytes, layer_sizes
from tests.models.plan.support import shape
from tests.models.test_fused_block import adapted

NOT_KEPT = ("rope", "parts", "attention", "saving", "groups")  # of the step, or of the model


def test_kept_bytes_of_an_8b_llama_by_hand() -> None:
    kept = kept_bytes(shape(), 4096)
    lows, lse = 4096 * 7 * 32 * 2, 4096 * 32 * 4
    x = q = 4096 * 4096 * 2
    k = x // 4
    assert kept[Keep.INPUT] == x + lows
    assert kept[Keep.CORE] == x + q + lse + lows
    assert kept[Keep.ATTENTION] == 2 * x + 2 * q + 2 * k + lse + lows
    assert kept[Keep.ALL] == kept[Keep.ATTENTION] + 4096 * (2 * 14336 + 2 * 32) * 2  # room for g of gate and up


def test_a_layer_never_holds_less_than_it_keeps_and_tiles_make_it_smaller() -> None:
    whole, tiled = layer_sizes(shape(), 65536, None, False), layer_sizes(shape(), 65536, 4096, False)
    for level in Keep:
        assert whole.forward[level] > whole.kept[level] and whole.backward[level] > whole.kept[level]
        assert (tiled.backward[level] < whole.backward[level]) == (level is not Keep.ALL)
    cached = layer_sizes(shape(), 4096, None, True)
    assert cached.forward[Keep.INPUT] < layer_sizes(shape(), 4096, None, False).forward[Keep.INPUT]


def held(node: Any) -> int:
    """Bytes of the storages that an autograd node of ours keeps, parameters and the step's own tensors apart."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def look(thing: Any) -> None:
        if id(thing) in seen:
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            if not isinstance(thing, torch.nn.Parameter):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, list | tuple):
            for part in thing:
                look(part)

    look(node.saved_tensors)
    for name, value in vars(node).items():
        if name not in NOT_KEPT:
            look(value)
    return sum(storages.values())


@pytest.mark.parametrize("keep", list(Keep))
def test_the_fused_layer_keeps_what_the_plan_counts(keep: Keep) -> None:
    model = adapted()
    base = model.get_base_model()
    attach(base)
    set_plans(base.model.layers, LayerPlan(keep))
    nodes = []
    base.model.layers[1].register_forward_hook(lambda _, __, out: nodes.append(out.grad_fn))
    rows, length = 3, 16
    ids = torch.randint(3, 101, (rows, length))
    model(input_ids=ids, labels=ids)
    (node,) = nodes
    assert "FusedBlock" in type(node).__name__
    assert held(node) == kept_bytes(read_shape(model), rows * length)[keep]
