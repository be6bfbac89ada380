"""Run by ``test_dry_run.py`` in a process of its own, where Triton's interpreter is off: on the CPU with no kernel run.

Every path that a GPU would take goes to its own kernel, whose launches are recorded. Rollouts are the engine's own,
from prefill to the last burst; only what they drew is made up, as nothing is drawn. Prints one line of JSON: the
specializations, by kernel under Triton's own keys for an H200, and the CUDA sources with their macros, that the dry run
foresaw, and those that real steps asked for.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from pronghorn import FastLanguageModel, GRPOConfig, SamplingParams
from pronghorn.kernels import (
    adamw8bit_triton,
    adapted_matmul,
    adapted_matmul_cuda,
    attention_cpu,
    attention_cuda,
    attention_merge,
    decode_attention,
    glu,
    launch,
    logits,
    low_rank,
    low_rank_cuda,
    low_rank_triton,
    nf4,
    nf4_matmul,
    nf4_matmul_cuda,
    nf4_table,
    nf4_triton,
    nf4_wide_cuda,
    ordered_attention,
    ordered_matmul,
    rms_norm,
    rope,
    rope_kv,
    sample,
    scaled_blocks,
    shared_prefix,
    step_attention,
    step_attention_cuda,
)  # fmt: skip
from pronghorn.kernels.adamw8bit import BLOCK, Slot, rule
from pronghorn.kernels.attention import Choice
from pronghorn.kernels.attention import Path as Way
from pronghorn.kernels.launch import Recorded, recording
from pronghorn.loader import pretrained
from pronghorn.models import attention, dry_run
from pronghorn.models.packed_layer import prepared
from pronghorn.rollout import base
from pronghorn.rollout.native import attention as prefill_attention
from pronghorn.rollout.native import decoder, prefill, products
from pronghorn.rollout.native import engine as engine_module
from pronghorn.rollout.native.decoder import BUCKETS, Decoder
from pronghorn.rollout.native.dry_run import WALKS
from pronghorn.rollout.native.look import Drawn, Look


class H200:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def flash_backward(_do: torch.Tensor, *given: Any) -> tuple[torch.Tensor, ...]:
    """Gradients as flash lays them out; it has no kernels of ours."""
    return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in given[:3])


def as_on_a_gpu() -> None:
    """Every kernel's own side, products for few rows, and attention in the sampler's order."""
    driver.set_active(H200())  # type: ignore[arg-type]
    kernels = (
        attention_merge, decode_attention, glu, logits, nf4, nf4_table, ordered_attention, ordered_matmul,
        rms_norm, rope, rope_kv, sample, scaled_blocks,
    )  # fmt: skip
    for module in kernels:
        own: ModuleType = __import__(f"{module.__name__}_triton", fromlist=["_"])
        module._path = lambda tensor, own=own: own  # type: ignore[attr-defined]
    low_rank._path = lambda *given: low_rank_cuda if low_rank_cuda.takes(*given) else low_rank_triton
    nf4_matmul._path = lambda tensor: nf4_matmul_cuda
    step_attention._path = lambda tensor: step_attention_cuda
    nf4_triton._has_asm = lambda tensor: True
    launch._can_chain = lambda index: True  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    for counted in (adapted_matmul, adapted_matmul_cuda, nf4_matmul_cuda, nf4_wide_cuda, step_attention_cuda):
        counted.processors_of = lambda _: nf4_matmul_cuda.HOPPER_PROCESSORS  # type: ignore[assignment]
    products._on_gpu = lambda tensor: True
    ordered_matmul.LONG_SUM = 512  # the down projection's here: of an 8B model's it is 8,192
    products._MANY_OUTPUTS = 1024  # gate and up here
    launch.has_copy_engine = lambda tensor: True
    nf4_wide_cuda._LEAST_OUTPUTS = {32: 1024, 64: 512}  # gate and up, and for more rows q, k and v
    low_rank_cuda.LEAST_ROWS = BUCKETS[-1] + 1  # of 2,049: more than are decoded, less than are scored here
    attention.in_order = prefill_attention.in_order = lambda *_, **__: True  # type: ignore[assignment]
    flash = Choice(Way.FLASH, "of a GPU")
    attention.PackedAttention.choice = lambda *_, **__: flash  # type: ignore[method-assign]
    attention_cuda.flash_forward, attention_cuda.flash_backward = attention_cpu.attention_forward, flash_backward  # type: ignore[assignment]
    dry_run.table = adamw8bit_triton.Table


SOURCES = {
    "nf4_matmul.cu": nf4_matmul_cuda._source, "nf4_wide.cu": nf4_wide_cuda._source,
    "low_rank.cu": low_rank_cuda._source, "adapted_matmul.cu": adapted_matmul_cuda._source,
    **{name: partial(step_attention_cuda._source, name) for name in ("step_attention.cu", "step_attention_many.cu")},
}  # fmt: skip


def keys(recorded: Recorded) -> set[str]:
    """Triton's own keys of what was recorded: every lookup that finds nothing asks the hook, which says stop."""
    found: set[str] = set()
    for kernel, args, options in recorded.launches:

        def seen(*, repr: str, key: Any, name: str = kernel.fn.__name__, **_: Any) -> bool:
            found.add(f"{name} {repr} {key}")
            return True

        triton.knobs.runtime.jit_cache_hook = seen
        kernel.warmup(*args, grid=(1,), **options)
    for text, defines, chip in recorded.sources:
        (name,) = [name for name, own in SOURCES.items() if own() == text]
        found.add(f"{name} {sorted(defines.items())} {chip}")
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


def made_up(self: Look) -> list[Drawn]:
    """What the host sees where nothing was drawn: the same token over and over, up to each row's length."""
    found = []
    for s, covered in zip(self.sequences, self.unseen):
        n = min(covered, s.max_new - len(s.output))
        s.unseen -= covered
        found.append(Drawn([7] * n, [0.0] * n, [0.0] * n, len(s.output) + n == s.max_new))
    return found


class Prompts(prefill.Prefill):
    """By graphs, as on a GPU, which a CPU has none of: what each would hold is launched once."""

    made: set[int] = set()

    def __init__(self, walk: Any, cache: Any, query_heads: int, capture: Any) -> None:
        super().__init__(walk, cache, query_heads, lambda run: (self, run()))
        self.fixed = True

    def replay(self) -> None:
        self.made.update(self.graphs)


def rolled_out(model: Any, tokenizer: Any, hold: bool, prompts: type = prefill.Prefill) -> set[int]:
    """Rollouts of every number of rows that there is a graph for, their prompts of any length, and in chunks; the
    numbers of rows that were decoded.

    ``hold``: whether there is memory to keep weights in 16 bits.
    """
    step, seen = Decoder._step, set()

    def watched(self: Decoder, rows: int) -> None:
        seen.add(rows)
        step(self, rows)

    Look.take, Decoder._step = made_up, watched  # type: ignore[method-assign, assignment]
    decoder.Prefill = prompts  # type: ignore[misc]
    engine_module.memory_budget = lambda *_: hold << 40
    engine = base.create("native", model, tokenizer, ahead=True, max_num_seqs=BUCKETS[-1], max_prefill_tokens=384)
    params = SamplingParams(n=1, max_tokens=3, ignore_eos=True, seed=0, top_p=0.9)
    for rows in (*BUCKETS[:4], *BUCKETS[3:]):  # one twice: the second time by a graph
        engine.generate([[5 + i % 40] if i % 8 else [*range(5, 34)] for i in range(rows)], params)
    plain = SamplingParams(n=2, max_tokens=40, ignore_eos=True, seed=0)
    engine.generate([[*range(5, 5 + n)] for n in (1, 16, 37, 200, 450)], plain)
    Decoder._step = step  # type: ignore[method-assign]
    return seen


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
    folder, in_4bit = Path(sys.argv[1]), sys.argv[2] == "nf4"
    pretrained.resolve_dtype = lambda *_: (torch.bfloat16, None)  # a CPU's own would be float32
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=512, dtype=torch.bfloat16, load_in_4bit=in_4bit
    )
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32)
    as_on_a_gpu()
    with recording() as recorded, prepared(model):
        dry_run.training_step(model)
        for walk in WALKS.values():
            walk(model)
    foreseen = keys(recorded)
    with recording() as recorded:
        supervised(model, 2, 37)
        supervised(model, 1, 1)
        supervised(model, 3, 200)
        for completions, length in ((3, 21), (3, 120), (16, 150)):
            scored(model, completions, length)
        shared_prefix.GATHER = 0  # as with more keys: backward in two parts
        scored(model, 3, 21)
        optimized(model)
        decoded = rolled_out(model, tokenizer, hold=True)
        assert decoded == rolled_out(model, tokenizer, hold=False, prompts=Prompts)
    asked = keys(recorded)
    found = {"foreseen": foreseen, "asked": asked, "decoded": decoded, "prompts by graphs": Prompts.made}
    print(json.dumps({name: sorted(own) for name, own in found.items()}))


if __name__ == "__main__":
    main()
