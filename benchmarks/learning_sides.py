"""The two sides of ``benchmarks/learning.py``, each in a process of its own: Pronghorn's trainer, and TRL's."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Turns(TrainerCallback):
    """Waits for its turn after every step, and hands over what the step took and brought.

    Args:
        line: the parent's end of the pipe says "go"; ours sends a record a step, and None at the end.
        measure: ``measure(model)`` gives the held-out metrics.
        every: steps between measurements.
    """

    def __init__(self, line: Any, measure: Any, every: int) -> None:
        self.line, self.measure, self.every = line, measure, every
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.line.send("loaded")
        self.line.recv()
        self._hand_over({"step": 0, **self.measure(model)})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        if not logs or "reward" not in logs:
            return
        step = state.global_step
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what is still queued would run in the other side's turn
        record = {"step": step, "seconds": round(time.perf_counter() - self.started, 4)}
        for name in ("reward", "reward_std", "completions/mean_length", "entropy", "grad_norm", "loss"):
            record[name] = round(float(logs[name]), 5)
        if step % self.every == 0 or step == state.max_steps:
            record |= self.measure(model)
        self._hand_over(record)

    def _hand_over(self, record: dict[str, Any]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.line.send(record)
        self.line.recv()
        self.started = time.perf_counter()


def problems(options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """(training rows, held-out rows), chats with answers; of a mixture each with its ``kind``."""
    from pronghorn.config.errors import ConfigError
    from pronghorn.data.gsm8k import as_prompts, load_gsm8k
    from pronghorn.data.synthetic import arithmetic_dataset

    split, count, problems = options["split"], options["train_problems"], options["problems"]
    if options["data"] == "synthetic":
        train = arithmetic_dataset("grpo", count, seed=seed)
        held = arithmetic_dataset(split, problems, seed=20_000)
    elif options["data"] == "mixed":
        from benchmarks.mixture import mixed_dataset

        train = mixed_dataset("grpo", count, options["gsm8k"], seed=seed)
        held = mixed_dataset(split, problems, options["gsm8k"], seed=20_000)
    else:
        if split != "heldout":
            raise ConfigError(f"--split {split}: GSM8K alone has no such split; give --data mixed, or leave it out")
        source = "openai/gsm8k" if options["data"] == "gsm8k" else options["data"]
        train = load_gsm8k(source, "train").shuffle(seed=seed)
        train = train.select(range(min(count, len(train))))
        held = load_gsm8k(source, "test").shuffle(seed=0)
        held = held.select(range(min(problems, len(held))))
    return as_prompts(train), as_prompts(held)


def settings(options: dict[str, Any], seed: int, folder: str) -> dict[str, Any]:
    """Fields of GRPOConfig, the same on both sides: those of ``pronghorn quickstart``."""
    from pronghorn.rewards.gsm8k import FIVE_REWARDS, correctness_reward_func

    cuda = options["device"] == "cuda"
    weights = [1.0 if f is correctness_reward_func else options["format_weight"] for f in FIVE_REWARDS]
    return {
        "output_dir": folder, "learning_rate": options["learning_rate"], "adam_beta1": 0.9, "adam_beta2": 0.99,
        "weight_decay": 0.1, "warmup_steps": 0.1, "lr_scheduler_type": "cosine", "optim": "adamw_torch",
        "logging_steps": 1, "per_device_train_batch_size": options["prompts"] * options["generations"],
        "num_generations": options["generations"], "max_completion_length": options["max_completion_length"],
        "reward_weights": weights, "scale_rewards": "none", "max_steps": options["steps"], "save_strategy": "no",
        "max_grad_norm": 0.1, "disable_tqdm": True, "seed": seed, "report_to": "none", "bf16": cuda,
        "use_cpu": not cuda, "gradient_checkpointing": False, "temperature": 1.0,
    }  # fmt: skip


def load(options: dict[str, Any], seed: int) -> tuple[Any, Any]:
    """Pronghorn's model with a fresh adapter that ``seed`` decides, 16-bit weights on a GPU and float32 on the CPU."""
    from pronghorn import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        options["model"], max_seq_length=options["max_seq_length"], load_in_4bit=False
    )
    rank = options["lora_rank"]
    return FastLanguageModel.get_peft_model(model, r=rank, lora_alpha=rank, random_state=seed), tokenizer


class HeldOut:
    """Greedy accuracy on problems that nothing trains on; ``heldout/number`` counts right numbers in whatever format,
    and of a mixture each kind has its own ``heldout/<kind>``."""

    def __init__(self, options: dict[str, Any], held: Any) -> None:
        from pronghorn import AccuracyEval, SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=options["max_completion_length"])
        self.asked = AccuracyEval(held, params=params, prefix="")
        self.answers = list(held["answer"])
        self.kinds = list(held["kind"]) if "kind" in held.column_names else []

    def __call__(self, model: Any) -> dict[str, float]:
        from pronghorn.data.answers import number_matches

        result = self.asked(model)
        found = self.asked.metrics(result)
        right = [number_matches(texts[0], answer) for texts, answer in zip(result.responses, self.answers)]
        found["heldout/number"] = sum(right) / len(right)
        for kind in dict.fromkeys(self.kinds):
            own = [row[0] for row, its in zip(result.right, self.kinds) if its == kind]
            found[f"heldout/{kind}"] = sum(own) / len(own)
        return found


def run(line: Any, trainer: Any, turns: Turns) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(turns)
    trainer.train()
    line.send(None)


def pronghorn_side(line: Any, options: dict[str, Any], seed: int, folder: str) -> None:
    """GRPO by Pronghorn."""
    from pronghorn import GRPOConfig, GRPOTrainer
    from pronghorn.rewards.gsm8k import FIVE_REWARDS

    train, held = problems(options, seed)
    model, tokenizer = load(options, seed)
    measure = HeldOut(options, held)
    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=list(FIVE_REWARDS), train_dataset=train,
        args=GRPOConfig(**settings(options, seed, folder), overwrite_output_dir=True),
    )  # fmt: skip
    run(line, trainer, Turns(line, measure, options["eval_every"]))


def trl_side(line: Any, options: dict[str, Any], seed: int, folder: str) -> None:
    """GRPO by TRL on transformers + PEFT, from the same adapter."""
    import peft
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    from pronghorn.models import state_of
    from pronghorn.rewards.gsm8k import FIVE_REWARDS

    train, held = problems(options, seed)
    twin, tokenizer = load(options, seed)  # evaluates; and gives the adapter to begin with
    twin.save_lora(str(Path(folder) / "start"))
    device, dtype = next(twin.parameters()).device, state_of(twin).compute_dtype
    base = transformers.AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype).to(device)
    model = peft.PeftModel.from_pretrained(base, Path(folder) / "start", is_trainable=True)
    heldout = HeldOut(options, held)

    def measure(model: Any) -> dict[str, float]:
        state = peft.get_peft_model_state_dict(model)
        peft.set_peft_model_state_dict(twin, {name: tensor.detach().clone() for name, tensor in state.items()})
        return heldout(twin)

    trainer = GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=list(FIVE_REWARDS), train_dataset=train,
        args=GRPOConfig(**settings(options, seed, folder)),
    )  # fmt: skip
    run(line, trainer, Turns(line, measure, options["eval_every"]))


SIDES: dict[str, Callable[[Any, dict[str, Any], int, str], None]] = {"pronghorn": pronghorn_side, "trl": trl_side}


def serve(line: Any, name: str, options: dict[str, Any]) -> None:
    """Run a side for every (seed, folder) that comes, until None does: kernels and imports are paid for once."""
    torch.set_num_threads(options["threads"])
    while (order := line.recv()) is not None:
        SIDES[name](line, options, *order)
        gc.collect()  # trainers and models refer to themselves
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
