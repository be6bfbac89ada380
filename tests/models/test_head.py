"""A family's scale and bound of its logits act alike in the loss, in scores, in logits and in both sampling loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pronghorn import SamplingParams
from pronghorn.models import llama
from pronghorn.models.forward import logits
from pronghorn.rollout import base as rollout
from tests.helpers import tiny_llama
from tests.rollout.conftest import load, with_lora

SCALE, SOFTCAP = 0.7, 1.5


@pytest.fixture(params=[(SCALE, SOFTCAP), (SCALE, None), (1.0, SOFTCAP)], ids=["both", "scale", "softcap"])
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float | None]:
    """Llama as if its family had these."""
    scale, softcap = request.param
    monkeypatch.setattr(llama, "SPEC", replace(llama.SPEC, logit_scale=scale, logit_softcap=softcap))
    return scale, softcap


def bounded(raw: torch.Tensor, family: tuple[float, float | None]) -> torch.Tensor:
    scale, softcap = family
    return raw * scale if softcap is None else torch.tanh(raw * scale / softcap) * softcap


def made(tmp_path: Path) -> tuple[Any, Any]:
    model, tokenizer = load(tiny_llama(tmp_path))
    return with_lora(model), tokenizer


def test_the_loss_and_the_scores_have_them(tmp_path: Path, family: tuple[float, float | None]) -> None:
    model, _ = made(tmp_path)
    ids = torch.randint(5, 300, (2, 11))
    with torch.no_grad():
        raw = model(input_ids=ids).logits.float()  # transformers' forward, which knows of neither
    logps = bounded(raw, family).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    assert (logps - raw.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)).abs().max() > 0.05
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, -logps.mean(), rtol=1e-5, atol=0)
    scores = model(input_ids=ids, labels=ids, token_scores=True)
    torch.testing.assert_close(scores.log_probs, logps, rtol=1e-5, atol=1e-6)


def test_gradients_go_through_them(tmp_path: Path, family: tuple[float, float | None]) -> None:
    model, _ = made(tmp_path)
    ids = torch.randint(5, 300, (2, 11))
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
    z = bounded(model(input_ids=ids).logits.float(), family)
    expected = torch.autograd.grad(F.cross_entropy(z[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), trained)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()) + 1e-9


@pytest.mark.parametrize("ahead", [False, True], ids=["stepwise", "ahead"])
def test_what_is_sampled_has_them(tmp_path: Path, family: tuple[float, float | None], ahead: bool) -> None:
    model, tokenizer = made(tmp_path)
    engine = rollout.create("native", model, tokenizer, ahead=ahead)
    prompt = [0, 40, 41, 42]
    (output,) = engine.generate([prompt], SamplingParams(n=2, max_tokens=12, temperature=0.9, seed=3, ignore_eos=True))
    for completion in output.outputs:
        row = torch.tensor(prompt + completion.token_ids)
        with torch.no_grad():
            raw = model(input_ids=row[None]).logits[0].float()
        expected = (bounded(raw, family) / 0.9).log_softmax(-1)[len(prompt) - 1 : -1]
        logps = expected.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.policy_logprobs), logps, rtol=0, atol=1e-5)


def test_logits_have_them(tmp_path: Path, family: tuple[float, float | None]) -> None:
    model, _ = made(tmp_path)
    hidden = torch.randn(3, model.config.hidden_size)
    weight = model.get_base_model().lm_head.weight
    torch.testing.assert_close(logits(model, hidden), bounded(hidden @ weight.float().T, family), rtol=1e-5, atol=1e-6)
