"""The peak of a plan against a walk through its step, layer by layer, and the line that tells of it."""

from __future__ import annotations

import pytest

from pronghorn.models.keep import Keep
from pronghorn.models.plan import LayerPlan, TrainingPlan, card_named, choose
from pronghorn.models.plan.constants import GIB, OFFLOADS_COMING, OFFLOADS_LEAVING
from pronghorn.models.plan.sizes import layer_sizes
from tests.models.plan.support import shape

H200 = card_named("H200")


def walked(plan: TrainingPlan) -> int:
    """The most bytes of 16,384 tokens in a step, one moment after the other."""
    model = shape()
    sizes = layer_sizes(model, 16384, plan.mlp_rows, plan.cached_weights)
    held = model.fixed_bytes + sizes.step + (model.cached_bytes if plan.cached_weights else 0)
    gradient = model.trained_bytes // model.layers
    offloaded = max((sizes.kept[layer.keep] for layer in plan.layers if layer.host), default=0)
    here = [0 if layer.host else sizes.kept[layer.keep] for layer in plan.layers]
    moments = []
    for at, layer in enumerate(plan.layers):
        moments.append(sum(here[:at]) + sizes.forward[layer.keep] + OFFLOADS_LEAVING * offloaded)
    moments.append(sum(here) + sizes.head + OFFLOADS_LEAVING * offloaded)
    for at, layer in reversed(list(enumerate(plan.layers))):
        moving = (OFFLOADS_COMING if layer.host else OFFLOADS_LEAVING) * offloaded
        moments.append(sum(here[:at]) + sizes.backward[layer.keep] + (model.layers - at) * gradient + moving)
    return held + max(moments)


@pytest.mark.parametrize("mode, gb", [("off", 138), ("auto", 138), ("auto", 40), ("auto", 12), ("memory", 138)])
@pytest.mark.parametrize("host_gb", [0, 5, 64])
def test_the_peak_is_the_widest_moment_of_the_step(mode: str, gb: int, host_gb: int) -> None:
    plan = choose(shape(), H200, 16384, 2048, gb * GIB, host_gb * GIB, mode)
    assert plan.peak_bytes == pytest.approx(walked(plan), rel=1e-9)
    kept = layer_sizes(shape(), 16384, None, False).kept
    assert plan.host_bytes == sum(kept[layer.keep] for layer in plan.layers if layer.host)


def test_what_lies_there_already_is_counted_instead_of_the_shapes_own_bytes() -> None:
    plans = [choose(shape(), H200, 4096, 2048, 138 * GIB, 0, "off", held_bytes=held) for held in (GIB, 3 * GIB)]
    assert plans[1].peak_bytes - plans[0].peak_bytes == 2 * GIB


def test_the_line_says_tokens_layers_peak_time_and_card() -> None:
    layers = (LayerPlan(Keep.ATTENTION, True),) * 24 + (LayerPlan(Keep.ALL),) * 8
    plan = TrainingPlan(
        layers, 4096, True, 4096, int(6.8 * GIB), 0.312, "auto", host_bytes=3 * GIB, card="NVIDIA H200",
        total_bytes=int(139.8 * GIB),
    )  # fmt: skip
    assert plan.line() == (
        "Pronghorn plan: 4,096 tokens, 32 layers: 24 keep attention (offloaded), 8 keep all, MLP in tiles of 4,096 "
        "rows, base held in 16 bits; peak 6.8 of 139.8 GB, 3.0 GB pinned on the host, 0.31 s a step (NVIDIA H200)"
    )
    assert plan.tokens_per_second == pytest.approx(4096 / 0.312)
    guessed = TrainingPlan(layers[-2:], card="L4", estimated=True, fits=False).line()
    assert "(L4, estimated)" in guessed and "does not fit" in guessed and "\n" not in guessed
    assert TrainingPlan(layers[:1]).line().endswith("1 layers: 1 keep attention (offloaded)")
