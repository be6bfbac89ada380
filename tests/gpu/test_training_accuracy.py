"""Gradients and losses of whole models on a GPU in bfloat16: no further from float32 than HF + PEFT are.

What is compared with what, and why the peer runs under autocast: ``benchmarks/equal_models.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.equal_models import (
    Batch,
    Compared,
    EqualModels,
    Gradients,
    equal_models,
    gradients,
    loss_of,
    packed_rows,
    relative_errors,
    use_plan,
)
from benchmarks.training_accuracy import TINY, answered, curves, distances, noise, padded
from pronghorn.models.keep import Keep
from pronghorn.models.plan import LayerPlan, TrainingPlan
from tests.invariant.test_nan_and_inf import batch, check_gradients, check_grpo, check_inputs, check_weights, made

VOCABULARY = 5003
LENGTHS = [400, 1, 257, 366]
LAYERS = 4
MIXED = (
    LayerPlan(Keep.ATTENTION, host=True),
    LayerPlan(Keep.CORE),
    LayerPlan(Keep.INPUT, host=True),
    LayerPlan(Keep.ALL),
)
PLANS: dict[str, str | LayerPlan | TrainingPlan] = {
    **{mode: mode for mode in ("off", "memory", "auto")},
    **{f"{keep.value}{'-host' * host}": LayerPlan(keep, host) for keep in Keep for host in (False, True)},
    "mixed": TrainingPlan(MIXED),
    "mixed-tiled": TrainingPlan(MIXED, mlp_rows=256),
    "mixed-cached": TrainingPlan(MIXED, cached_weights=True),
}


class Case(NamedTuple):
    """Models, batches, the true gradients, and by matrix the peer's error."""

    models: EqualModels
    batches: list[Batch]
    truth: list[Gradients]
    peer: dict[str, float]


@pytest.fixture(scope="module", params=[False, True], ids=["16bit", "nf4"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=LAYERS, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, vocab_size=VOCABULARY, pad_token_id=0, max_position_embeddings=2048,
    )  # fmt: skip
    models = equal_models(LlamaForCausalLM(config).cuda(), torch.bfloat16, nf4=request.param)
    batches = [packed_rows(LENGTHS, VOCABULARY, "cuda", seed) for seed in range(4)]
    truth = gradients(models.truth, batches)
    peer = relative_errors(gradients(models.peer, batches, models.autocast), truth)
    float32_adapters = relative_errors(gradients(models.peer, batches), truth)
    print("PEFT without autocast:", Compared(float32_adapters, peer).summary())
    yield Case(models, batches, truth, peer)
    del models, truth
    torch.cuda.empty_cache()


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_as_close_to_float32_as_the_peers(case: Case, plan: str) -> None:
    use_plan(case.models.ours, PLANS[plan])
    found = gradients(case.models.ours, case.batches)
    assert all(g.isfinite().all() for each in found for g in each.values())
    compared = Compared(relative_errors(found, case.truth), case.peer)
    summary = compared.summary()
    print(plan, {name: round(value, 5) for name, value in summary.items()})
    assert summary["matrices"] == 14 * LAYERS
    assert summary["rms_ratio"] <= 1.01
    worst = max(compared.ratios, key=lambda name: compared.ratios[name])
    assert compared.ratios[worst] <= 1.25, (worst, compared.ours[worst], compared.peer[worst])
    for name, error in compared.ours.items():
        assert error <= case.peer[name] + 0.01, (name, error, case.peer[name])


def test_the_loss_is_as_close_to_float32_as_the_peers(case: Case) -> None:
    use_plan(case.models.ours, "auto")
    off: dict[str, list[float]] = {"ours": [], "peer": []}
    with torch.no_grad():
        for rows in case.batches:
            exact = float(loss_of(case.models.truth, rows))
            off["ours"].append(abs(float(loss_of(case.models.ours, rows)) - exact) / exact)
            off["peer"].append(abs(float(loss_of(case.models.peer, rows, torch.bfloat16)) - exact) / exact)
    print(off)
    assert max(off["ours"]) <= max(*off["peer"], 2e-4)


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
def test_fifty_steps_stay_within_the_noise_of_reseeding(nf4: bool) -> None:
    plain = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32).cuda()
    models = equal_models(plain, torch.bfloat16, nf4)
    models.load({name: torch.zeros_like(p) for name, p in models.truth.named_parameters() if "lora_B" in name})
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    held = padded(answered(tokenizer, "dev", 32, seed=0), "cuda")
    found = curves(models, answered(tokenizer, "sft", 400, seed=0), held, size=8, lr=1e-3)
    own, seeds = distances(found["pronghorn"], found["hf"]), noise(found)
    print({"ours": own, "reseeded": seeds, "float32": distances(found["hf-float32"], found["hf"])})
    assert found["pronghorn"].held[-1] < 0.7 * found["pronghorn"].held[0]
    for name in ("held_max_diff", "held_mean_diff", "train_max_diff", "train_mean_diff"):
        assert own[name] <= seeds[name], name


ODD: dict[str, dict[str, Any]] = {
    "head-64": {"head_dim": 64, "hidden_size": 321, "intermediate_size": 411, "vocab_size": 1009},
    "head-80": {"head_dim": 80, "hidden_size": 240, "intermediate_size": 333, "vocab_size": 997},
    "head-96": {"head_dim": 96, "hidden_size": 291, "intermediate_size": 700, "vocab_size": 2003},
    "head-128": {"head_dim": 128, "hidden_size": 387, "intermediate_size": 1001, "vocab_size": 1501},
    "head-256": {"head_dim": 256, "hidden_size": 255, "intermediate_size": 517, "vocab_size": 773},
    "multi-head": {"head_dim": 64, "hidden_size": 192, "num_key_value_heads": 3, "vocab_size": 509},
    "tied": {"head_dim": 80, "hidden_size": 195, "tie_word_embeddings": True, "vocab_size": 1021},
}
ROWS = {"packed": [65, 1, 130, 7, 1], "one-row": [257], "two-tokens": [2], "long": [700, 129]}


def whole_error(got: list[Gradients], truth: list[Gradients]) -> float:
    """The relative error of all gradients of all batches as one vector, for matrices whose true gradient may be 0."""
    off = sum(float((own[n] - exact[n]).square().sum()) for own, exact in zip(got, truth, strict=True) for n in exact)
    return (off / sum(float(g.square().sum()) for exact in truth for g in exact.values())) ** 0.5


def odd(name: str, dtype: torch.dtype, nf4: bool, device: str = "cuda") -> EqualModels:
    """Two layers, three query heads of one key head unless said otherwise, rank 5."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 411,
            "pad_token_id": 0,
            "max_position_embeddings": 1024,
            "initializer_range": 0.06,
            **ODD[name],
        }  # fmt: skip
    )
    return equal_models(LlamaForCausalLM(config).to(device), dtype, nf4, r=5)


def check_odd(models: EqualModels, plan: str | LayerPlan, limit: float, slack: float, device: str = "cuda") -> None:
    """Every kind of rows: losses and all gradients within ``limit`` of float32, or ``slack`` times the peer's error."""
    use_plan(models.ours, plan)
    for kind, lengths in ROWS.items():
        seeds = 8 if kind == "two-tokens" else 2  # so few tokens round by chance
        rows = [packed_rows(lengths, models.truth.config.vocab_size, device, seed) for seed in range(seeds)]
        with torch.no_grad():
            exact, got = (sum(float(loss_of(model, one)) for one in rows) for model in (models.truth, models.ours))
        assert abs(got - exact) <= max(limit, 3e-3 * slack) * exact, (kind, got, exact)
        truth, found = gradients(models.truth, rows), gradients(models.ours, rows)
        peer = gradients(models.peer, rows, models.autocast)
        ours, theirs = whole_error(found, truth), whole_error(peer, truth)
        assert ours <= max(limit, slack * theirs), (kind, ours, theirs)
        if kind != "two-tokens":  # where the only token that predicts sees itself alone: no gradient to q and k
            summary = Compared(relative_errors(found, truth), relative_errors(peer, truth)).summary()
            assert summary["rms_error"] <= max(limit, slack * summary["peer_rms_error"]), (kind, summary)


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
@pytest.mark.parametrize("plan", ["off", LayerPlan(Keep.INPUT), LayerPlan(Keep.ATTENTION, host=True)], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_in_bfloat16(name: str, plan: str | LayerPlan, nf4: bool) -> None:
    check_odd(odd(name, torch.bfloat16, nf4), plan, limit=0.0, slack=1.15)


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_in_float32(name: str, nf4: bool) -> None:
    check_odd(odd(name, torch.float32, nf4), "memory", limit=1e-4, slack=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_a_single_token_has_no_label_and_no_gradient(dtype: torch.dtype) -> None:
    models = odd("head-80", dtype, nf4=True)
    ids = torch.tensor([[5]], device="cuda")
    loss = models.ours(input_ids=ids, labels=ids, num_items_in_batch=1).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(p.grad is None or not p.grad.any() for p in models.ours.parameters())


WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("lengths", [[21, 9, 40], [300, 170, 511], [256, 256]], ids=str)
def test_a_broken_embedding_shows_in_the_loss(lengths: list[int], value: float) -> None:
    check_inputs(made(torch.bfloat16, "cuda", nf4=True, **WIDE), batch(lengths, "cuda"), value)


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
def test_a_broken_weight_shows_in_the_loss(nf4: bool) -> None:
    check_weights(made(torch.bfloat16, "cuda", nf4, **WIDE), batch([300, 170, 511], "cuda"))


@pytest.mark.parametrize("plan", ["off", "memory", LayerPlan(Keep.ATTENTION, host=True)], ids=str)
def test_a_broken_gradient_shows_in_its_norm(plan: str | LayerPlan) -> None:
    check_gradients(made(torch.bfloat16, "cuda", nf4=True, **WIDE), batch([300, 170, 511], "cuda"), plan)


def test_grpo_shows_what_is_broken(tmp_path: Path) -> None:
    check_grpo(made(torch.bfloat16, "cuda", nf4=True, **WIDE), tmp_path, "cuda")
