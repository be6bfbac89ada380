"""Which adapter acts inside ``adapter(model, which)``, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.config.adapters import LIVE, LoraHandle
from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.lora.active import adapter, wrappers
from pronghorn.lora.io import load_lora, save_lora
from tests.helpers import perturb, tiny_llama

IDS = torch.arange(3, 12).unsqueeze(0)


def state(model: Any) -> tuple[Any, ...]:
    return (
        [(w._disable_adapters, list(w.active_adapters)) for w in wrappers(model)],
        {n: p.requires_grad for n, p in model.named_parameters()},
        model.training,
        model.active_adapter,
    )


@torch.no_grad()
def answer(model: Any) -> torch.Tensor:
    return model(IDS).logits.clone()


@pytest.fixture(params=[{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "with-head"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    base, _ = from_pretrained(LoadConfig(str(tiny_llama(tmp_path))))
    plain = answer(base)
    wrapped = get_peft_model(base, r=4, **request.param).eval()
    perturb(wrapped)
    wrapped.plain_answer = plain
    return wrapped


def test_none_is_the_base_and_a_handle_is_that_adapter(model: Any, tmp_path: Path) -> None:
    live = answer(model)
    save_lora(model, tmp_path / "saved")
    perturb(model, seed=9)
    moved = answer(model)
    handle = load_lora(model, tmp_path / "saved")
    assert torch.equal(answer(model), moved), "loading leaves the live adapter active"
    before = state(model)
    with adapter(model, None):
        assert torch.equal(answer(model), model.plain_answer)
    assert state(model) == before
    with adapter(model, handle):
        assert torch.allclose(answer(model), live, rtol=0, atol=1e-6)
        with adapter(model, None):
            assert torch.equal(answer(model), model.plain_answer)
        assert torch.allclose(answer(model), live, rtol=0, atol=1e-6)
    assert state(model) == before
    with adapter(model, LIVE):
        assert torch.equal(answer(model), moved)
    assert state(model) == before


def test_state_returns_after_an_exception(model: Any) -> None:
    before = state(model)
    with pytest.raises(RuntimeError, match="boom"), adapter(model, None):
        raise RuntimeError("boom")
    assert state(model) == before


def test_a_disabled_adapter_stays_disabled_outside(model: Any) -> None:
    with model.disable_adapter():
        with adapter(model, LIVE):
            assert torch.equal(answer(model), model.plain_answer)
        with adapter(model, None):
            assert torch.equal(answer(model), model.plain_answer)
        assert torch.equal(answer(model), model.plain_answer)


def test_a_model_without_adapters_answers_for_none_and_live(tmp_path: Path) -> None:
    base, _ = from_pretrained(LoadConfig(str(tiny_llama(tmp_path))))
    expected = answer(base)
    for which in (None, LIVE):
        with adapter(base, which):
            assert torch.equal(answer(base), expected)
    with pytest.raises(ConfigError, match="not on this model"), adapter(base, LoraHandle("x", "/x", 1)):
        pass


def test_wrong_requests_say_what_to_give(model: Any) -> None:
    with pytest.raises(ConfigError, match="a str; give what load_lora returned"), adapter(model, "default"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ConfigError, match="load it with model.load_lora"), adapter(model, LoraHandle("gone", "/x", 7)):
        pass


def test_trained_biases_leave_no_base_model(tmp_path: Path) -> None:
    base, _ = from_pretrained(LoadConfig(str(tiny_llama(tmp_path, attention_bias=True))))
    model = get_peft_model(base, r=4, bias="all")
    with pytest.raises(ConfigError, match='bias="none"'), adapter(model, None):
        pass
