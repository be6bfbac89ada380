"""Memory is flat over steps: 300 steps of mixed lengths end as step 10 did, on the GPU and on the host."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.equal_models import packed_rows, use_plan
from pronghorn.lora.config import register
from pronghorn.models import attach
from pronghorn.models.host_memory import HostMemory
from pronghorn.models.keep import Keep
from pronghorn.models.offload import HostStore, host_store
from pronghorn.models.plan import LayerPlan, TrainingPlan
from pronghorn.models.state import ATTRIBUTE, ModelState
from pronghorn.optim import PagedAdamW8bit
from pronghorn.quant.linear4bit import Linear4bit

STEPS, VOCABULARY, LAYERS = 300, 2003, 6
BUCKETS = (64, 200, 512, 1024, 1900, 4096)
"""Most tokens of a step, in the order that steps go through; the last one is filled to the brim."""
SEGMENT = 1 << 24
"""Bytes of a segment of host memory here: many a step, so that growth would show."""

_HOST = LayerPlan(Keep.ATTENTION, host=True)
PLANS: dict[str, str | LayerPlan | TrainingPlan] = {
    "off": "off",
    "memory": "memory",
    "auto": "auto",
    "offloaded": _HOST,
    "mixed": TrainingPlan((_HOST,) * 4 + (LayerPlan(Keep.CORE, host=True), LayerPlan(Keep.INPUT)), mlp_rows=512),
}


def mixed_lengths(steps: int, seed: int = 0) -> list[list[int]]:
    """The rows of each step: from one to four of random lengths, buckets in turn, each to 80% at least."""
    rng = random.Random(seed)
    found = []
    for step in range(steps):
        most = BUCKETS[step % len(BUCKETS)]
        tokens = most if most == BUCKETS[-1] else rng.randint(most * 4 // 5, most)
        cuts = sorted(rng.sample(range(1, tokens), rng.randrange(4)))
        found.append([b - a for a, b in zip([0, *cuts], [*cuts, tokens])])
    return found


def small_model(device: str) -> Any:
    """Six layers under LoRA, projections in 4 bits, as the loader leaves a model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=VOCABULARY, pad_token_id=0, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device, torch.bfloat16).requires_grad_(False)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Linear4bit.from_linear(child))
    setattr(model, ATTRIBUTE, ModelState(4096, torch.bfloat16, load_in_4bit=True))
    wrapped = get_peft_model(model, register(LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")))
    attach(wrapped)
    return wrapped.train()


def train(model: Any, lengths: list[list[int]], device: str, optimizer: Any) -> Iterator[None]:
    """A step of training on random rows of each of ``lengths``; nothing of it is held when it yields."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for step, rows in enumerate(lengths):
        model(**packed_rows(rows, VOCABULARY, device, seed=step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostStore]:
    """The GPU's store of offloaded activations with small segments, empty before and after."""
    gc.collect()  # the model of the test before: a cycle, which would go at some step of this one
    torch.cuda.empty_cache()
    own = host_store(torch.cuda.current_device())
    monkeypatch.setattr(own, "memory", HostMemory(segment=SEGMENT))
    yield own
    assert own.memory.used == 0


@pytest.mark.parametrize("plan", PLANS)
def test_300_steps_of_mixed_lengths_end_as_step_10_did(plan: str, store: HostStore) -> None:
    model = small_model("cuda")
    use_plan(model, PLANS[plan])
    optimizer = PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    allocated, reserved, host = [], [], []
    for _ in train(model, mixed_lengths(STEPS), "cuda", optimizer):
        allocated.append(torch.cuda.memory_allocated())
        reserved.append(torch.cuda.memory_reserved())
        host.append(store.memory.reserved)
    print(plan, "allocated", allocated[9], allocated[-1], "reserved", reserved[99], reserved[-1], "host", host[-1])
    assert abs(allocated[-1] - allocated[9]) <= 2**20, (allocated[9], allocated[-1])
    assert max(allocated[9:]) - min(allocated[9:]) <= 2**20, "memory is held between some steps and not between others"
    assert reserved[-1] <= 1.05 * max(reserved[:100]), (max(reserved[:100]), reserved[-1])
    assert host[-1] == host[49], (host[49], host[-1])
    if plan in ("offloaded", "mixed"):
        assert host[-1] >= 2 * SEGMENT, "nothing went to the host: the test would see no growth there"
