"""Rollouts equal to the trainer bit for bit, on the projections of an 8B Llama: two layers, a small vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pronghorn import FastLanguageModel, GRPOConfig, GRPOTrainer
from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo.batch import pack
from pronghorn.grpo.exact import require_equal
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.rollouts import Rollout
from pronghorn.rollout import base
from tests.helpers import tiny_tokenizer

PROMPTS = [[0, *range(40, 40 + n)] for n in (17, 64, 130)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=4096, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(params=[True, False], ids=["nf4", "bf16"])
def loaded(request, folder) -> Any:
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, max_seq_length=512, load_in_4bit=request.param, fast_inference=True, max_lora_rank=32
    )
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator, device="cuda") * 0.01)
    yield model, tokenizer
    base.engine_of(model, tokenizer).release()


def sampled(model: Any, tokenizer: Any, **settings: Any) -> list[Rollout]:
    params = SamplingParams(**{"n": 6, "max_tokens": 60, "seed": 1, "ignore_eos": True, **settings})
    outputs = base.engine_of(model, tokenizer).generate(PROMPTS, params)
    return [Rollout(o.prompt_token_ids, c.token_ids, c.policy_logprobs) for o in outputs for c in o.outputs]


def trainers(model: Any, rollouts: list[Rollout], temperature: float = 1.0) -> tuple[torch.Tensor, Any]:
    model.eval()
    batch = pack(rollouts, "cuda")
    with torch.no_grad():
        return score(model, batch, temperature)[0], batch


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}, {"n": 30}], ids=str)
def test_every_token_has_one_log_prob(loaded, settings):
    model, tokenizer = loaded
    rollouts = sampled(model, tokenizer, **settings)
    require_equal(*trainers(model, rollouts, settings.get("temperature", 1.0)))
    few = rollouts[:2]
    require_equal(*trainers(model, few, settings.get("temperature", 1.0)))


def test_this_gpu_keeps_the_promise_for_these_shapes(loaded):
    base.engine_of(*loaded).check_exact()


def test_prompts_by_a_graph_have_the_bits_of_launches(loaded):
    """Few tokens are launched the first time and replayed from then on, in one prefill, or two, and after a step."""
    model, tokenizer = loaded
    engine: Any = base.engine_of(model, tokenizer)
    for prompts in (PROMPTS, PROMPTS[1:2], [*PROMPTS, [7] * 300, [9] * 200]):
        params = SamplingParams(n=2, max_tokens=20, seed=3, ignore_eos=True)
        for _ in range(2):
            engine.release()
            launched = [o.outputs for o in engine.generate(prompts, params)]
            assert not engine._decoder.prefill.graphs
            for _ in range(2):
                assert [o.outputs for o in engine.generate(prompts, params)] == launched
            assert len(engine._decoder.prefill.graphs) == 1
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_B" in name:
                        p.mul_(1.5)
            replayed = [o.outputs for o in engine.generate(prompts, params)]
            assert replayed != launched
            engine.release()
            assert [o.outputs for o in engine.generate(prompts, params)] == replayed


@pytest.mark.parametrize(
    ("kernel", "n"),
    [("glu_forward", 6), ("add_norm_forward", 6), ("head_logits", 6), ("step_attention", 2)],
)
def test_a_perturbed_kernel_of_the_decode_step_is_caught(loaded, monkeypatch, kernel, n):
    """Of 18 rows, and of 6."""
    from pronghorn.rollout.native import decode_walk, paged

    model, tokenizer = loaded
    base.engine_of(model, tokenizer).release()
    owner = paged if kernel == "step_attention" else decode_walk
    honest = getattr(owner, kernel)

    def perturbed(*args: Any) -> Any:
        out = honest(*args)
        first = out[0] if isinstance(out, tuple) else out
        first[:, :8].mul_(1 + 2**-6)  # about two units in the last place of bfloat16, in 8 columns
        return out

    monkeypatch.setattr(owner, kernel, perturbed)
    logps_N, batch = trainers(model, sampled(model, tokenizer, n=n))
    base.engine_of(model, tokenizer).release()  # graphs that hold the perturbed kernel
    with pytest.raises(ArithmeticError, match="exact"):
        require_equal(logps_N, batch)


def test_training_holds_it_at_every_step(loaded, tmp_path):
    from datasets import Dataset

    model, tokenizer = loaded
    config = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=6, num_generations=6, max_completion_length=40,
        max_steps=4, learning_rate=1e-4, logging_steps=1, save_strategy="no", report_to="none", bf16=True,
        rollout_precision="exact", disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"What is {i} plus {i}?" for i in range(12)]})
    made = GRPOTrainer(
        model, lambda completion_ids, **_: [float(sum(ids)) for ids in completion_ids], config, data,
        processing_class=tokenizer,
    )  # fmt: skip
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert len(logs) == 4
    assert all(log["sampling/logp_diff_max"] == 0.0 and log["sampling/kl"] == 0.0 for log in logs)
    assert any(log["grad_norm"] > 0 for log in logs)
