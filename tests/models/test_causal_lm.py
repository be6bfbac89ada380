"""What the labelled forward cannot pack goes transformers' way, is right there, and is said once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.models import attach, is_attached
from tests.models.test_attach import make


def pair() -> tuple[Any, Any, dict[str, torch.Tensor]]:
    plain, fast = make(), make()
    attach(fast)
    ids = torch.randint(3, 101, (2, 9))
    return plain.train(), fast.train(), {"input_ids": ids, "labels": ids}


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden-states": ({"output_hidden_states": True}, "output_hidden_states=True"),
    "attentions": ({"output_attentions": True}, "output_attentions=True"),
    "logits-to-keep": ({"logits_to_keep": 9}, "the argument logits_to_keep"),
    "4-d-mask": (
        {"attention_mask": torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)},
        "an attention_mask of 4 dimensions",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_slower_way_is_right_and_said_once(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra, reason = CALLS[call]
    plain, fast, batch = pair()
    out = fast(**batch, **extra)
    torch.testing.assert_close(out.loss, plain(**batch).loss, rtol=1e-6, atol=0)
    assert out.logits is not None
    assert f"because of {reason}" in capsys.readouterr().out
    fast(**batch, **extra)
    fast(**batch)
    assert "hook" not in (said := capsys.readouterr().out)  # transformers' own stay on the layers, and do nothing
    assert "because" not in said.replace("because of a norm that trains", "")


def test_it_is_not_said_outside_training(capsys: pytest.CaptureFixture[str]) -> None:
    _, fast, batch = pair()
    with torch.no_grad():
        fast(**batch, output_hidden_states=True)
    fast.eval()
    fast(**batch, output_hidden_states=True)
    assert capsys.readouterr().out == ""


def test_arguments_of_flash_attention_collators_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _, fast, batch = pair()
    rows = {key: value.reshape(1, -1) for key, value in batch.items()}
    rows["position_ids"] = torch.arange(9).repeat(2)[None]
    bounds = torch.tensor([0, 9, 18], dtype=torch.int32)
    flash = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9,
             "seq_idx": torch.arange(2).repeat_interleave(9)[None]}  # fmt: skip
    out = fast(**rows, **flash)
    assert out.logits is None
    torch.testing.assert_close(out.loss, fast(**batch).loss, rtol=1e-6, atol=0)
    assert "transformers' forward" not in capsys.readouterr().out


@pytest.mark.parametrize("part", ["model", "lm_head"])
def test_hooks_on_what_the_packed_walk_passes_by_run(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain, fast, batch = pair()
    calls: list[int] = []
    handle = getattr(fast, part).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(fast(**batch).loss, plain(**batch).loss, rtol=1e-6, atol=0)
    assert calls == [1] and "because of a hook on" in capsys.readouterr().out
    handle.remove()
    assert fast(**batch).logits is None and calls == [1]


def test_token_scores_that_cannot_be_had_are_an_error() -> None:
    _, fast, batch = pair()
    with pytest.raises(ConfigError, match="token_scores=True cannot be had with output_hidden_states=True"):
        fast(**batch, token_scores=True, output_hidden_states=True)


def test_autocast_leaves_the_models_own_precision_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    _, fast, batch = pair()
    wanted = fast(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(**batch).loss
        got.backward()
    assert torch.equal(got, wanted)
    assert "autocast to bfloat16 has no effect: the model was loaded to compute in float32" in capsys.readouterr().out


def test_a_model_whose_forward_a_trainer_wrapped_is_attached() -> None:
    from trl.trainer.utils import add_fused_lm_head

    plain, fast, _ = pair()
    add_fused_lm_head(fast)
    assert is_attached(fast) and not is_attached(plain)


def test_training_without_labels_is_said_to_be_slower_once(capsys: pytest.CaptureFixture[str]) -> None:
    _, fast, batch = pair()
    for _ in range(2):
        fast(input_ids=batch["input_ids"]).logits.sum().backward()
    assert capsys.readouterr().out.count("layers run transformers' forward, slower") == 1
    fast.eval()
    fast(input_ids=batch["input_ids"])
    assert capsys.readouterr().out == ""
