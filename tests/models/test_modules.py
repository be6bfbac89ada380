"""The block that calls its projections: base weights train through Pronghorn's kernels, and hooks run."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pronghorn.config.errors import ConfigError
from pronghorn.models import attach, modules
from pronghorn.models.attention import PackedAttention
from pronghorn.models.forward import hidden_states, logits
from tests.models.test_attach import make, relative

LENGTHS = [7, 1, 12, 5]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd-sizes": {"hidden_size": 42, "intermediate_size": 77, "num_attention_heads": 3, "num_key_value_heads": 1,
                  "head_dim": 10},
    "gelu-tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip


def pair(dtype: torch.dtype = torch.float64, **overrides: Any) -> tuple[Any, Any]:
    plain = make(**overrides).to(dtype)
    for name, parameter in plain.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    fast = copy.deepcopy(plain)
    attach(fast)
    for module in plain.modules():
        if isinstance(module, LlamaRMSNorm):
            module.forward = MethodType(exact_norm, module)
    return plain.train(), fast.train()


def exact_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """transformers computes norms in float32 whatever it is given, which would hide what float64 is to show."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def packed(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and the logits of four packed rows."""
    generator = torch.Generator().manual_seed(3)
    ids_T = torch.randint(3, 101, (sum(LENGTHS),), generator=generator)
    positions_T = torch.cat([torch.arange(n) for n in LENGTHS])
    return ids_T, logits(model, hidden_states(model, ids_T, positions_T, PackedAttention(LENGTHS, "cpu")))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_base_weight_gets_transformers_gradient(shape: str, checkpointing: bool) -> None:
    plain, fast = pair(**SHAPES[shape])
    if checkpointing:
        fast.gradient_checkpointing_enable()
    ids_T, ours = packed(fast)
    theirs = torch.cat([plain(input_ids=row[None]).logits[0] for row in ids_T.split(LENGTHS)])
    assert relative(ours.detach(), theirs.detach()) < 1e-12
    probe = torch.randn_like(theirs)
    (ours * probe).sum().backward()
    (theirs * probe).sum().backward()
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters()):
        assert relative(a.grad, b.grad) < 1e-11, name


def test_the_kernels_do_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    for name in ("rms_norm", "glu", "rope_"):
        function = getattr(modules, name)

        def counted(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            calls.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(modules, name, counted)
    _, fast = pair()
    packed(fast)
    assert [calls.count(name) for name in ("rms_norm", "glu", "rope_")] == [2 * 3 + 1, 3, 3]
    assert "because of a norm that trains" in capsys.readouterr().out


def test_hooks_run_and_what_they_keep_stays_as_it_was() -> None:
    plain, fast = pair()
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layer = fast.model.layers[1]
    watched = {
        "input_layernorm": layer.input_layernorm, "post_attention_layernorm": layer.post_attention_layernorm,
        "mlp": layer.mlp, "q_proj": layer.self_attn.q_proj, "gate_proj": layer.mlp.gate_proj, "norm": fast.model.norm,
    }  # fmt: skip
    for name, module in watched.items():

        def keep(_: Any, __: Any, output: torch.Tensor, name: str = name) -> None:
            kept[name] = (output, output.detach().clone())

        module.register_forward_hook(keep)
    ids_T, ours = packed(fast)
    theirs = torch.cat([plain(input_ids=row[None]).logits[0] for row in ids_T.split(LENGTHS)])
    assert relative(ours.detach(), theirs.detach()) < 1e-6  # a hooked norm is transformers', in float32
    ours.sum().backward()
    theirs.sum().backward()
    assert relative(layer.mlp.gate_proj.weight.grad, plain.model.layers[1].mlp.gate_proj.weight.grad) < 1e-5
    assert set(kept) == set(watched)
    for name, (output, copied) in kept.items():
        assert torch.equal(output, copied), name


def test_a_hook_that_would_never_run_is_refused() -> None:
    _, fast = pair()
    handle = fast.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="LlamaAttention would not run"):
        packed(fast)
    handle.remove()
    packed(fast)


def test_a_replaced_forward_is_called() -> None:
    plain, fast = pair()
    fast.model.layers[0].mlp.forward = lambda x: torch.zeros_like(x)
    plain.model.layers[0].mlp.forward = lambda x: torch.zeros_like(x)
    ids_T, ours = packed(fast)
    theirs = torch.cat([plain(input_ids=row[None]).logits[0] for row in ids_T.split(LENGTHS)])
    assert relative(ours.detach(), theirs.detach()) < 1e-12
