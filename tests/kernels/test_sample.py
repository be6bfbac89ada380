"""A sampling step: both paths against the definitions in float64, what is kept, what is drawn, and a row's books."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pronghorn.kernels import logits as logits_module
from pronghorn.kernels import logits_triton, sample_state, sample_triton
from pronghorn.kernels import sample as module
from pronghorn.kernels.logits import logit_stats_
from pronghorn.kernels.reference import logits as logits_reference
from pronghorn.kernels.reference import sample as reference
from pronghorn.kernels.row_stats_triton import Partition
from pronghorn.kernels.sample import sample_step
from pronghorn.kernels.sample_state import RowSettings, SampleState, Variant
from tests.helpers import chi_square

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 301  # 5 blocks of 64 lanes, the last not full; 2 groups, 10 chunks of 32
ALL = Variant(True, True, True, True)
RUNS, STOPPED, FULL = sample_state.RUNS, sample_state.STOPPED, sample_state.FULL
NOT_A_NUMBER, EMPTY = sample_state.NOT_A_NUMBER, sample_state.EMPTY


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device; the kernels in small parts, so that few logits make many."""
    triton_path = request.param == "triton"
    monkeypatch.setattr(module, "_path", lambda tensor: sample_triton if triton_path else reference)
    monkeypatch.setattr(logits_module, "_path", lambda tensor: logits_triton if triton_path else logits_reference)
    for kernel in (sample_triton, logits_triton):
        monkeypatch.setattr(kernel, "partition", lambda V: Partition(64, -(-V // 64), 32))
    monkeypatch.setattr(sample_triton, "_ROOM", 64)
    return request.param


def step(x: torch.Tensor, rows: Sequence[RowSettings], variant: Variant | None = None, **options: Any) -> SampleState:
    state = SampleState(len(rows), x.shape[1], 8, 4, DEVICE)
    state.load(range(len(rows)), rows)
    sample_step(x, state, Variant.of(rows, x.shape[1]) if variant is None else variant, **options)
    return state


def logits(B: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return (torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * spread).to(DEVICE)


def exact(x: torch.Tensor, r: RowSettings) -> torch.Tensor:
    """The distribution that a row draws from, by the definitions, in float64, with sorting."""
    y = x.double().cpu().clone()
    if r.count < r.min_tokens:
        y[list(r.stop_ids)] = -math.inf
    for i in set(r.seen) if r.repetition_penalty != 1 else ():
        y[i] = y[i] / r.repetition_penalty if y[i] > 0 else y[i] * r.repetition_penalty
    for i in set(r.generated) if r.tallied else ():
        y[i] -= r.frequency_penalty * list(r.generated).count(i) + r.presence_penalty
    y = y / (r.temperature or 1.0)
    if r.temperature == 0:
        return y.softmax(-1)
    probs = y.softmax(-1)
    y[probs < r.min_p * probs.max()] = -math.inf
    if r.top_k > 0:
        y[y < y.sort(descending=True).values[min(r.top_k, len(y)) - 1]] = -math.inf
    probs, order = y.softmax(-1).sort(descending=True)
    y[order[probs.cumsum(-1) - probs >= r.top_p]] = -math.inf
    return y.softmax(-1)


ROWS = [
    RowSettings(),
    RowSettings(temperature=0.7, top_p=0.9),
    RowSettings(top_k=5),
    RowSettings(temperature=0.0, repetition_penalty=1.3, seen=(1, 2, 300)),
    RowSettings(min_p=0.05),
    RowSettings(min_p=0.01, top_p=0.8),
    RowSettings(top_k=200, top_p=0.95),
    RowSettings(temperature=1.5, top_k=150),
    RowSettings(repetition_penalty=0.6, seen=range(0, V, 2), min_tokens=3, stop_ids=(4, 8)),
    RowSettings(repetition_penalty=1.8, seen=range(V), top_k=40, top_p=0.5, min_p=0.001, temperature=0.4),
    RowSettings(top_p=1e-6),
    RowSettings(top_k=1),
    RowSettings(top_p=0.999),
    RowSettings(presence_penalty=1.5, generated=(300, 7, 7, 31), temperature=0.6),
    RowSettings(frequency_penalty=-0.7, generated=(5, 9, 9, 9), top_k=50),
    RowSettings(
        repetition_penalty=1.2, seen=range(0, V, 3), presence_penalty=-0.5, frequency_penalty=0.8,
        generated=(0, 3, 3, 64, 64, 64), top_p=0.9, temperature=1.4, count=6, max_tokens=8,
    ),
    RowSettings(temperature=0.0, frequency_penalty=2.0, presence_penalty=2.0, generated=range(0, V, 2)),
]  # fmt: skip


@pytest.mark.parametrize("spread", [0.02, 1.0, 4.0])
def test_logprobs_are_those_of_the_exact_distribution(path: str, spread: float) -> None:
    rows = [RowSettings(**{**r.__dict__, "key": 77 * b + 5}) for b, r in enumerate(ROWS)]
    x = logits(len(rows), 1, spread)
    state = step(x, rows)
    for b, r in enumerate(rows):
        probs, token = exact(x[b], r), int(state.tokens_B[b])
        assert probs[token] > 0, (b, token)
        assert state.token_logps_B[b].item() == pytest.approx(math.log(probs[token]), abs=3e-6), b
        policy = (x[b].double() / (r.temperature or 1)).log_softmax(-1)[token]
        assert state.policy_logps_B[b].item() == pytest.approx(policy.item(), abs=3e-6), b


def test_both_paths_draw_the_same_tokens(path: str) -> None:
    """The same place of the cumulative distribution in the order of ids, but for rounding at a token's edge."""
    if path == "reference":
        return
    rows = [RowSettings(**{**r.__dict__, "key": 1000 * b + 1}) for b, r in enumerate(ROWS * 2)]
    x = logits(len(rows), 2, 2.0)
    ours = step(x, rows)
    theirs = SampleState(len(rows), V, 8, 4, DEVICE)
    theirs.load(range(len(rows)), rows)
    reference.sample_step(x, theirs, Variant.of(rows, V), None, None, 1.0, None)
    assert torch.equal(ours.tokens_B, theirs.tokens_B)
    assert len(ours.tokens_B.unique()) > 15
    torch.testing.assert_close(ours.token_logps_B, theirs.token_logps_B, rtol=0, atol=3e-6)
    assert torch.equal(ours.seen_BW, theirs.seen_BW) and torch.equal(ours.tally_BV, theirs.tally_BV)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"temperature": 1.4, "top_k": 9, "top_p": 0.85, "min_p": 0.04},
        {"temperature": 0.8, "top_k": 10, "repetition_penalty": 1.4, "seen": (0, 3, 8)},
        {"presence_penalty": 0.9, "frequency_penalty": -0.6, "generated": (2, 2, 2, 5, 11), "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 100])
def test_the_reference_draws_the_exact_distribution(settings: dict[str, Any], steps: int) -> None:
    """Chi-square over 20,000 draws, so many in a row with one key. At a temperature a fifth higher it would be another
    distribution."""
    draws, few = 20_000, 12
    x = torch.randn(few, generator=torch.Generator().manual_seed(3)) * 1.5
    state = SampleState(draws, few, steps, 4)
    rows = [RowSettings(**settings, key=7919 * (b // steps), count=b % steps) for b in range(draws)]
    state.load(range(draws), rows)
    variant = Variant.of(rows[:1], few)
    reference.sample_step(x.expand(draws, few), state, variant, None, None, 1.0, None)
    counts = torch.bincount(state.tokens_B, minlength=few).double()
    assert chi_square(counts, exact(x, rows[0])) > 1e-4
    warmer = {**settings, "temperature": settings.get("temperature", 1.0) * 1.2}
    assert chi_square(counts, exact(x, RowSettings(**warmer))) < 1e-4


def kept(x: torch.Tensor, rows: Sequence[RowSettings]) -> torch.Tensor:
    """Which tokens the kernel left to draw from."""
    state = step(x, rows, ALL)
    y = x * state.inverse_temperature_B.unsqueeze(1)
    bits = (y + 0.0).view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (keys >= state.scratch.cuts[: len(rows)].unsqueeze(1)) & (x > -math.inf)


def reference_kept(x: torch.Tensor, rows: Sequence[RowSettings]) -> torch.Tensor:
    state = SampleState(len(rows), V, 8, 4, DEVICE)
    state.load(range(len(rows)), rows)
    y = x * state.inverse_temperature_B.unsqueeze(1)
    return reference.cut_(y, state, torch.arange(len(rows), device=DEVICE)) > -math.inf


def adversarial() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    normal = torch.randn(V, generator=generator)
    one_hot = torch.full((V,), -30.0)
    one_hot[77] = 30.0
    masked = torch.full((V,), -math.inf)
    masked[[3, 200, 300]] = torch.tensor([1.0, 1.0, -2.0])
    two = torch.where(torch.arange(V) % 7 == 0, 2.0, -1.0)
    return {
        "normal": normal * 3, "narrow": normal * 1e-3, "wide": normal * 200, "flat": torch.zeros(V), "one hot": one_hot,
        "masked": masked, "two values": two, "bfloat16": (normal * 3).bfloat16().float(), "far": normal + 3000,
        "far below": normal - 1e6, "huge": normal * 1e30, "zeros": torch.where(normal > 0, 0.0, -0.0),
        "neighbours": 1 + torch.arange(V).flip(0) * 2.0**-23,
    }  # fmt: skip


CUTS = [
    {"top_k": k} for k in (1, 2, 40, 63, 64, 65, 150, V - 1)
] + [{"top_p": p} for p in (1e-7, 0.3, 0.55, 0.9, 0.999)] + [
    {"min_p": 0.3}, {"min_p": 1.0}, {"min_p": 1e-3}, {"min_p": 0.2, "top_p": 0.77}, {"top_k": 100, "top_p": 0.61},
    {"top_k": 3, "top_p": 0.97}, {"top_k": 30, "top_p": 0.9, "min_p": 0.02}, {"top_p": 0.9, "temperature": 0.35},
    {"top_k": 7, "temperature": 0.0, "top_p": 0.2},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cuts"),
    [(name, CUTS[i % 5 :: 5]) for i, name in enumerate(adversarial())]
    + [pytest.param(name, CUTS, marks=pytest.mark.slow) for name in adversarial()],
    ids=lambda value: value if isinstance(value, str) else "all" if value is CUTS else "some",
)
def test_what_is_kept_is_what_sorting_keeps(path: str, name: str, cuts: list[dict[str, Any]]) -> None:
    """Ties, one value alone, steps of one ulp, more candidates than are gathered at once, masked tokens."""
    if path == "reference":
        return
    rows = [RowSettings(**cut) for cut in cuts]
    x = adversarial()[name].to(DEVICE).expand(len(rows), V).contiguous()
    ours, theirs = kept(x, rows), reference_kept(x, rows)
    for b, cut in enumerate(cuts):
        assert torch.equal(ours[b], theirs[b]), (cut, ours[b].sum(), theirs[b].sum())


@pytest.mark.parametrize("wrong", [-3, 3])
def test_a_wrong_first_guess_changes_nothing(path: str, wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts by level only say where to begin: shifted by three levels, what is kept is the same."""
    if path == "reference":
        return
    rows = [RowSettings(**cut) for cut in CUTS[2::4]]
    x = logits(1, 3).expand(len(rows), V).contiguous()
    plain = sample_triton._launch_draw

    def shifted(grid: Any, *args: Any, **options: Any) -> None:
        above = next(a for a in args if isinstance(a, torch.Tensor) and a.dim() == 3)
        above.copy_(above.roll(wrong, -1))
        plain(grid, *args, **options)

    monkeypatch.setattr(sample_triton, "_launch_draw", shifted)
    assert torch.equal(kept(x, rows), reference_kept(x, rows))


MAPS: list[dict[str, Any]] = [{}, {"scale": 0.25, "softcap": 4.0}, {"scale": 3.0}]


@pytest.mark.parametrize("options", MAPS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_policy_logps_have_the_trainers_bits(path: str, options: dict[str, Any], biased: bool) -> None:
    """What the trainer's kernel gives for the same logits and tokens, in every variant, at several temperatures."""
    bias = logits(1, 8)[0] if biased else None
    temperature = 1.3 if biased else 0.7 if options else 1.0
    rows = [RowSettings(**{**r.__dict__, "key": b, "temperature": temperature}) for b, r in enumerate(ROWS[::4])]
    x = logits(len(rows), 4)
    for variant in (ALL, Variant()) if path == "triton" else (ALL,):
        state = step(x, rows, variant, bias_V=bias, **options)
        logps, _, _ = logit_stats_(x.clone(), state.tokens_B, bias, temperature=temperature, **options)
        assert torch.equal(state.policy_logps_B, logps)
        wide, _, _ = logit_stats_(
            x.clone(), state.tokens_B, bias, temperature=temperature, with_entropy=True, gradient=torch.float16,
            **options,
        )  # fmt: skip
        assert torch.equal(wide, logps)


def test_the_trainers_bits_at_the_real_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_path", lambda tensor: sample_triton)
    monkeypatch.setattr(logits_module, "_path", lambda tensor: logits_triton)
    x = (torch.randn(1, 8200, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE)
    state = step(x, [RowSettings(temperature=0.9, key=3)])
    logps, _, _ = logit_stats_(x, state.tokens_B, temperature=0.9)
    assert torch.equal(state.policy_logps_B, logps)
    assert logps.item() == pytest.approx((x[0].double() / 0.9).log_softmax(-1)[state.tokens_B[0]].item(), abs=3e-6)


def results(state: SampleState, b: int) -> list[float]:
    return [state.tokens_B[b].item(), state.token_logps_B[b].item(), state.policy_logps_B[b].item()]


def test_a_row_is_the_same_in_any_batch_order_and_variant(path: str) -> None:
    rows = [RowSettings(**{**r.__dict__, "key": 31 * b}) for b, r in enumerate(ROWS[:9:2])]
    x = logits(len(rows), 5)
    together = step(x, rows)
    turned = step(x.flip(0).contiguous(), rows[::-1])
    for b, r in enumerate(rows):
        alone = step(x[b : b + 1].contiguous(), [r])
        assert results(alone, 0) == results(together, b) == results(turned, len(rows) - 1 - b)


def test_a_row_of_nothing_but_temperature_has_one_logprob(path: str) -> None:
    """Beside any neighbours: its own log-probability is the policy's, to the last bit."""
    for variant in (Variant(), ALL):
        state = step(logits(3, 6), [RowSettings(temperature=0.8, key=b) for b in range(3)], variant)
        assert torch.equal(state.token_logps_B, state.policy_logps_B)


def test_greedy_takes_the_first_of_the_likeliest(path: str) -> None:
    x = logits(4, 7)
    x[0, [299, 17, 40]] = 20.0
    x[1] = 0.0
    x[2, 300] = 21.0
    x[3] = -5.0
    x[3, [64, 65]] = -1.0
    state = step(x, [RowSettings(temperature=0.0, top_k=3, top_p=0.1, min_p=0.5)] * 4, ALL)
    assert state.tokens_B.tolist() == [17, 0, 300, 64] == x.argmax(-1).tolist()
    torch.testing.assert_close(state.token_logps_B, x.log_softmax(-1).amax(-1), rtol=0, atol=3e-6)


def test_numbers_are_splitmix64s(path: str) -> None:
    """Over equal logits a token is a uniform number's first digits; these are a reference implementation's."""
    published = [6457827717110365317, 3203168211198807973]  # of the state 1234567
    x = torch.zeros(2, V, device=DEVICE)
    state = step(x, [RowSettings(key=1234567, count=i) for i in range(2)])
    assert state.tokens_B.tolist() == [number * V >> 64 for number in published]


def test_tokens_of_probability_zero_are_never_drawn(path: str) -> None:
    x = torch.full((12, V), -math.inf, device=DEVICE)
    x[:, [4, 290]] = torch.tensor([1.0, 2.0], device=DEVICE)
    state = step(x, [RowSettings(key=b) for b in range(12)])
    assert set(state.tokens_B.tolist()) == {4, 290}


def test_a_rows_books(path: str) -> None:
    """Counts, slots, lengths and ends over six steps, and rows that ended keep all that they had."""
    x = torch.full((4, V), -9.0, device=DEVICE)
    x[:, 7] = 9.0
    rows = [
        RowSettings(temperature=0.0, max_tokens=3, position=10),
        RowSettings(temperature=0.0, stop_ids=(9, 7), min_tokens=2, max_tokens=6, position=20),  # 7 is forbidden twice
        RowSettings(temperature=0.0, max_tokens=6, count=4, position=30),
        RowSettings(temperature=0.0, stop_ids=(7,), position=40),
    ]
    state = step(x, rows)
    fields = ("counts_B", "positions_B", "slots_B", "lengths_B", "finished_B")

    def books() -> list[list[int]]:
        return [getattr(state, name).tolist() for name in fields]

    assert books() == [[1, 1, 5, 1], [11, 21, 31, 41], [11, 21, 31, -1], [12, 22, 32, 0], [RUNS, RUNS, RUNS, STOPPED]]
    assert state.tokens_B.tolist() == [7, 0, 7, 7]
    for _ in range(2):
        sample_step(x, state, Variant.of(rows, V))
    ended = [[3, 3, 6, 1], [13, 23, 32, 41], [-1] * 4, [0] * 4, [FULL, STOPPED, FULL, STOPPED]]
    assert books() == ended
    assert state.out_tokens_BT.tolist() == [
        [7, 7, 7] + [-1] * 5, [0, 0, 7] + [-1] * 5, [-1] * 4 + [7, 7, -1, -1], [7] + [-1] * 7
    ]  # fmt: skip
    tensors = {name: t.clone() for name, t in vars(state).items() if isinstance(t, torch.Tensor)}
    for garbage in (x + 1, torch.full_like(x, math.nan)):
        sample_step(garbage, state, ALL)
    for name, before in tensors.items():
        torch.testing.assert_close(getattr(state, name), before, rtol=0, atol=0, msg=name)


def test_logprobs_are_written_where_their_tokens_are(path: str) -> None:
    rows = [RowSettings(top_p=0.9, key=b, max_tokens=4) for b in range(3)]
    state = SampleState(3, V, 4, 4, DEVICE)
    state.load(range(3), rows)
    for t in range(4):
        sample_step(logits(3, 20 + t), state, Variant(True))
        for out, last in ((state.out_tokens_BT, state.tokens_B), (state.out_token_logps_BT, state.token_logps_B),
                          (state.out_policy_logps_BT, state.policy_logps_B)):  # fmt: skip
            assert torch.equal(out[:, t], last.to(out.dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, "masked"])
@pytest.mark.parametrize("variant", [Variant(), ALL])
def test_logits_without_a_distribution_end_their_row_alone(path: str, bad: float | str, variant: Variant) -> None:
    x = logits(3, 10)
    if bad == "masked":
        x[1] = -math.inf
    else:
        x[1, 150] = bad
    rows = [RowSettings(key=b, position=5) for b in range(3)]
    if variant.truncated:
        rows = [RowSettings(key=b, position=5, top_k=20, top_p=0.8) for b in range(3)]
    state = step(x, rows, variant)
    assert state.finished_B.tolist() == [RUNS, NOT_A_NUMBER, RUNS]
    assert state.out_tokens_BT[1, 0] == -1 and state.tokens_B[1] == 0
    assert state.token_logps_B.isnan().tolist() == state.policy_logps_B.isnan().tolist() == [False, True, False]
    assert state.lengths_B.tolist() == [7, 0, 7] and state.slots_B[1] == -1


def test_a_penalty_sees_what_was_drawn(path: str) -> None:
    """Each step forbids, as good as, what came before, the id in the sign bit of its word included."""
    x = torch.full((1, V), -9.0, device=DEVICE)
    order = [31, 300, 64, 2]
    x[0, order] = torch.tensor([8.0, 7.0, 6.0, 5.0], device=DEVICE)
    rows = [RowSettings(temperature=0.0, repetition_penalty=100.0, seen=(5,))]
    state = step(x, rows)
    for _ in range(3):
        sample_step(x, state, Variant.of(rows, V))
    assert state.out_tokens_BT[0, :4].tolist() == order
    assert reference.seen(state.seen_BW.cpu(), V)[0].nonzero().flatten().tolist() == sorted([5, *order])


@pytest.mark.parametrize(
    "penalty, expected",
    [
        ("presence_penalty", [31, 300, 31, 31, 31, 31]),  # 8, 7, 6; then 6.5, 7, 6; then 6.5, 5.5, 6 for ever
        ("frequency_penalty", [31, 300, 31, 64, 300, 31]),  # and 5, 5.5, 6; 5, 5.5, 4.5; 5, 4, 4.5
    ],
)
def test_presence_counts_once_and_frequency_each_time(path: str, penalty: str, expected: list[int]) -> None:
    """Three tokens one apart, 1.5 less for what was said. A prompt says nothing. A row that joins later with what it
    said before, in a used row at that, goes on as it would have.
    """
    x = torch.full((1, V), -99.0, device=DEVICE)
    x[0, [31, 300, 64]] = torch.tensor([8.0, 7.0, 6.0], device=DEVICE)
    settings: dict[str, Any] = {"temperature": 0.0, "seen": (31, 31), penalty: 1.5}
    rows = [RowSettings(**settings)]
    state = step(x, rows)
    for _ in range(5):
        sample_step(x, state, Variant.of(rows, V))
    assert state.out_tokens_BT[0, :6].tolist() == expected
    assert {v: n for v, n in enumerate(state.tally_BV[0].tolist()) if n} == {v: expected.count(v) for v in expected}
    for at in range(1, 6):
        later = RowSettings(**settings, count=at, generated=expected[:at])
        state.load([0], [later])
        sample_step(x, state, Variant.of([later], V))
        assert state.tokens_B.tolist() == [expected[at]]


def test_a_row_without_penalties_is_the_same_beside_rows_that_have_them(path: str) -> None:
    """Also where the one before it in its row had them, and drew."""
    x = logits(2, 13)
    state = step(x, [RowSettings(frequency_penalty=2.0, generated=range(V // 2), key=b) for b in range(2)])
    assert (state.token_logps_B != state.policy_logps_B).all()
    plain = [RowSettings(key=8), RowSettings(key=9)]
    state.load([0, 1], plain)
    sample_step(x, state, ALL)
    alone = step(x, plain)
    assert [results(state, b) for b in range(2)] == [results(alone, b) for b in range(2)]
    assert torch.equal(state.token_logps_B, state.policy_logps_B)


def test_rows_of_the_state_are_named(path: str) -> None:
    """Logits of rows 3 and 1, one left out: the others keep what they have."""
    rows = [RowSettings(key=b, position=b) for b in range(4)]
    x = logits(3, 11)
    state = SampleState(4, V, 8, 4, DEVICE)
    state.load(range(4), rows)
    sample_step(x, state, Variant(), rows_N=torch.tensor([3, -1, 1], dtype=torch.int32, device=DEVICE))
    straight = step(x[[0, 2]].contiguous(), [rows[3], rows[1]])
    assert state.counts_B.tolist() == [0, 1, 0, 1]
    assert results(state, 3) == results(straight, 0) and results(state, 1) == results(straight, 1)


def test_rows_change_hands_in_place(path: str) -> None:
    """A state is one set of addresses; a row that nobody owns draws nothing."""
    state = SampleState(3, V, 8, 4, DEVICE)
    assert state.finished_B.tolist() == [EMPTY] * 3
    addresses = {name: t.data_ptr() for name, t in vars(state).items() if isinstance(t, torch.Tensor)}
    x = logits(3, 12)
    state.load([2, 0], [RowSettings(key=1, position=4), RowSettings(key=2, top_k=3)])
    sample_step(x, state, ALL)
    assert state.counts_B.tolist() == [1, 0, 1] and state.out_tokens_BT[1, 0] == -1
    state.clear([2])
    state.load([0], [RowSettings(key=3)])
    sample_step(x, state, ALL)
    assert state.counts_B.tolist() == [1, 0, 1] and state.slots_B.tolist() == [1, -1, -1]
    assert results(state, 0) == results(step(x[:1].contiguous(), [RowSettings(key=3)]), 0)
    assert addresses == {name: t.data_ptr() for name, t in vars(state).items() if isinstance(t, torch.Tensor)}


def test_the_least_variant_that_serves() -> None:
    assert Variant.of([RowSettings(), RowSettings(temperature=0.0, top_k=3)], V) == (False, False, False, False)
    assert Variant.of([RowSettings(top_k=V, top_p=1.0)], V) == Variant()
    assert Variant.of([RowSettings(top_k=V - 1)], V).truncated
    assert Variant.of([RowSettings(repetition_penalty=1.1, temperature=0.0)], V) == (False, True, False, False)
    assert Variant.of([RowSettings(min_tokens=2, stop_ids=(1,))], V).held
    assert not Variant.of([RowSettings(min_tokens=2, stop_ids=(1,), count=2)], V).held
    for penalty in ({"presence_penalty": -0.1}, {"frequency_penalty": 0.1}):
        assert Variant.of([RowSettings(), RowSettings(temperature=0.0, **penalty)], V) == (False, False, False, True)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"x_NV": torch.ones(2, V).half()}, "float16"),
        ({"x_NV": torch.ones(V, 2).T}, "dense"),
        ({"x_NV": torch.ones(2, V + 1)}, "do not fit a state"),
        ({"x_NV": torch.ones(3, V)}, "do not fit a state"),
        ({"rows_N": torch.zeros(2).long()}, "int32"),
        ({"bias_V": torch.zeros(3)}, "bias has shape"),
        ({"softcap": 0.0}, "softcap=0"),
        ({"variant": Variant(penalised=True)}, "penalties=True"),
        ({"variant": Variant(tallied=True)}, "tallies=True"),
    ],
)
def test_what_does_not_fit_is_refused(bad: dict[str, Any], message: str) -> None:
    state = SampleState(2, V, 8, 2, penalties=False, tallies=False)
    with pytest.raises(ValueError, match=message):
        sample_step(**{"x_NV": torch.ones(2, V), "state": state, "variant": Variant(), **bad})


@pytest.mark.parametrize(
    "row, message",
    [
        (RowSettings(max_tokens=9), "max_tokens=9"),
        (RowSettings(count=8), "max_tokens=9"),
        (RowSettings(stop_ids=(1, 2, 3)), "stop_ids=3"),
        (RowSettings(repetition_penalty=1.1), "penalties=True"),
        (RowSettings(presence_penalty=1.1), "presence_penalty=1.1, frequency_penalty=0.0.*tallies=True"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: RowSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleState(2, V, 8, 2, penalties=False, tallies=False).load([0], [row])
