"""What the accuracy benchmark compares: models that are equal, curves the same in float32, errors that show."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.equal_models import (
    Compared,
    adapters_of,
    equal_models,
    gradients,
    loss_of,
    packed_rows,
    relative_errors,
    use_plan,
)
from benchmarks.training_accuracy import TINY, Curve, answered, batches_of, curves, distances, noise, padded
from pronghorn.models import unwrap
from pronghorn.models.checkpointing import plan_for
from pronghorn.models.keep import Keep
from pronghorn.models.plan import LayerPlan, TrainingPlan
from pronghorn.models.tree import layers
from pronghorn.quant.linear4bit import Linear4bit
from tests.helpers import tiny_config

LENGTHS = [40, 1, 23]


def plain(**overrides: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**overrides))


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
def test_curves_of_equal_models_are_the_same_in_float32(nf4: bool) -> None:
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    models = equal_models(model, torch.float32, nf4, r=4)
    assert nf4 == any(isinstance(m, Linear4bit) for m in models.ours.modules())
    rows = answered(AutoTokenizer.from_pretrained(TINY), "sft", 16, seed=0)
    found = curves(models, rows, padded(rows[:4], "cpu"), size=4, lr=2e-3)
    for theirs in ("hf", "hf-float32"):
        for value in distances(found["pronghorn"], found[theirs]).values():
            assert value < 1e-5
    assert found["hf"].held[-1] < found["hf"].held[0] - 0.05  # it learns
    assert noise(found)["held_mean_diff"] > 1e-3  # and the order of the data shows


def test_copies_hold_the_same_weights_and_plans_do_not_change_gradients() -> None:
    models = equal_models(plain(), torch.bfloat16, nf4=True, r=4)
    for name, wanted in adapters_of(models.truth).items():
        assert torch.equal(models.ours.get_parameter(name), wanted) and wanted.any()
        assert torch.equal(models.peer.get_parameter(name), wanted)
    frequencies = [unwrap(m).model.rotary_emb.inv_freq for m in (models.ours, models.peer, models.truth)]
    assert all(f.dtype == torch.float32 and torch.equal(f, frequencies[2]) for f in frequencies)
    exact = models.truth.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight
    four_bit = models.ours.get_base_model().model.layers[1].mlp.up_proj.base_layer
    assert torch.equal(four_bit.nf4.dequantize(torch.bfloat16).float(), exact)
    batches = [packed_rows(LENGTHS, 384, "cpu", seed) for seed in range(2)]
    truth = gradients(models.truth, batches)
    peer = relative_errors(gradients(models.peer, batches, models.autocast), truth)
    found = []
    mixed = TrainingPlan((LayerPlan(Keep.CORE), LayerPlan(Keep.ALL)), mlp_rows=13, cached_weights=True)
    for plan in ("off", "memory", mixed, *(LayerPlan(keep) for keep in Keep)):
        use_plan(models.ours, plan)
        kept = {plan_for(layer).keep for layer in layers(unwrap(models.ours))}
        if isinstance(plan, TrainingPlan):
            assert kept == {Keep.CORE, Keep.ALL}
        else:
            assert kept == {{"off": Keep.ALL, "memory": Keep.INPUT}[plan] if isinstance(plan, str) else plan.keep}
        found.append(relative_errors(gradients(models.ours, batches), truth))
    assert all(each == found[0] for each in found if each is not found[2])  # one order of sums, whatever was kept
    for each in (found[0], found[2]):  # tiles, and adapters beside the weights, add in others
        summary = Compared(each, peer).summary()
        assert summary["matrices"] == 28 and 0 < summary["peer_rms_error"] < 0.1
        assert summary["rms_ratio"] < 1.1


def test_packed_rows_are_the_rows_by_themselves_to_the_peer_too() -> None:
    """transformers keeps packed rows apart where only ``position_ids`` tell of them, whichever version runs."""
    models = equal_models(plain(), torch.float32, r=4)
    batch = packed_rows(LENGTHS, 384, "cpu")
    alone = []
    for ids in batch["input_ids"][0].split(LENGTHS):
        if len(ids) > 1:
            alone += [float(loss_of(models.truth, {"input_ids": ids[None], "labels": ids[None]}).detach())] * (
                len(ids) - 1
            )
    for model in (models.truth, models.ours):
        assert float(loss_of(model, batch).detach()) == pytest.approx(statistics.fmean(alone), rel=1e-6)


def test_a_wrong_gradient_shows() -> None:
    models = equal_models(plain(), torch.float32, r=4)
    batch = [packed_rows(LENGTHS, 384, "cpu")]
    truth = gradients(models.truth, batch)
    wrong = copy.deepcopy(truth)
    name = next(iter(wrong[0]))
    wrong[0][name] *= 1.02
    errors = relative_errors(wrong, truth)
    assert errors[name] == pytest.approx(0.02) and sum(errors.values()) == pytest.approx(0.02)
    compared = Compared({"a": 0.03, "b": 0.01}, {"a": 0.02, "b": 0.02})
    assert compared.summary()["worst_ratio"] == pytest.approx(1.5) and compared.summary()["over_1_01"] == 1
    del wrong[0][name]
    with pytest.raises(ValueError, match="differ in name"):
        relative_errors(wrong, truth)


def test_every_order_has_all_rows_and_answers_alone_are_labels() -> None:
    rows = [([1, 2], [3, 4, 5]), ([6], [7]), ([8, 9], [10])]
    (whole,) = batches_of(rows, 3, 0, "cpu")
    assert sorted(whole["input_ids"].sum(-1).tolist()) == [13, 15, 27]
    batch = padded(rows, "cpu")
    assert batch["input_ids"][1].tolist() == [6, 7, 0, 0, 0]
    assert batch["labels"].tolist()[:2] == [[-100, -100, 3, 4, 5], [-100, 7, -100, -100, -100]]
    assert batch["attention_mask"].sum(-1).tolist() == [5, 2, 3]
    assert distances(Curve([1.0, 2.0], [3.0, 4.0]), Curve([1.0, 2.5], [3.0, 3.0])) == {
        "held_max_diff": 1.0, "held_mean_diff": 0.5, "train_max_diff": 0.5, "train_mean_diff": 0.25,
    }  # fmt: skip
