"""One training step on a local model, as the peers' scripts measure theirs: tokens/s and peak memory.

    python -m benchmarks.sft --model FOLDER --cases nf4/2x2048,nf4/1x32768 --checkpointing memory,off

LoRA rank 32 on all projections, 8-bit paged AdamW, clipping included, random ids, median after two steps. A case is
``sft/<quant>/<batch>x<length>/<memory>`` with ``tokens_per_s``, ``step_s``, ``peak_gb`` and ``base_gb`` (2^30 bytes),
``<memory>`` being ``same-memory`` for ``memory`` and ``free-memory`` for ``off``.
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


def measure(results: Results, folder: str, case: str, checkpointing: str, steps: int, profile: bool) -> None:
    """Load, train ``steps`` steps, record."""
    import torch

    from pronghorn import FastLanguageModel
    from pronghorn.optim import PagedAdamW8bit

    quant, shape = case.split("/")
    batch, length = map(int, shape.split("x"))
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=length, load_in_4bit=quant == "nf4", dtype=torch.bfloat16
    )
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32, use_gradient_checkpointing=checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW8bit(trained, lr=5e-6)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    seconds = []
    for _ in range(steps):
        ids = torch.randint(5, 16000, (batch, length), device="cuda")
        seconds.append(step(model, optimizer, trained, ids))
    median = statistics.median(seconds[2:])
    raw = {f"raw_step_s_{number}": value for number, value in enumerate(seconds)}
    results.add(
        f"sft/{case}/{MEMORY[checkpointing]}",
        "pronghorn",
        tokens_per_s=batch * length / median,
        step_s=median,
        first_step_s=seconds[0],
        peak_gb=torch.cuda.max_memory_allocated() / 2**30,
        base_gb=base / 2**30,
        **raw,
    )
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
            step(model, optimizer, trained, ids)
        print(recorded.key_averages().table(sort_by="cuda_time_total", row_limit=24, max_name_column_width=70))
    del model, optimizer, trained
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--cases", default="nf4/2x2048")
    parser.add_argument("--checkpointing", default="memory,off")
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
    for case in args.cases.split(","):
        for checkpointing in args.checkpointing.split(","):
            measure(results, args.model, case, checkpointing, args.steps, args.profile)
    results.write(args.out)


if __name__ == "__main__":
    main()
