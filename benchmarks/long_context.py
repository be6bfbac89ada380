"""Long context in little memory: one SFT step of 100,000 tokens, and GRPO on 8 completions of 20,000.

    python -m benchmarks.long_context --model FOLDER [--tokens 102400 --limit-gb 24 --steps 1]
    python -m benchmarks.long_context --model FOLDER --task grpo [--prompt 1024 --completions 8 --length 20000]

The process may use ``--limit-gb`` (2^30 bytes) of the GPU, weights included: beyond it the allocator raises. A 4-bit
model, LoRA rank 32 on all projections, 8-bit paged AdamW, clipping included, random ids. GRPO's is one micro-batch of
one prompt, laid once for its completions. A case is ``long-context/sft/1x<tokens>`` or
``long-context/grpo/<prompt>+<G>x<length>`` with ``tokens_per_s`` and ``step_s`` (of the last step), ``peak_gb``
(allocated), ``reserved_gb`` and ``limit_gb``; the plan is printed as a line.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.results import Results, arguments, start
from benchmarks.shared_prefix import rollouts
from pronghorn import FastLanguageModel, GRPOConfig
from pronghorn.grpo.loss_step import LossStep, window_of
from pronghorn.grpo.metrics import Metrics
from pronghorn.models import unwrap
from pronghorn.models.checkpointing import PLANNER
from pronghorn.optim import PagedAdamW8bit

GIB = 2**30
LIMITS = {"sft": 24.0, "grpo": 30.0}

Loss = Callable[[], torch.Tensor]


def sft_loss(model: Any, tokens: int) -> Loss:
    """The loss of one row of random ids, all of them labels."""
    ids = torch.randint(5, min(16000, model.config.vocab_size), (1, tokens), device=model.device)

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return found

    return loss


def grpo_loss(model: Any, prompt: int, completions: int, length: int) -> Loss:
    """GRPO's loss of one group of random completions, packed behind one prompt."""
    config = GRPOConfig(
        output_dir="unused", num_generations=completions, per_device_train_batch_size=completions,
        max_completion_length=length, report_to="none", bf16=model.dtype == torch.bfloat16,
    )  # fmt: skip
    loss_step = LossStep(config, model)
    made = rollouts(1, prompt, completions, length)
    return lambda: loss_step(loss_step.pack(made), window_of(made), Metrics())


def step(loss: Loss, optimizer: Any, trained: list[Any]) -> float:
    """Seconds of one optimizer step.

    Raises:
        FloatingPointError: the loss or the gradient's norm is not finite.
    """
    _wait()
    begun = time.perf_counter()
    value = loss()
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    _wait()
    seconds = time.perf_counter() - begun
    if not (value.isfinite() and norm.isfinite()):
        raise FloatingPointError(f"loss {float(value.detach())}, gradient norm {float(norm)}")
    return seconds


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def case_of(args: Any) -> tuple[str, int]:
    """The case's name and the tokens that a step trains on."""
    if args.task == "sft":
        return f"long-context/sft/1x{args.tokens}", args.tokens
    return f"long-context/grpo/{args.prompt}+{args.completions}x{args.length}", args.completions * args.length


def measure(results: Results, args: Any, limit_gb: float) -> None:
    case, tokens = case_of(args)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(limit_gb * GIB / total, 1.0))
    longest = args.tokens if args.task == "sft" else args.prompt + args.length
    model, _ = FastLanguageModel.from_pretrained(
        args.model,
        max_seq_length=longest,
        load_in_4bit=True,
        dtype=torch.bfloat16,
        compile_ahead=False,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=32, use_gradient_checkpointing=args.checkpointing
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW8bit(trained, lr=5e-6)
    torch.manual_seed(0)
    if args.task == "sft":
        loss = sft_loss(model, args.tokens)
    else:
        loss = grpo_loss(model, args.prompt, args.completions, args.length)
    torch.cuda.reset_peak_memory_stats()
    seconds = [step(loss, optimizer, trained) for _ in range(args.steps)]
    print(unwrap(model).__dict__[PLANNER].current.line(), flush=True)
    results.add(
        case,
        "pronghorn",
        tokens_per_s=tokens / seconds[-1],
        step_s=seconds[-1],
        first_step_s=seconds[0],
        peak_gb=torch.cuda.max_memory_allocated() / GIB,
        reserved_gb=torch.cuda.max_memory_reserved() / GIB,
        limit_gb=limit_gb,
    )


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=tuple(LIMITS), default="sft")
    parser.add_argument("--tokens", type=int, default=102400, help="of the SFT row")
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--length", type=int, default=20000, help="tokens of a completion")
    parser.add_argument("--limit-gb", type=float, default=None, help="default: 24 for sft, 30 for grpo")
    parser.add_argument("--checkpointing", default="auto")
    parser.add_argument("--steps", type=int, default=1)
    args = parser.parse_args()
    results = start(f"long_context_{args.task}", (), args)
    measure(results, args, LIMITS[args.task] if args.limit_gb is None else args.limit_gb)
    results.write(args.out)


if __name__ == "__main__":
    main()
