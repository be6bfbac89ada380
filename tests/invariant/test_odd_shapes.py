"""Whole models of odd shapes on the CPU: loss and every LoRA gradient are those of transformers + PEFT, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.equal_models import EqualModels, equal_models, gradients, loss_of, packed_rows, use_plan

ODD: dict[str, dict[str, Any]] = {
    "head-64": {"head_dim": 64, "hidden_size": 81, "intermediate_size": 111, "vocab_size": 509},
    "head-80": {"head_dim": 80, "hidden_size": 60, "intermediate_size": 83, "vocab_size": 497},
    "head-96": {"head_dim": 96, "hidden_size": 75, "intermediate_size": 100, "vocab_size": 503},
    "head-128": {"head_dim": 128, "hidden_size": 99, "intermediate_size": 101, "vocab_size": 301},
    "head-256": {"head_dim": 256, "hidden_size": 63, "intermediate_size": 117, "vocab_size": 273},
    "multi-head": {"head_dim": 64, "hidden_size": 66, "num_key_value_heads": 3, "vocab_size": 309},
    "tied": {"head_dim": 80, "hidden_size": 69, "tie_word_embeddings": True, "vocab_size": 321},
    "geglu-tanh": {"head_dim": 64, "hidden_size": 69, "hidden_act": "gelu_pytorch_tanh", "vocab_size": 211},
    "geglu": {"head_dim": 64, "hidden_size": 69, "hidden_act": "gelu", "vocab_size": 211},
    "biases": {"head_dim": 64, "hidden_size": 69, "attention_bias": True, "mlp_bias": True, "vocab_size": 211},
    "a-vocabulary-of-two": {"head_dim": 64, "hidden_size": 33, "vocab_size": 2},
}
ROWS = {"packed": [13, 1, 30, 7, 1], "one-row": [37], "two-tokens": [2]}


def odd(name: str, nf4: bool) -> EqualModels:
    """Two layers, three query heads of one key head unless said otherwise, rank 5, all of it in float32."""
    torch.manual_seed(0)
    settings = {
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 99,
        "pad_token_id": 0, "max_position_embeddings": 128, "initializer_range": 0.06, **ODD[name],
    }  # fmt: skip
    return equal_models(LlamaForCausalLM(LlamaConfig(**settings)), torch.float32, nf4, r=5)


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
@pytest.mark.parametrize("name", ODD)
def test_loss_and_gradients_are_transformers_and_pefts(
    name: str, nf4: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The peer sees each row by itself, without padding: packed rows that saw each other would differ."""
    models = odd(name, nf4)
    vocabulary = models.truth.config.vocab_size
    for plan in ("off", "memory"):
        use_plan(models.ours, plan)
        for lengths in ROWS.values():
            packed = packed_rows(lengths, vocabulary, "cpu", seed=3)
            rows = [{k: t[:, start:stop] for k, t in packed.items()} for start, stop in spans(lengths)]
            counts = [int((row["labels"] != -100).sum()) for row in rows]
            alone = [(n, row) for n, row in zip(counts, rows) if n]
            total = sum(counts)
            with torch.no_grad():
                want = sum(n * float(loss_of(models.truth, plain(row))) for n, row in alone) / total
                got = float(loss_of(models.ours, packed))
            assert abs(got - want) <= 2e-6 * abs(want)
            truth = gradients(models.truth, [plain(row) for _, row in alone])
            (found,) = gradients(models.ours, [packed])
            exact = {name: sum(n * g[name] for (n, _), g in zip(alone, truth)) / total for name in found}
            size = torch.stack([g.norm() for g in exact.values()]).norm()
            off = torch.stack([(found[name] - exact[name]).norm() for name in exact]).norm()
            assert off <= 5e-6 * size, (plan, lengths)
    assert "slower" not in capsys.readouterr().out


def spans(lengths: list[int]) -> list[tuple[int, int]]:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [(start, start + n) for start, n in zip(starts, lengths)]


def plain(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row, as transformers takes it: its positions are the usual ones."""
    return {k: t for k, t in row.items() if k != "position_ids"}


@pytest.mark.parametrize("nf4", [False, True], ids=["16bit", "nf4"])
def test_a_row_of_one_token_teaches_nothing_and_harms_nothing(nf4: bool) -> None:
    """Batch 1, sequence 1: there is no label, and no gradient but 0 or none."""
    models = odd("head-80", nf4)
    batch = packed_rows([1], models.truth.config.vocab_size, "cpu")
    (found,) = gradients(models.ours, [batch])
    assert all(not bool(g.nan_to_num().any()) for g in found.values())
