"""GRPO's training forward and backward with the prompt once for its completions, and once for each, in one run.

    python -m benchmarks.shared_prefix --model FOLDER [--groups 1,4] [--checkpointing memory,off]

LoRA rank 32 on all projections of a model in 4 bits; random ids. A case is
``grpo/shared-prefix/<groups>x<prompt>+<G>x<completion>/<memory>`` with ``tokens_per_s`` (completion tokens, of which
both layouts have as many), ``step_s`` (the median of alternating steps), ``packed_tokens``, ``peak_gb`` (2^30 bytes)
and ``speedup`` over the plain layout.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.results import Results, arguments, start
from benchmarks.sft import MEMORY


def rollouts(groups: int, prompt: int, count: int, tokens: int) -> list[Any]:
    """Random prompts and completions, with advantages that are not all zero."""
    import torch

    from pronghorn.grpo.rollouts import Rollout

    made = []
    for _ in range(groups):
        ids = torch.randint(5, 16000, (prompt,)).tolist()
        for i in range(count):
            completion = torch.randint(5, 16000, (tokens,)).tolist()
            made.append(Rollout(ids, completion, [-9.0] * tokens, advantage=(-1.0) ** i))
    return made


def step(loss_step: Any, made: list[Any], shared: bool, trained: list[Any]) -> tuple[float, int]:
    """Seconds of packing, forward and backward, and the tokens packed."""
    import torch

    from pronghorn.grpo.batch import pack
    from pronghorn.grpo.loss_step import window_of
    from pronghorn.grpo.metrics import Metrics

    torch.cuda.synchronize()
    begun = time.perf_counter()
    batch = pack(made, loss_step.device, loss_step.dtype, shared_prefix=shared)
    loss_step(batch, window_of(made), Metrics()).backward()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    for p in trained:
        p.grad = None
    return seconds, sum(batch.row_lengths)


def measure(results: Results, args: Any, groups: int, checkpointing: str, model: Any, loss_step: Any) -> None:
    import torch

    made = rollouts(groups, args.prompt, args.completions, args.tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    peak, packed = {}, {}
    for _ in range(args.steps):
        for shared in (True, False):
            torch.cuda.reset_peak_memory_stats()
            spent, packed[shared] = step(loss_step, made, shared, trained)
            seconds[shared].append(spent)
            peak[shared] = torch.cuda.max_memory_allocated() / 2**30
    medians = {shared: statistics.median(times[2:]) for shared, times in seconds.items()}
    scored = groups * args.completions * args.tokens
    shape = f"{groups}x{args.prompt}+{args.completions}x{args.tokens}"
    for shared, name in ((True, "pronghorn"), (False, "pronghorn-plain")):
        results.add(
            f"grpo/shared-prefix/{shape}/{MEMORY[checkpointing]}",
            name,
            tokens_per_s=scored / medians[shared],
            step_s=medians[shared],
            packed_tokens=packed[shared],
            peak_gb=peak[shared],
            speedup=medians[False] / medians[shared],
        )
        print("raw step seconds", [round(s, 4) for s in seconds[shared]])


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--groups", default="1,4", help="groups in one micro-batch, comma-separated")
    parser.add_argument("--checkpointing", default="memory,off")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    results = start("shared_prefix", (), args)
    import gc

    import torch

    from pronghorn import FastLanguageModel, GRPOConfig
    from pronghorn.grpo.loss_step import LossStep

    for checkpointing in args.checkpointing.split(","):
        model, _ = FastLanguageModel.from_pretrained(
            args.model,
            max_seq_length=args.prompt + args.tokens,
            load_in_4bit=True,
            dtype=torch.bfloat16,
            compile_ahead=False,
        )
        model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32, use_gradient_checkpointing=checkpointing)
        config = GRPOConfig(
            output_dir="unused", num_generations=args.completions, per_device_train_batch_size=args.completions,
            max_completion_length=args.tokens, report_to="none", bf16=True,
        )  # fmt: skip
        loss_step = LossStep(config, model.train())
        for groups in map(int, args.groups.split(",")):
            measure(results, args, groups, checkpointing, model, loss_step)
        del model, loss_step
        gc.collect()
        torch.cuda.empty_cache()
    results.write(args.out)


if __name__ == "__main__":
    main()
