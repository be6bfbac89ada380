"""A sampling step on a GPU, at 128,256 tokens: the trainer's bits, kept sets, chi-square, races, CUDA graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pronghorn.kernels.linear_logprob import chosen_logprobs
from pronghorn.kernels.logits import logit_stats_
from pronghorn.kernels.reference import sample as reference
from pronghorn.kernels.sample import sample_step
from pronghorn.kernels.sample_state import FULL, NOT_A_NUMBER, RUNS, RowSettings, SampleState, Variant

V = 128256
ALL = Variant(True, True, True, True)
PLAIN = RowSettings(temperature=0.8)
KINDS = [
    PLAIN,
    RowSettings(top_p=0.95),
    RowSettings(temperature=0.6, top_k=50),
    RowSettings(top_k=1000, top_p=0.8),
    RowSettings(min_p=0.02, temperature=1.2),
    RowSettings(temperature=0.0),
    RowSettings(repetition_penalty=1.2, seen=range(0, V, 3), top_p=0.7),
    RowSettings(min_tokens=3, stop_ids=(5, V - 1)),
    RowSettings(presence_penalty=0.7, frequency_penalty=-0.4, generated=(7, 7, V - 1), temperature=0.9, top_p=0.9),
]


def _logits(B: int, spread: float = 3.0) -> torch.Tensor:
    """As a head gives them for bfloat16 hidden states: float32 sums of bfloat16 products."""
    hidden = torch.randn(B, 256, device="cuda").bfloat16()
    weight = (torch.randn(V, 256, device="cuda") * spread / 16).bfloat16()
    return torch.mm(hidden, weight.T, out_dtype=torch.float32)


def _with(row: RowSettings, **changes: Any) -> RowSettings:
    return RowSettings(**{**row.__dict__, **changes})


def _rows(B: int) -> list[RowSettings]:
    return [_with(KINDS[b % len(KINDS)], key=1000 * b + 7) for b in range(B)]


def _step(x: torch.Tensor, rows: list[RowSettings], variant: Variant | None = None, **options: Any) -> SampleState:
    wanted = Variant.of(rows, x.shape[1]) if variant is None else variant
    state = SampleState(len(rows), x.shape[1], 4, 4, "cuda", tallies=wanted.tallied)
    state.load(range(len(rows)), rows)
    sample_step(x, state, wanted, **options)
    return state


@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 30.0}], ids=str)
@pytest.mark.parametrize("v", [V, 151936, 262144, 50257, 8192, 1000, 7])
def test_policy_logps_have_the_trainers_bits(v: int, options: dict[str, Any]) -> None:
    """Every variant of the sampler beside every variant of the trainer's kernel."""
    B = 64
    x = torch.randn(B, v, device="cuda") * 4
    bias = torch.randn(v, device="cuda").bfloat16()
    for temperature in (1.0, 0.9, 0.37):
        rows = [RowSettings(temperature=temperature, key=b, top_k=40 * (b % 2)) for b in range(B)]
        for bias_V in (None, bias):
            for variant in (Variant(True), ALL):
                state = _step(x, rows, variant, bias_V=bias_V, **options)
                for more in ({}, {"with_entropy": True}, {"with_entropy": True, "gradient": torch.bfloat16}):
                    logps, _, _ = logit_stats_(
                        x.clone(), state.tokens_B, bias_V, temperature=temperature, **options, **more
                    )
                    assert torch.equal(state.policy_logps_B, logps), (variant, more)
        state = _step(x, [_with(r, top_k=0) for r in rows], Variant(), **options)
        logps, _, _ = logit_stats_(x.clone(), state.tokens_B, temperature=temperature, **options)
        assert torch.equal(state.policy_logps_B, logps) and torch.equal(state.token_logps_B, logps)


def test_the_whole_head_agrees() -> None:
    """The trainer scores hidden states; the sampler is given the same product."""
    hidden = torch.randn(128, 1024, device="cuda").bfloat16()
    weight = (torch.randn(V, 1024, device="cuda") / 16).bfloat16()
    rows = [RowSettings(temperature=0.7, key=b) for b in range(128)]
    state = _step(torch.mm(hidden, weight.T, out_dtype=torch.float32), rows)
    logps, _ = chosen_logprobs(hidden, weight, state.tokens_B, temperature=0.7)
    assert torch.equal(state.policy_logps_B, logps)


def test_statistics_against_float64() -> None:
    x, rows = _logits(64), _rows(64)
    state = _step(x, rows)
    temperature = state.temperature_B.double().unsqueeze(1)
    policy = (x.double() / temperature).log_softmax(-1).gather(1, state.tokens_B.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(state.policy_logps_B.double(), policy, rtol=0, atol=3e-6)
    theirs = SampleState(64, V, 4, 4, "cuda")
    theirs.load(range(64), rows)
    reference.sample_step(x, theirs, Variant.of(rows, V), None, None, 1.0, None)
    # A uniform number that falls within rounding (about 1e-7) of a token's edge may take the neighbour.
    same = state.tokens_B == theirs.tokens_B
    assert same.sum() >= 63
    torch.testing.assert_close(state.token_logps_B[same], theirs.token_logps_B[same], rtol=0, atol=5e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 10.0])
def test_what_is_kept_is_what_sorting_keeps(spread: float) -> None:
    """Few candidates and tens of thousands. A cumulative mass within rounding of p may keep one token more or less."""
    cuts = [
        {"top_k": k} for k in (1, 50, 2047, 2049, 100_000, V - 1)
    ] + [{"top_p": p} for p in (1e-7, 0.5, 0.9, 0.95, 0.999)] + [
        {"min_p": 0.1}, {"min_p": 0.05, "top_p": 0.9}, {"top_k": 200, "top_p": 0.7}, {"top_k": 50_000, "top_p": 0.95}
    ]  # fmt: skip
    rows = [RowSettings(**cut) for cut in cuts]
    for rounded in (False, True):
        x = _logits(1, spread).expand(len(rows), V).contiguous()
        x = x.bfloat16().float() if rounded else x
        state = _step(x, rows, ALL)
        bits = (x + 0.0).view(torch.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        ours = (keys >= state.scratch.cuts.unsqueeze(1)).sum(1)
        kept = reference.cut_(x.clone(), state, torch.arange(len(rows), device="cuda")) > -math.inf
        steps = torch.where(state.top_p_B < 1, 1, 0)
        if not rounded:
            assert ((ours - kept.sum(1)).abs() <= steps).all(), (ours, kept.sum(1))
        else:  # a step is all that are equal
            assert (ours - kept.sum(1))[steps == 0].abs().max() == 0


@pytest.mark.parametrize("kind", [PLAIN, RowSettings(top_k=30), RowSettings(top_p=0.8), RowSettings(temperature=1.5)])
def test_draws_follow_the_exact_distribution(kind: RowSettings) -> None:
    """Chi-square over 102,400 draws of one row, tokens of less than 20 expected draws in one bin."""
    B, draws = 256, 400
    x = _logits(1).expand(B, V).contiguous()
    state = SampleState(B, V, draws, 4, "cuda")
    state.load(range(B), [_with(kind, key=12345 + b) for b in range(B)])
    for _ in range(draws):
        sample_step(x, state, Variant.of([kind], V))
    y = x[:1] * state.inverse_temperature_B[0]
    probs = reference.cut_(y, state, torch.zeros(1, dtype=torch.int64, device="cuda"))[0].double().softmax(-1)
    counts = torch.bincount(state.out_tokens_BT.flatten().long(), minlength=V).double()
    assert counts[probs == 0].sum() == 0
    expected = probs * counts.sum()
    common = expected >= 20
    observed = torch.cat((counts[common], counts[~common].sum().view(1)))
    expected = torch.cat((expected[common], expected[~common].sum().view(1)))
    keep = expected > 0
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    freedom = (keep.sum() - 1).double()
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-4


def test_a_row_is_the_same_in_any_batch_twenty_times() -> None:
    x, rows = _logits(48), _rows(48)
    first = _step(x, rows, ALL)
    names = ("tokens_B", "token_logps_B", "policy_logps_B")
    for run in range(20):
        order = torch.randperm(48)[: 1 + 2 * run]
        state = _step(x[order.cuda()].contiguous(), [rows[i] for i in order])
        for name in names:
            assert torch.equal(getattr(state, name), getattr(first, name)[order.cuda()]), (name, run)


def test_a_graph_serves_rows_that_change_hands() -> None:
    """Captured once; settings written between replays hold; no wait for the device inside."""
    B = len(KINDS)
    x, rows = _logits(B), _rows(B)
    state = SampleState(B, V, 4, 4, "cuda")
    state.load(range(B), rows)
    sample_step(x, state, ALL)  # compiles
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            sample_step(x, state, ALL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for round_ in range(3):
        fresh = [_with(r, key=round_, top_k=3 + round_) for r in rows]
        state.load(range(B), fresh)
        x.copy_(_logits(B))
        for _ in range(4):
            graph.replay()
        other = SampleState(B, V, 4, 4, "cuda")
        other.load(range(B), fresh)
        for _ in range(4):
            sample_step(x, other, ALL)
        assert torch.equal(state.out_tokens_BT, other.out_tokens_BT)
        assert torch.equal(state.out_token_logps_BT, other.out_token_logps_BT)
        assert torch.equal(state.tally_BV[-1], other.tally_BV[-1]) and state.tally_BV[-1].sum() == 3 + 4
        kept = state.out_tokens_BT.clone()
        assert (state.finished_B == FULL).all()
        x.fill_(math.nan)
        graph.replay()
        assert torch.equal(state.out_tokens_BT, kept) and (state.finished_B == FULL).all()


@pytest.mark.parametrize("variant", [Variant(), ALL])
def test_not_a_number_ends_its_row_alone(variant: Variant) -> None:
    x = _logits(4)
    x[1, 77], x[2, V - 1] = math.nan, math.inf
    state = _step(x, [RowSettings(key=b, top_p=0.9) for b in range(4)], variant)
    assert state.finished_B.tolist() == [RUNS, NOT_A_NUMBER, NOT_A_NUMBER, RUNS]
    assert state.out_tokens_BT[1:3, 0].tolist() == [-1, -1] and state.policy_logps_B[1:3].isnan().all()


def test_rows_beyond_int32() -> None:
    """The last of 16,800 rows, whose logits lie past 2^31 elements."""
    B = (1 << 31) // V + 60
    x = torch.empty(B, V, device="cuda").normal_()
    rows = [RowSettings(key=b, top_k=20) for b in range(B)]
    state = _step(x, rows)
    alone = _step(x[-3:].clone(), rows[-3:])
    assert torch.equal(state.tokens_B[-3:], alone.tokens_B)
    assert torch.equal(state.token_logps_B[-3:], alone.token_logps_B)
