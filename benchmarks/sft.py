"""One training step on a local model, as the peers' scripts measure theirs: tokens/s and peak memory.

    python -m benchmarks.sft --model FOLDER --cases nf4/2x2048/memory,nf4/2x2048/off,nf4/1x32768/memory/5

LoRA rank 32 on all projections, paged 8-bit AdamW, clipping included, random ids, median after two steps. A case is
``<quant>/<batch>x<length>/<use_gradient_checkpointing>[/<steps>]``; a model is loaded once for the cases that follow
one another with the same quant. Results are ``sft/<quant>/<batch>x<length>/<memory>`` with ``tokens_per_s``,
``step_s``, ``first_step_s``, every ``raw_step_s_<n>``, ``peak_gb`` and ``base_gb`` (2^30 bytes) and what the plan
foresaw, ``plan_step_s`` and ``plan_peak_gb``; ``<memory>`` is ``same-memory`` for ``memory``, ``free-memory`` for
``off``. ``auto@10.9`` in its place is the fastest plan of a process that may use 10.9 GB of the GPU, with what is
reserved and what the plan leaves free; it is recorded as ``within-10.9gb``. ``load/8b`` is the time of
``from_pretrained`` in seconds.
"""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

from benchmarks.results import Results, arguments, peer_results, start

MEMORY = {"memory": "same-memory", "auto": "auto-memory", "off": "free-memory"}


def step(model: Any, optimizer: Any, trained: list[Any], ids: Any) -> float:
    """Seconds of one step."""
    import torch

    torch.cuda.synchronize()
    begun = time.perf_counter()
    model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def load(results: Results, folder: str, quant: str) -> tuple[Any, Any, list[Any]]:
    """Model under LoRA, optimizer, trained parameters; the time of loading is recorded."""
    import torch

    from pronghorn import FastLanguageModel
    from pronghorn.optim import PagedAdamW8bit

    begun = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=2048,
        load_in_4bit=quant == "nf4",
        dtype=torch.bfloat16,
        compile_ahead=False,
    )
    torch.cuda.synchronize()
    results.add(f"load/8b/{quant}", "pronghorn", s=time.perf_counter() - begun)
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32, use_gradient_checkpointing="memory")
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, PagedAdamW8bit(trained, lr=5e-6), trained


def measure(results: Results, loaded: tuple[Any, Any, list[Any]], case: str, steps: int, profile: bool) -> None:
    """Train ``steps`` steps, record."""
    import torch

    from pronghorn.models import checkpointing
    from pronghorn.models.tree import layers

    model, optimizer, trained = loaded
    quant, shape, mode = case.split("/")
    batch, length = map(int, shape.split("x"))
    mode, _, limit = mode.partition("@")
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(limit) * 2**30 / total if limit else 1.0)
    checkpointing.set_mode(model, "off")
    checkpointing.set_mode(model, mode)  # plans are made anew, for this limit
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    seconds = []
    for _ in range(steps):
        ids = torch.randint(5, 16000, (batch, length), device="cuda")
        seconds.append(step(model, optimizer, trained, ids))
    median = statistics.median(seconds[2:] if len(seconds) > 3 else seconds[1:])
    plan = checkpointing.step_plan_for(layers(model)[0])
    foreseen = {} if plan is None else {"plan_step_s": plan.step_seconds, "plan_peak_gb": plan.peak_bytes / 2**30}
    results.add(
        f"sft/{quant}/{shape}/{f'within-{limit}gb' if limit else MEMORY[mode]}",
        "pronghorn",
        tokens_per_s=batch * length / median,
        step_s=median,
        first_step_s=seconds[0],
        peak_gb=torch.cuda.max_memory_allocated() / 2**30,
        base_gb=base / 2**30,
        **foreseen,
        **{f"raw_step_s_{number}": value for number, value in enumerate(seconds)},
    )
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            step(model, optimizer, trained, ids)
        print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90))


def main() -> None:
    import torch

    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--cases", default="nf4/2x2048/memory,nf4/2x2048/off")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    peers = peer_results(args.peer)
    packages = {"hf": ("transformers", "peft", "bitsandbytes"), "liger": ("liger-kernel",), "unsloth": ("unsloth",)}
    results = start("sft", tuple(name for peer in peers for name in packages[peer]), args)
    for name, runs in peers.items():
        for run in runs:
            case = f"sft/{run['quant']}/{run['bs']}x{run['seq']}/same-memory"
            results.add(
                case,
                name,
                tokens_per_s=run["tok_s"],
                step_s=run["step_s"],
                peak_gb=run["peak_gb"],
                base_gb=run["base_gb"],
            )
    loaded, of = None, ""
    for case in args.cases.split(","):
        quant, shape, mode, *count = case.split("/")
        if quant != of:
            loaded = None  # the model before is freed first
            gc.collect()
            torch.cuda.empty_cache()
            loaded, of = load(results, args.model, quant), quant
        assert loaded is not None
        measure(results, loaded, f"{quant}/{shape}/{mode}", int(count[0]) if count else args.steps, args.profile)
    results.write(args.out)


if __name__ == "__main__":
    main()
