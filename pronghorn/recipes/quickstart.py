"""The whole flow on the shipped model: load in 4 bits, LoRA, GRPO with five rewards, try, save, reload, report."""

from __future__ import annotations

import dataclasses
import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from transformers import PrinterCallback

from ..api import FastLanguageModel
from ..config.quickstart import QuickstartConfig
from ..config.sampling import SamplingParams
from ..data.gsm8k import SYSTEM_PROMPT, as_prompts
from ..data.synthetic import arithmetic_dataset
from ..export.verify import verify_merged
from ..grpo.config import GRPOConfig
from ..grpo.trainer import GRPOTrainer
from ..report import build as build_report
from ..report.record import record
from ..report.stats import decompose_gain, wilson_interval
from ..rewards.gsm8k import FIVE_REWARDS, correctness_reward_func
from .console import StepBar, accuracy_table, bar, quiet
from .evaluate import Evaluation, evaluate

MODEL = "tiny-arithmetic"
QUESTION = "Tom has 7 boxes with 8 apples in each box. How many apples does Tom have?"
HELDOUT_SEED = 20_000  # the held-out problems are the same for every run, so that runs can be compared
VERIFIED_PROMPTS = 32


def shipped_model() -> Path:
    """The folder of the model that the package ships."""
    return Path(str(resources.files("pronghorn"))) / "assets" / MODEL


def trainer_arguments(config: QuickstartConfig, output: Path) -> GRPOConfig:
    """GRPOConfig of the quickstart: the flow's settings, at the size of a small model."""
    return GRPOConfig(
        output_dir=str(output / "checkpoints"),
        learning_rate=config.learning_rate,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        logging_steps=1,
        per_device_train_batch_size=config.prompts_per_step * config.num_generations,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        reward_weights=[1.0 if f is correctness_reward_func else config.format_weight for f in FIVE_REWARDS],
        scale_rewards="none",  # a group whose rewards differ by a hundredth should not weigh as one that differs by 2
        max_steps=config.steps,
        save_strategy="no",
        max_grad_norm=0.1,
        log_completions=True,
        log_completions_steps=config.sample_every,
        num_completions_to_print=3,
        log_unique_prompts=True,
        disable_tqdm=True,
        seed=config.seed,
        report_to="none",
        bf16=False,
    )


def train(model: Any, tokenizer: Any, config: QuickstartConfig, console: Console, output: Path) -> list[float]:
    """GRPO for ``config.steps`` steps; returns the mean reward of each step."""
    data = as_prompts(arithmetic_dataset("grpo", config.train_problems, seed=config.seed))
    steps = StepBar(console)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=list(FIVE_REWARDS),
        args=trainer_arguments(config, output),
        train_dataset=data,
        callbacks=[steps],
    )
    trainer.remove_callback(PrinterCallback)  # the bar shows what it would print
    trainer.train()
    return steps.rewards


def run(config: QuickstartConfig | None = None, console: Console | None = None) -> dict[str, Any]:
    """Run the flow; returns what it wrote to ``summary.json`` in ``config.output_dir``."""
    with quiet():
        return _run(config or QuickstartConfig(), console or Console())


def _run(config: QuickstartConfig, console: Console) -> dict[str, Any]:
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(shipped_model()), max_seq_length=512, load_in_4bit=config.load_in_4bit, max_lora_rank=config.lora_rank
    )
    model = FastLanguageModel.get_peft_model(
        model, r=config.lora_rank, lora_alpha=config.lora_rank, random_state=config.seed
    )
    heldout = as_prompts(arithmetic_dataset("heldout", config.problems, seed=HELDOUT_SEED))

    def measure(when: str) -> Evaluation:
        with bar(console, transient=True) as progress:
            task = progress.add_task(f"held-out problems, {when} training", total=config.problems, note="")
            return evaluate(
                model,
                heldout["prompt"],
                heldout["answer"],
                config.max_completion_length,
                progress=lambda done, total: progress.update(task, completed=done),
            )

    before = measure("before")
    rewards = train(model, tokenizer, config, console, output)
    after = measure("after")
    console.print(accuracy_table(before, after))
    matches = save_and_reload(model, tokenizer, heldout["prompt"][:VERIFIED_PROMPTS], config, output, console)
    summary = summarize(config, before, after, rewards, matches, time.monotonic() - started)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(gain_in_words(summary))
    record(output, dataclasses.asdict(config))
    report = build_report(output)
    try_it(model, config, console)
    console.print(f"summary {output / 'summary.json'}   report {report}   {summary['seconds']:.0f} s")
    return summary


def save_and_reload(
    model: Any, tokenizer: Any, prompts: list[Any], config: QuickstartConfig, output: Path, console: Console
) -> bool:
    """Save adapter and merged model; check the merged one, in plain transformers, against original + adapter."""
    model.save_lora(str(output / "adapter"))
    model.save_pretrained_merged(str(output / "merged"), tokenizer, save_method="merged_16bit")
    check = verify_merged(
        str(output / "merged"),
        base=str(shipped_model()),
        adapter=str(output / "adapter"),
        prompts=prompts,
        max_new_tokens=config.max_completion_length,
    )
    console.print(f"merged model, reloaded in transformers: {check.describe()}")
    return check.matches


def summarize(
    config: QuickstartConfig,
    before: Evaluation,
    after: Evaluation,
    rewards: list[float],
    merged_matches: bool,
    seconds: float,
) -> dict[str, Any]:
    """The contents of ``summary.json``; accuracies are shares in [0, 1]."""
    window = max(1, min(5, len(rewards) // 2))
    gain = decompose_gain(before.in_tags, before.number, after.in_tags, after.number)
    return {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "accuracy_before_ci": list(wilson_interval(sum(before.in_tags), len(before.in_tags))),
        "accuracy_after_ci": list(wilson_interval(sum(after.in_tags), len(after.in_tags))),
        "number_before": before.number_accuracy,
        "number_after": after.number_accuracy,
        "number_before_ci": list(wilson_interval(sum(before.number), len(before.number))),
        "number_after_ci": list(wilson_interval(sum(after.number), len(after.number))),
        "gain_format": gain.format,
        "gain_arithmetic": gain.arithmetic,
        "problems": len(before.in_tags),
        "reward_first": sum(rewards[:window]) / window,
        "reward_last": sum(rewards[-window:]) / window,
        "steps": len(rewards),
        "seconds": round(seconds, 1),
        "seed": config.seed,
        "merged_matches": merged_matches,
    }


def gain_in_words(summary: dict[str, Any]) -> str:
    """One sentence that splits the gain into format and arithmetic."""
    gain = summary["accuracy_after"] - summary["accuracy_before"]
    return (
        f"Of the {gain * 100:+.1f} points of accuracy, {summary['gain_format'] * 100:+.1f} come from answering in the "
        f"tags more often (format) and {summary['gain_arithmetic'] * 100:+.1f} from getting more numbers right "
        f"(arithmetic); the right number in any format went from {summary['number_before']:.1%} to "
        f"{summary['number_after']:.1%}."
    )


def try_it(model: Any, config: QuickstartConfig, console: Console) -> None:
    """Answer one prompt with the trained adapter, as the flow ends."""
    chat = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": QUESTION}]
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=config.max_completion_length, seed=config.seed)
    text = model.fast_generate([chat], sampling_params=params)[0].outputs[0].text
    console.print(Panel(text.strip(), title=QUESTION, title_align="left"))
