"""Every way of adapting a model, trained as SFT trains it (packed, no logits), against plain PEFT on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from pronghorn.config.load import LoadConfig
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.lora.config import register
from pronghorn.models import unwrap
from tests.helpers import perturb, relative_error, tiny_llama
from tests.lora.test_layer import ours, plain_peft

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What get_peft_model is given, and the reason that the slower way states (None: fused).
SETTINGS: dict[str, tuple[dict[str, Any], str | None]] = {
    "plain": ({}, None),
    "rslora": ({"use_rslora": True}, None),
    "dora": ({"use_dora": True}, "DoRA"),
    "bias-all": ({"bias": "all"}, "a base weight or bias that trains"),
    "bias-lora-only": ({"bias": "lora_only"}, "a base weight or bias that trains"),
    "patterns": ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, None),
    "some-layers": ({"layers_to_transform": [1]}, None),
    "dora-above": ({"layers_to_transform": [1], "use_dora": True}, "DoRA"),
    "some-linears": ({"target_modules": ["q_proj", "down_proj"]}, None),
    "head": ({"target_modules": [*EVERY, "lm_head"]}, None),
    "dora-head": ({"target_modules": ["lm_head"], "use_dora": True}, None),
    "embeddings": ({"target_modules": [*EVERY, "embed_tokens"]}, None),
    "saved-head": ({"modules_to_save": ["lm_head"]}, None),
    "saved-both": ({"modules_to_save": ["lm_head", "embed_tokens"]}, None),
    "saved-norms": ({"modules_to_save": ["input_layernorm"]}, "a norm that trains"),
}


def batch() -> dict[str, torch.Tensor]:
    """Two padded rows; the labels start late, as those of a response do."""
    ids = torch.randint(0, 384, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(model: Any, **inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same(model: Any, reference: Any) -> None:
    (got, got_grads), (expected, expected_grads) = (trained(each.train(), **batch()) for each in (model, reference))
    assert relative_error(got, expected) <= 1e-5
    assert got_grads.keys() == expected_grads.keys() and got_grads
    for name, grad in expected_grads.items():
        mine = got_grads[name]
        if grad is None or not grad.any():
            assert mine is None or not mine.any(), name
        else:
            assert mine is not None and relative_error(mine, grad) <= 2e-5, name


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16bit", "4bit"])
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_equal_plain_peft(
    tmp_path: Path, name: str, load_in_4bit: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options, reason = SETTINGS[name]
    folder = tiny_llama(tmp_path, attention_bias=True, mlp_bias=True, hidden_size=60, head_dim=16)
    model = ours(folder, load_in_4bit, **options)
    capsys.readouterr()
    assert_same(model, plain_peft(model, folder, tmp_path / "adapter"))
    said = capsys.readouterr().out
    assert said.count("slower") == (0 if reason is None else 1) and (reason is None or f"because of {reason}" in said)


@pytest.mark.parametrize(
    "targets", [[*EVERY, "embed_tokens"], [*EVERY, "lm_head"], EVERY], ids=["embed", "head", "linears"]
)
def test_tied_embeddings(tmp_path: Path, targets: list[str]) -> None:
    folder = tiny_llama(tmp_path, tie_word_embeddings=True)
    model = ours(folder, False, target_modules=targets)
    assert_same(model, plain_peft(model, folder, tmp_path / "adapter"))


def test_a_bias_on_the_adapter_and_two_adapters_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for extra, reason in (({"lora_bias": True}, "a bias on lora_B"), ({}, "2 adapters active at once")):
        folder = tiny_llama(tmp_path, name=f"tiny-{reason[0]}", attention_bias=True)
        model, _ = from_pretrained(LoadConfig(str(folder), load_in_4bit=False))
        config = register(peft.LoraConfig(r=3, target_modules=EVERY, **extra))
        model = peft.get_peft_model(model, config)
        plain, _ = from_pretrained(LoadConfig(str(folder), load_in_4bit=False))
        from pronghorn.models import detach

        detach(plain)
        reference = peft.get_peft_model(plain, peft.LoraConfig(r=3, target_modules=EVERY, **extra))
        if not extra:
            for each, settings in ((model, register), (reference, lambda c: c)):
                each.add_adapter("other", settings(peft.LoraConfig(r=2, lora_alpha=6, target_modules=EVERY)))
                each.base_model.set_adapter(["default", "other"])
        perturb(model)
        reference.load_state_dict(model.state_dict())
        capsys.readouterr()
        assert_same(model, reference)
        assert f"because of {reason}" in capsys.readouterr().out


def test_dropout_has_the_right_mean_is_off_in_evaluation_and_says_that_it_is_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_llama(tmp_path)
    model = ours(folder, False, lora_dropout=0.25)
    reference = plain_peft(model, folder, tmp_path / "adapter")
    with torch.no_grad():
        assert relative_error(model.eval()(**batch()).loss, reference.eval()(**batch()).loss) <= 1e-5
    capsys.readouterr()
    inputs = batch()
    model.train()
    torch.manual_seed(3)
    kept = trained(model, **inputs)
    assert "because of lora_dropout" in capsys.readouterr().out
    unwrap(model).gradient_checkpointing_enable()
    torch.manual_seed(3)
    recomputed = trained(model, **inputs)  # the recomputed layers draw the same masks
    assert torch.equal(kept[0], recomputed[0])
    for name, grad in kept[1].items():
        assert grad is not None and relative_error(recomputed[1][name], grad) <= 1e-6, name
    assert not torch.equal(trained(model, **inputs)[0], kept[0])

    layer = unwrap(model).model.layers[0].self_attn.q_proj
    x = torch.randn(4, 64)
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(2000)])
        layer.eval()
        still = layer(x)
    spread = draws.std(0) / 2000**0.5
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - still).abs() < 5 * spread + 1e-6).all()


def test_dropout_on_the_head_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = ours(tiny_llama(tmp_path), False, lora_dropout=0.25, target_modules=["lm_head"])
    with pytest.raises(NotImplementedError, match="lora_dropout on lm_head"):
        model.train()(**batch())


def test_what_get_peft_model_does_not_offer_is_an_error(tmp_path: Path) -> None:
    from pronghorn.config.errors import ConfigError

    model, _ = from_pretrained(LoadConfig(str(tiny_llama(tmp_path)), load_in_4bit=False))
    with pytest.raises(ConfigError, match="trainable_token_indices"):
        get_peft_model(model, trainable_token_indices=[1, 2])
