"""The sampler against plain formulas, and its draws against the exact distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.config.sampling import SamplingParams
from pronghorn.rollout.native import random as counter
from pronghorn.rollout.native.request import Prompt, Sequence
from pronghorn.rollout.native.sampler import sample
from pronghorn.rollout.native.sampling_rows import SamplingRows
from tests.helpers import chi_square

V = 12


def row(params: SamplingParams, *, seed=0, index=0, prompt=(0, 1), output=(), stop=(3, 4)) -> Sequence:
    sequence = Sequence(0, 0, index, Prompt(list(prompt)), params, 99, seed, frozenset(stop))
    sequence.output = list(output)
    return sequence


def rows(sequences: list[Sequence], vocab: int = V) -> SamplingRows:
    return SamplingRows(sequences, vocab, torch.device("cpu"))


def exact(
    logits: torch.Tensor, p: SamplingParams, seen: set[int], forbidden: set[int], output: tuple[int, ...] = ()
) -> torch.Tensor:
    """The distribution by the definitions, one row, float64, with sorting."""
    x = logits.double().clone()
    for i in forbidden:
        x[i] = -math.inf
    for i in seen:
        x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
    for i in output:
        x[i] -= p.frequency_penalty
    for i in set(output):
        x[i] -= p.presence_penalty
    x = x / p.temperature
    probs = x.softmax(-1)
    x[probs < p.min_p * probs.max()] = -math.inf
    if p.top_k > 0:
        x[x < x.sort(descending=True).values[min(p.top_k, len(x)) - 1]] = -math.inf
    probs, order = x.softmax(-1).sort(descending=True)
    before = probs.cumsum(-1) - probs
    x[order[before >= p.top_p]] = -math.inf
    return x.softmax(-1)


settings_of_a_request = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.05]),
    top_k=st.sampled_from([0, -1, 1, 3, 50]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 1.1, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.6, -0.3]),
    min_tokens=st.sampled_from([0, 2]),
)


@settings(max_examples=100, deadline=None)
@given(params=st.lists(settings_of_a_request, min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_logprobs_are_those_of_the_exact_distribution(params, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(params), V, generator=generator) * 2
    sequences = [row(p, seed=seed, index=b, output=(5, 6, 5)[: b % 4]) for b, p in enumerate(params)]
    drawn = sample(logits, rows(sequences))
    for b, (p, s) in enumerate(zip(params, sequences)):
        forbidden = {3, 4} if len(s.output) < p.min_tokens else set()
        probs = exact(logits[b], p, {0, 1, *s.output}, forbidden, tuple(s.output))
        token = int(drawn.tokens_B[b])
        assert probs[token] > 0
        assert drawn.token_logps_B[b].item() == pytest.approx(math.log(probs[token]), abs=2e-5)
        policy = (logits[b] / p.temperature).log_softmax(-1)[token]
        assert drawn.policy_logps_B[b].item() == pytest.approx(policy.item(), abs=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.9),
        SamplingParams(top_k=5, min_p=0.02, repetition_penalty=1.5),
        SamplingParams(min_tokens=3),
    ],
)
@pytest.mark.parametrize("along", ["seed", "index", "position"])
def test_draws_follow_the_exact_distribution(params, along):
    """Chi-square over 20,000 draws, whichever of seed, sample and position tells the rows apart."""
    draws = 20_000
    logits = torch.randn(V) * 1.5
    sequences = [
        row(params, seed=b if along == "seed" else 7, index=b if along == "index" else 0) for b in range(draws)
    ]
    batch = rows(sequences)
    if along == "position":
        batch.positions_B += torch.arange(draws)
        if batch.early is not None:
            batch.early = (batch.early[0], batch.early[1], batch.early[2] + draws)
    tokens = sample(logits.expand(draws, V), batch).tokens_B
    probs = exact(logits, params, {0, 1}, {3, 4} if params.min_tokens else set())
    assert chi_square(torch.bincount(tokens, minlength=V).double(), probs) > 1e-4


def test_chi_square_can_fail():
    probs = torch.full((V,), 1 / V, dtype=torch.float64)
    skewed = torch.full((V,), 1000.0, dtype=torch.float64)
    skewed[0] += 300
    assert chi_square(skewed, probs) < 1e-4


def test_a_row_draws_the_same_beside_any_neighbours():
    logits = torch.randn(40, 300)
    sequences = [row(SamplingParams(temperature=0.5 + b / 40), seed=b) for b in range(40)]
    together = sample(logits, rows(sequences, 300)).tokens_B
    alone = [int(sample(logits[b : b + 1], rows([sequences[b]], 300)).tokens_B) for b in range(40)]
    assert together.tolist() == alone
    odd = SamplingParams(top_k=2, top_p=0.5, min_p=0.3, repetition_penalty=2.0)
    beside = sample(logits, rows([*sequences[:39], row(odd)], 300)).tokens_B
    assert beside[:39].tolist() == alone[:39]


def test_streams_do_not_repeat_each_other():
    keys = torch.tensor([counter.stream_key(s, i) for s in range(50) for i in range(4)])
    positions = torch.arange(100)
    numbers = counter.uniforms(keys.repeat_interleave(100), positions.repeat(200))
    assert numbers.unique().numel() == numbers.numel()
    assert numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)


def test_the_tensor_hash_is_splitmix64():
    key = counter.stream_key(123, 4)
    for position in (0, 1, 77):
        expected = counter.mix((key % 2**64) + (position + 1) * counter.GOLDEN) >> 11
        got = counter.uniforms(torch.tensor([key]), torch.tensor([position])).item()
        assert got == expected * 2.0**-53
    # first outputs of the reference implementation for the state 1234567
    state = torch.tensor([1234567]).repeat(2)
    published = [6457827717110365317, 3203168211198807973]
    assert counter.uniforms(state, torch.arange(2)).tolist() == [(x >> 11) * 2.0**-53 for x in published]


def test_greedy_rows_take_the_likeliest_penalised_token():
    logits = torch.tensor([[2.0, 1.9, 1.0, 5.0, 0, 0, 0, 0, 0, 0, 0, 0]])
    greedy = SamplingParams(temperature=0, repetition_penalty=4.0, min_tokens=1, top_k=1)
    drawn = sample(logits, rows([row(greedy)]))
    assert drawn.tokens_B.tolist() == [2]  # 0 and 1 are penalised, 3 would end it too early
    assert drawn.policy_logps_B.item() == pytest.approx(logits.log_softmax(-1)[0, 2].item())
    mixed = sample(
        logits.repeat(3, 1), rows([row(greedy), row(SamplingParams(seed=1)), row(SamplingParams(temperature=0))])
    )
    assert mixed.tokens_B[0] == 2 and mixed.tokens_B[2] == 3


def test_presence_counts_once_and_frequency_each_time():
    """Over what was said, not the prompt; the same for a row that joins the batch with what it said before."""
    logits = torch.full((1, V), -99.0)
    logits[0, [7, 8, 9]] = torch.tensor([8.0, 7.0, 6.0])
    for penalty, expected in {"presence": [7, 8, 7, 7, 7, 7], "frequency": [7, 8, 7, 9, 8, 7]}.items():
        params = SamplingParams(temperature=0, **{f"{penalty}_penalty": 1.5})
        batch, said = rows([row(params, prompt=(7, 7))]), []
        for _ in expected:
            drawn = sample(logits, batch)
            batch.advance(drawn.tokens_B)
            said += drawn.tokens_B.tolist()
        assert said == expected
        for at in range(6):
            joined = rows([row(params, prompt=(7, 7), output=expected[:at]), row(SamplingParams(temperature=0))])
            assert sample(logits.expand(2, V), joined).tokens_B.tolist() == [expected[at], 7]


def test_min_tokens_forbids_the_end_only_until_then():
    logits = torch.zeros(1, V)
    logits[0, 3] = 50.0
    params = SamplingParams(temperature=0, min_tokens=2)
    batch = rows([row(params)])
    ends = []
    for _ in range(4):
        drawn = sample(logits, batch)
        batch.advance(drawn.tokens_B)
        ends.append(int(drawn.tokens_B) == 3)
    assert ends == [False, False, True, True]


def test_alternatives_are_of_the_raw_logits():
    logits = torch.randn(2, V)
    params = SamplingParams(temperature=0.5, logprobs=3, max_tokens=4)
    drawn = sample(logits, rows([row(params), row(SamplingParams())]))
    raw = logits.log_softmax(-1)
    assert torch.equal(drawn.top_ids_BA, raw.topk(3).indices)
    torch.testing.assert_close(drawn.raw_logps_B, raw.gather(1, drawn.tokens_B[:, None])[:, 0])
    for b in range(2):
        order = raw[b].argsort(descending=True).tolist()
        assert order.index(int(drawn.tokens_B[b])) + 1 == drawn.ranks_B[b]


def test_tokens_of_probability_zero_are_never_drawn():
    logits = torch.full((1000, V), -math.inf)
    logits[:, 4] = logits[:, 9] = 1.0
    tokens = sample(logits, rows([row(SamplingParams(), seed=b) for b in range(1000)])).tokens_B
    assert set(tokens.tolist()) == {4, 9}


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_truncation_over_a_large_vocabulary(spread):
    """Flat rows need more than the candidates sorted first; a neighbour that does must not change the others."""
    vocab = 3000
    logits = torch.randn(5, vocab) * spread
    logits[4] *= 10
    settings_of = [
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=700, top_p=0.5),
        SamplingParams(top_k=40),
        SamplingParams(),
        SamplingParams(top_p=0.3),
    ]
    sequences = [row(p, seed=b) for b, p in enumerate(settings_of)]
    drawn = sample(logits, rows(sequences, vocab))
    for b, p in enumerate(settings_of):
        probs = exact(logits[b], p, set(), set())
        token = int(drawn.tokens_B[b])
        assert drawn.token_logps_B[b].item() == pytest.approx(math.log(probs[token]), abs=1e-4)
        alone = sample(logits[b : b + 1], rows([sequences[b]], vocab))
        assert torch.equal(alone.tokens_B, drawn.tokens_B[b : b + 1])
        assert torch.equal(alone.token_logps_B, drawn.token_logps_B[b : b + 1])
