"""What is chosen: it fits, more memory is never slower, less memory never takes more, modes mean what they say."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.models.keep import Keep
from pronghorn.models.plan import CannotFit, LayerPlan, TrainingPlan, card_named, choose
from pronghorn.models.plan.constants import GIB, MEMORY_SLACK
from tests.models.plan.support import shape

H200 = card_named("H200")
SHAPES = {"nf4": shape(), "bf16": shape(load_in_4bit=False), "short": shape({"num_hidden_layers": 3})}


def plan(
    mode: str, gb: float, tokens: int = 16384, length: float = 2048, host_gb: float = 32, kind: str = "nf4"
) -> TrainingPlan:
    return choose(SHAPES[kind], H200, tokens, length, int(gb * GIB), int(host_gb * GIB), mode)


def or_none(mode: str, gb: float, **rest: object) -> TrainingPlan | None:
    try:
        return plan(mode, gb, **rest)  # type: ignore[arg-type]
    except CannotFit:
        return None


cases = st.fixed_dictionaries({
    "tokens": st.sampled_from([64, 1000, 4096, 16384, 65536]),
    "length": st.sampled_from([64, 2048, 65536]),
    "host_gb": st.sampled_from([0, 2, 64]),
    "kind": st.sampled_from(sorted(SHAPES)),
})  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(mode=st.sampled_from(["auto", "memory"]), gb=st.floats(3, 138), more=st.floats(0, 60), case=cases)
def test_more_memory_is_never_slower_and_less_never_takes_more(mode: str, gb: float, more: float, case: dict) -> None:
    small, large = or_none(mode, gb, **case), or_none(mode, gb + more, **case)
    if small is None:
        return
    assert large is not None
    assert small.fits and large.fits
    assert small.peak_bytes <= gb * GIB and large.peak_bytes <= (gb + more) * GIB
    assert small.host_bytes <= case["host_gb"] * GIB
    assert large.step_seconds <= small.step_seconds
    assert small.peak_bytes <= large.peak_bytes
    assert len(small.layers) == SHAPES[case["kind"]].layers
    assert not small.layers[-1].host  # its backward begins at once


@settings(max_examples=25, deadline=None)
@given(mode=st.sampled_from(["auto", "memory"]), gb=st.floats(1, 40), case=cases)
def test_what_does_not_fit_names_a_smallest_plan_that_is_over(mode: str, gb: float, case: dict) -> None:
    if or_none(mode, gb, **case) is not None:
        return
    with pytest.raises(CannotFit) as caught:
        plan(mode, gb, **case)
    smallest = caught.value.smallest
    assert not smallest.fits
    assert smallest.peak_bytes > 0.95 * gb * GIB
    assert or_none(mode, smallest.peak_bytes / GIB * 1.06, **case) is not None  # and there it fits


def test_free_memory_keeps_everything_and_the_base_in_16_bits() -> None:
    chosen = plan("auto", 138, tokens=4096)
    assert set(chosen.layers) == {LayerPlan(Keep.ALL)}
    assert chosen.cached_weights and chosen.mlp_rows is None
    assert not plan("auto", 138, tokens=4096, kind="bf16").cached_weights  # it is there already
    assert plan("off", 138, tokens=4096) == TrainingPlan(
        chosen.layers, None, True, 4096, chosen.peak_bytes, chosen.step_seconds, "off"
    )


def test_memory_offloads_what_the_link_hides_and_costs_little_more() -> None:
    chosen, least = plan("memory", 138), plan("auto", 6 + plan("memory", 138).peak_bytes / GIB)
    assert chosen.layers[0].host and chosen.host_bytes > GIB
    assert chosen.peak_bytes < 0.2 * plan("off", 138).peak_bytes
    assert chosen.step_seconds < 1.3 * plan("off", 138).step_seconds
    assert least.step_seconds <= chosen.step_seconds
    # No plan that leaves the GPU free is faster by more than the slack: all offloaded, whatever is kept.
    for keep in Keep:
        layers = (LayerPlan(keep, True),) * 31 + (LayerPlan(keep),)
        assert chosen.step_seconds <= (1 + MEMORY_SLACK) * seconds_of(layers)


def seconds_of(layers: tuple[LayerPlan, ...]) -> float:
    """Seconds of 16,384 tokens by the cost model, layer by layer, without the search."""
    from pronghorn.models.plan.cost import layer_seconds
    from pronghorn.models.plan.sizes import kept_bytes

    t = layer_seconds(SHAPES["nf4"], H200, 16384, 2048, None, False)
    kept = kept_bytes(SHAPES["nf4"], 16384)
    total = t.head + t.rest
    for layer in layers:
        moved = kept[layer.keep] if layer.host else 0
        beside = moved / H200.copy
        total += max(t.forward + beside, moved / H200.link)
        total += max(t.backward + t.again[layer.keep] + beside, moved / H200.link)
    return total


def test_the_time_of_a_plan_is_the_sum_over_its_layers() -> None:
    chosen = plan("auto", 30)
    assert chosen.mlp_rows is None and not chosen.cached_weights
    assert chosen.step_seconds == pytest.approx(seconds_of(chosen.layers), rel=1e-9)
    assert len(set(chosen.layers)) > 1


def test_without_host_memory_layers_are_recomputed() -> None:
    chosen = plan("memory", 138, host_gb=0)
    assert chosen.host_bytes == 0 and not any(layer.host for layer in chosen.layers)
    assert chosen.layers[0].keep in (Keep.INPUT, Keep.CORE)
    assert chosen.peak_bytes > plan("memory", 138).peak_bytes


def test_long_rows_are_tiled_and_their_attention_is_not_recomputed() -> None:
    chosen = plan("memory", 138, tokens=65536, length=65536, host_gb=64)
    assert chosen.mlp_rows in (4096, 8192)
    assert all(layer.keep is not Keep.INPUT for layer in chosen.layers)


def test_off_keeps_everything_even_where_it_does_not_fit_and_says_so() -> None:
    chosen = plan("off", 20, tokens=65536)
    assert set(chosen.layers) == {LayerPlan(Keep.ALL)} and not chosen.cached_weights
    assert not chosen.fits and "does not fit" in chosen.line()


def test_equal_calls_choose_equally_and_quickly() -> None:
    assert plan("auto", 40) == plan("auto", 40)
    begun = time.perf_counter()
    for _ in range(5):
        plan("auto", 40)
    assert (time.perf_counter() - begun) / 5 < 0.25  # about 15 ms on an idle core


def test_layers_without_a_fused_path_are_whole_or_recomputed() -> None:
    from dataclasses import replace

    chosen = choose(replace(SHAPES["nf4"], fused=False), H200, 16384, 2048, 40 * GIB, 64 * GIB, "auto")
    assert {layer.keep for layer in chosen.layers} == {Keep.INPUT, Keep.ALL}
    assert not any(layer.host for layer in chosen.layers) and chosen.mlp_rows is None
