"""The check that a GPU keeps ``rollout_precision="exact"``: with whole numbers, whose sums are exact in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn.config.errors import ConfigError
from pronghorn.lora.config import register
from pronghorn.models.packed_layer import prepared, prepared_layers
from pronghorn.rollout import base
from pronghorn.rollout.native import exact
from tests.helpers import tiny_llama
from tests.rollout.conftest import load


@pytest.fixture
def whole(tmp_path, monkeypatch) -> Any:
    """A model of small whole numbers under LoRA, and whole numbers for the random ones."""
    model, _ = load(tiny_llama(tmp_path))
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, register(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))

    def integers(like: torch.Tensor, *shape: int, size: float = 1.0, dtype: Any = None) -> torch.Tensor:
        return torch.randint(-2, 3, shape).to(dtype or like.dtype)

    monkeypatch.setattr(exact, "random_like", integers)
    monkeypatch.setattr(exact, "TRAINED", (384, 512))
    return model


def found(model: Any) -> Any:
    with prepared(model):
        return prepared_layers(model)


def test_every_shape_is_tried_once(whole):
    names = [name for name, _ in exact.shapes(found(whole))]
    assert names == [
        "q, k and v (64 inputs, 128 outputs, torch.float32, rank 12)",
        "o (64 inputs, 64 outputs, torch.float32, rank 4)",
        "gate and up (64 inputs, 256 outputs, torch.float32, rank 8)",
        "down (128 inputs, 64 outputs, torch.float32, rank 4)",
    ]


def test_equal_products_pass_and_a_perturbed_one_is_named(whole, monkeypatch):
    layers = found(whole)
    for name, group in exact.shapes(layers):
        exact.check_group(name, group, torch.float32, exact.DECODED)
    honest, rows_seen = exact.product_of, []

    def perturbed(group: Any, dtype: Any, rows: int, *rest: Any) -> Any:
        product = honest(group, dtype, rows, *rest)

        def multiply(x: torch.Tensor) -> torch.Tensor:
            y = product(x).clone()
            rows_seen.append(len(x))
            if len(x) == 6:
                y[5, 3] = torch.nextafter(y[5, 3], torch.tensor(1e9))  # the last bit of one number
            return y

        return multiply

    monkeypatch.setattr(exact, "product_of", perturbed)
    name, group = list(exact.shapes(layers))[3]
    with pytest.raises(ConfigError, match=r"down \(128 inputs.*6 rows in a decode step and of 384 rows.*'auto'"):
        exact.check_group(name, group, torch.float32, exact.DECODED)
    assert sorted(set(rows_seen)) == [1, 2, 3, 4, 5, 6]


def test_the_adapters_count(whole, monkeypatch):
    """A decode product that leaves the adapter out must not pass, although a new adapter's B is zero."""
    for name, parameter in whole.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    name, group = next(exact.shapes(found(whole)))
    assert all((b != 0).any() for b in exact.stand_in(group).bs_Or)
    weight = torch.cat([p.base.weight for p in group.members])
    monkeypatch.setattr(exact, "product_of", lambda *_: lambda x: x @ weight.T)
    with pytest.raises(ConfigError, match="q, k and v"):
        exact.check_group(name, group, torch.float32, [1])


def test_the_head_is_tried_in_the_trainers_chunks(whole, monkeypatch):
    weight = whole.get_base_model().lm_head.weight
    seen: list[int] = []
    honest = exact.head_logits

    def watched(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(len(x))
        return honest(x, *rest)

    monkeypatch.setattr(exact, "head_logits", watched)
    monkeypatch.setattr(exact, "chunk_rows", lambda N, V: 256)
    exact.check_head(weight, [1, 6])
    assert set(seen) == {1, 6, 64, 128, 256}
    monkeypatch.setattr(exact, "head_logits", lambda x, *_: honest(x, *_) + (len(x) == 6))
    with pytest.raises(ConfigError, match=r"the output head \(64 inputs, 384 outputs\).*6 rows.*64 rows"):
        exact.check_head(weight, [1, 6])


def test_the_cpu_and_other_engines_are_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="the model is on cpu, whose float32 agrees to about 1e-5 only"):
        base.create("native", model, tokenizer).check_exact()
