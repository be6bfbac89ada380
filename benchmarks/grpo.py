"""The GRPO flow at its users' own settings on a local model: seconds a step, load, first step, memory.

    python -m benchmarks.grpo --model FOLDER --dataset FOLDER [--steps 10]

4-bit base, LoRA rank 32 on all projections, 6 completions of 200 tokens of one GSM8K prompt a step, AdamW in 8 bits.
Random weights never end a completion, so every completion has its full length. Rewards: correctness, digits, and a
length reward, so that advantages are not all zero. Case ``grpo/blog``: metrics ``s_per_step`` (median after the second
step), ``load_s``, ``first_step_s``, ``peak_gb`` (allocated), ``used_gb`` (of the GPU, all told); GB are 2^30 bytes.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.results import Results, arguments, peer_results, start

CASE = "grpo/blog"

PACKAGES = {"trl": ("trl", "peft", "bitsandbytes"), "unsloth": ("unsloth",), "unsloth-vllm": ("unsloth", "vllm")}
"""Distributions whose versions are recorded beside each peer."""


def _final(text: str) -> str:
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def correctness(completions: Any, answer: list[str], **_: Any) -> list[float]:
    return [2.0 if _final(c[0]["content"]) == a else 0.0 for c, a in zip(completions, answer)]


def digits(completions: Any, **_: Any) -> list[float]:
    return [0.5 if _final(c[0]["content"]).isdigit() else 0.0 for c in completions]


def length(completions: Any, **_: Any) -> list[float]:
    return [len(c[0]["content"]) * 1e-3 for c in completions]


class Clock:
    """Seconds of each step, as a callback of transformers (made by :func:`clock`)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0

    def begin(self) -> None:
        import torch

        torch.cuda.synchronize()
        self.begun = time.perf_counter()

    def end(self) -> None:
        import torch

        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Watch(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.end()

        return Watch()


def load(folder: str) -> tuple[Any, Any]:
    """The 4-bit model and its tokenizer, as the flow loads them."""
    from pronghorn import FastLanguageModel

    return FastLanguageModel.from_pretrained(
        folder, max_seq_length=512, load_in_4bit=True, fast_inference=True, max_lora_rank=32
    )


def adapt(model: Any) -> Any:
    """The model under the flow's adapters."""
    from pronghorn import FastLanguageModel

    return FastLanguageModel.get_peft_model(
        model, r=32, lora_alpha=32, use_gradient_checkpointing="unsloth", random_state=3407
    )


def trainer_of(model: Any, tokenizer: Any, dataset: str, steps: int, clock: Clock) -> Any:
    """The flow's trainer at its users' own settings."""
    from pronghorn import GRPOConfig, GRPOTrainer
    from pronghorn.data.gsm8k import get_gsm8k_questions

    config = GRPOConfig(
        use_vllm=True, learning_rate=5e-6, adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.1, warmup_ratio=0.1,
        lr_scheduler_type="cosine", optim="paged_adamw_8bit", logging_steps=1, bf16=True,
        per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=6, max_prompt_length=256,
        max_completion_length=200, max_steps=steps, save_strategy="no", max_grad_norm=0.1, report_to="none",
        output_dir="/tmp/pronghorn-benchmark", overwrite_output_dir=True,
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[correctness, digits, length],
        args=config,
        train_dataset=get_gsm8k_questions(path_or_hub=dataset).select(range(512)),
        callbacks=[clock.callback()],
    )


def add_peers(results: Results, peers: dict[str, list[dict[str, Any]]]) -> None:
    """What the peers' ``seed_flow.py`` printed, as rows of ours."""
    for name, runs in peers.items():
        for run in runs:
            steps = run["step_s"]
            results.add(
                CASE,
                name,
                s_per_step=statistics.median(steps[2:]),
                load_s=run["load_s"],
                first_step_s=steps[0],
                peak_gb=run["peak_gb"],
                used_gb=run["used_gb"],
            )


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--save-merged", default=None, help="folder that gets the merged model at the end")
    args = parser.parse_args()
    started = time.perf_counter()
    import torch

    peers = peer_results(args.peer)
    results = start("grpo", tuple(dict.fromkeys(name for peer in peers for name in PACKAGES[peer])), args)
    add_peers(results, peers)
    model, tokenizer = load(args.model)
    model = adapt(model)
    loaded = time.perf_counter() - started
    clock = Clock()
    trainer = trainer_of(model, tokenizer, args.dataset, args.steps, clock)
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    trainer.train()
    trained = time.perf_counter() - begun
    seconds = clock.seconds
    free, total = torch.cuda.mem_get_info()
    print("step seconds", [round(s, 3) for s in seconds])
    logged = [{k: v for k, v in row.items() if k != "epoch"} for row in trainer.state.log_history if "loss" in row]
    print("last log", logged[-1] if logged else None)
    # A step begins after its batch was generated when the loader runs ahead, so the mean over the run is stated too.
    results.add(
        CASE,
        "pronghorn",
        s_per_step=statistics.median(seconds[2:]) if len(seconds) > 2 else seconds[-1],
        s_per_step_mean=trained / args.steps,
        load_s=loaded,
        first_step_s=seconds[0],
        peak_gb=torch.cuda.max_memory_allocated() / 2**30,
        used_gb=(total - free) / 2**30,
        **{f"raw_step_s_{number}": value for number, value in enumerate(seconds)},
    )
    if args.save_merged:
        model.save_pretrained_merged(args.save_merged, tokenizer)
    results.write(args.out)


if __name__ == "__main__":
    main()
