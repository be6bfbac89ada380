"""The attached fast path against transformers' own forward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pronghorn.config.errors import ConfigError
from pronghorn.models import attach, detach, is_attached, spec_for
from pronghorn.models.attention import PackedAttention
from pronghorn.models.checkpointing import set_plans
from pronghorn.models.forward import hidden_states, logits
from pronghorn.models.keep import Keep
from pronghorn.models.plan import LayerPlan

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 500000.0,
}  # fmt: skip


def make(**overrides: object) -> LlamaForCausalLM:
    settings: dict[str, object] = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 256, "head_dim": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


VARIANTS = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 6},
    {"rope_parameters": LLAMA3_ROPE},
    {"attention_bias": True},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=["gqa", "tied", "mha", "llama3-rope", "bias"])
def test_packed_rows_give_transformers_logits_and_gradients(overrides: dict[str, object]) -> None:
    plain = make(**overrides)
    fast = copy.deepcopy(plain)
    attach(fast)
    lengths = [7, 1, 12, 5]
    ids_T = torch.randint(3, 101, (sum(lengths),))
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    hidden = hidden_states(fast, ids_T, positions_T, PackedAttention(lengths, "cpu"))
    ours = logits(fast, hidden)
    theirs = torch.cat([plain(input_ids=row[None]).logits[0] for row in ids_T.split(lengths)])
    assert relative(ours, theirs) < 1e-5
    probe = torch.randn_like(theirs)
    (ours * probe).sum().backward()
    (theirs * probe).sum().backward()
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters()):
        assert relative(a.grad, b.grad) < 1e-5, name


def test_loss_equals_transformers_with_padding_labels_and_a_passed_denominator() -> None:
    plain = make()
    fast = copy.deepcopy(plain)
    attach(fast)
    ids = torch.randint(3, 101, (3, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # left padding
    mask[1, 8:] = 0  # right padding
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :5] = -100
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # transformers needs them for the left-padded row
    for extra in ({}, {"num_items_in_batch": torch.tensor(50)}):
        out = fast(input_ids=ids, attention_mask=mask, labels=labels, **extra)
        want = plain(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels, **extra).loss
        assert out.logits is None
        if not extra:
            # the first real token of the left-padded row is predicted from padding in transformers; leave it out
            trimmed = labels.clone()
            trimmed[0, 4] = -100
            want = plain(input_ids=ids, attention_mask=mask, position_ids=positions, labels=trimmed).loss
            torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=0)
        else:
            trimmed = labels.clone()
            trimmed[0, 4] = -100
            want = plain(input_ids=ids, attention_mask=mask, position_ids=positions, labels=trimmed, **extra).loss
            torch.testing.assert_close(out.loss, want, rtol=1e-5, atol=0)


def test_packed_rows_equal_padded_rows_in_loss_and_gradient() -> None:
    padded_model, packed_model = make(), make()
    attach(padded_model), attach(packed_model)
    lengths = [6, 9, 3]
    rows = [torch.randint(3, 101, (n,)) for n in lengths]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)
    padded = padded_model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    packed_ids = torch.cat(rows)[None]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = packed_model(input_ids=packed_ids, position_ids=position_ids, labels=packed_ids).loss
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    padded.backward()
    packed.backward()
    for (name, a), (_, b) in zip(packed_model.named_parameters(), padded_model.named_parameters()):
        assert relative(a.grad, b.grad) < 1e-5, name


@pytest.mark.parametrize("training", [True, False])
def test_generate_is_right_in_any_mode(training: bool) -> None:
    plain, fast = make(), make()
    attach(fast)
    fast.train(training)
    fast.gradient_checkpointing_enable()
    assert not fast.is_gradient_checkpointing  # transformers' own flag stays off
    ids = torch.randint(3, 101, (2, 9))
    kwargs = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(fast.generate(ids, **kwargs), plain.generate(ids, **kwargs))


def test_checkpointing_recomputes_each_block_once_and_changes_no_gradient() -> None:
    plain, fast = make(), make()
    attach(plain), attach(fast)
    fast.train(), plain.train()
    plain.gradient_checkpointing_disable()
    set_plans(fast.model.layers, LayerPlan(Keep.INPUT))
    calls = []
    fast.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(3, 101, (2, 9))
    fast(input_ids=ids, labels=ids).loss.backward()
    assert len(calls) == 2  # once forward, once in backward: not zero, not three
    plain(input_ids=ids, labels=ids).loss.backward()
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters()):
        assert torch.equal(a.grad, b.grad), name
    calls.clear()
    fast(input_ids=ids).logits.sum().backward()  # transformers' own walk is recomputed by the same plan
    assert len(calls) == 2


def test_without_labels_outputs_are_transformers_own() -> None:
    plain, fast = make(), make()
    attach(fast)
    ids = torch.randint(3, 101, (2, 9))
    ours = fast(input_ids=ids, output_hidden_states=True)
    theirs = plain(input_ids=ids, output_hidden_states=True)
    assert torch.equal(ours.logits, theirs.logits)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 4


def test_a_deep_copy_runs_its_own_weights_and_other_instances_stay_plain() -> None:
    fast, bystander = make(), make()
    attach(fast)
    assert not is_attached(bystander)
    assert "forward" not in bystander.model.layers[0].__dict__
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ids = torch.randint(3, 101, (1, 5))
    assert float(twin(input_ids=ids).logits.abs().sum()) == 0
    assert float(twin(input_ids=ids, labels=ids).loss) == pytest.approx(float(torch.tensor(101.0).log()), rel=1e-5)
    assert float(fast(input_ids=ids).logits.abs().sum()) > 0


def test_detach_restores_the_class_methods() -> None:
    model = make()
    before = dict(model.model.layers[0].__dict__)
    attach(model)
    attach(model)
    assert is_attached(model)
    detach(model)
    assert not is_attached(model)
    assert model.model.layers[0].__dict__.keys() == before.keys()
    ids = torch.randint(3, 101, (1, 5))
    assert model(input_ids=ids, labels=ids).logits is not None


def test_an_unknown_family_names_the_known_ones() -> None:
    config = LlamaConfig()
    config.model_type = "lama"
    with pytest.raises(ConfigError, match=r"'lama'.*did you mean 'llama'.*known: llama"):
        spec_for(config)
