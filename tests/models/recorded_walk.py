"""Run by ``test_dry_run.py`` in a process of its own, where Triton's interpreter is off: on the CPU with no kernel run.

Every path that a GPU would take goes to its Triton kernel, whose launches are recorded. Prints one line of JSON: the
specializations, under Triton's own keys for an H200, that the dry run foresaw, and those that real steps asked for.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from pronghorn import FastLanguageModel, GRPOConfig
from pronghorn.kernels import (
    adamw8bit_triton,
    attention_merge,
    decode_attention,
    glu,
    logits,
    low_rank,
    nf4,
    ordered_attention,
    rms_norm,
    rope,
    rope_kv,
    sample,
)  # fmt: skip
from pronghorn.kernels.adamw8bit import BLOCK, Slot, rule
from pronghorn.kernels.launch import Recorded, recording
from pronghorn.kernels.sample_state import SampleState, Variant
from pronghorn.models import attention, dry_run
from pronghorn.models.packed_layer import prepared, prepared_layers
from pronghorn.models.tree import unwrap
from pronghorn.rollout.native.decode_walk import DecodeWalk
from pronghorn.rollout.native.dry_run import rollout_steps
from pronghorn.rollout.native.kv_cache import KVCache, KVShape
from pronghorn.rollout.native.paged import PagedDecode


class H200:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def as_on_a_gpu() -> None:
    """Every kernel's Triton side, and attention in the sampler's order."""
    driver.set_active(H200())  # type: ignore[arg-type]
    kernels = (
        attention_merge, decode_attention, glu, logits, low_rank, nf4, ordered_attention, rms_norm, rope, rope_kv,
        sample,
    )  # fmt: skip
    for module in kernels:
        own: ModuleType = __import__(f"{module.__name__}_triton", fromlist=["_"])
        module._path = lambda tensor, own=own: own  # type: ignore[attr-defined]
    attention.in_order = lambda *_, **__: True  # type: ignore[assignment]
    cpu = attention.choose(None, torch.bfloat16, 64, None)  # of flash, which has no kernels of ours
    attention.PackedAttention.choice = lambda *_, **__: cpu  # type: ignore[method-assign]
    dry_run.table = adamw8bit_triton.Table


def keys(recorded: Recorded) -> set[str]:
    """Triton's own keys of what was recorded: every lookup that finds nothing asks the hook, which says stop."""
    found: set[str] = set()

    def seen(*, repr: str, key: Any, **_: Any) -> bool:
        found.add(f"{repr} {key}")
        return True

    triton.knobs.runtime.jit_cache_hook = seen
    for kernel, args, options in recorded.launches:
        kernel.warmup(*args, grid=(1,), **options)
    return found


def supervised(model: Any, batch: int, length: int) -> None:
    ids = torch.randint(5, 300, (batch, length))
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()


def scored(model: Any, completions: int, length: int) -> None:
    from benchmarks.shared_prefix import rollouts
    from pronghorn.grpo.loss_step import LossStep, window_of
    from pronghorn.grpo.metrics import Metrics

    config = GRPOConfig(
        output_dir="unused", num_generations=completions, per_device_train_batch_size=completions,
        max_completion_length=length, report_to="none", bf16=False, use_cpu=True, beta=0.1,
    )  # fmt: skip
    step = LossStep(config, model)
    made = rollouts(1, 11, completions, length)
    step.annotate(made, completions)
    step(step.pack(made), window_of(made), Metrics()).backward()


@torch.no_grad()
def decoded(model: Any, rows: int, positions: int) -> None:
    base = unwrap(model)
    with prepared(model):
        found = prepared_layers(model)
        assert found is not None
        cache = KVCache(KVShape.of(base), 8, 16)
        counts = torch.zeros(rows, dtype=torch.int32)
        table = torch.zeros(rows, -(-positions // 16), dtype=torch.int32)
        walk = DecodeWalk(model, found, rows, positions)
        walk(torch.zeros(rows, dtype=torch.int64), PagedDecode(cache, table, counts, counts, 4))
    vocab = base.config.vocab_size
    state = SampleState(rows, vocab, 77, penalties=False)
    sample.sample_step(torch.zeros(rows, vocab), state, Variant(truncated=True))


def optimized(model: Any) -> None:
    trained = [p.detach() for p in model.parameters() if p.requires_grad]

    def scales(p: torch.Tensor) -> torch.Tensor:
        return torch.zeros(-(-p.numel() // BLOCK))

    def codes(p: torch.Tensor) -> torch.Tensor:
        return torch.zeros(p.numel(), dtype=torch.uint8)

    slots = [Slot(p, codes(p), codes(p), scales(p), scales(p)) for p in trained]
    made = adamw8bit_triton.Table(slots, torch.zeros(256), torch.zeros(256))
    made.step(trained, [0] * len(slots), [rule(1e-4, (0.9, 0.99), 1e-8, 0.1, 3)])


def main() -> None:
    folder = Path(sys.argv[1])
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=512, dtype=torch.bfloat16)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    as_on_a_gpu()
    with recording() as recorded, prepared(model):
        dry_run.training_step(model)
        rollout_steps(model)
    foreseen = keys(recorded)
    with recording() as recorded:
        supervised(model, 2, 37)
        supervised(model, 1, 1)
        supervised(model, 3, 200)
        scored(model, 3, 21)
        optimized(model)
        for rows, positions in ((1, 320), (6, 700), (7, 64)):
            decoded(model, rows, positions)
    print(json.dumps({"foreseen": sorted(foreseen), "asked": sorted(keys(recorded))}))


if __name__ == "__main__":
    main()
