"""Builds the small model that Pronghorn ships, from nothing: tokenizer, data, weights, card.

    python examples/tiny/train.py                      # rebuilds pronghorn/assets/tiny-arithmetic
    python examples/tiny/train.py --steps 0 --init-from DIR   # only evaluates

A Llama of some 2.7 million parameters, trained by `pronghorn.sft` (packed rows, response-only labels) on synthetic
arithmetic word problems. On a GPU it runs in bf16 with float32 masters, on the CPU in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from evaluate import evaluate
from optimizer import MasterAdamW
from responses import Responses, chat, response
from tokenizer import train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from pronghorn import models
from pronghorn.data.synthetic import problems, stream
from pronghorn.sft.collator import PackingCollator

ASSET = Path(__file__).parents[2] / "pronghorn" / "assets" / "tiny-arithmetic"
CARD = Path(__file__).with_name("card.md")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSET, help="folder of the finished model")
    parser.add_argument("--init-from", type=Path, help="go on from this model folder instead of from nothing")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps; 0 only evaluates")
    parser.add_argument("--tokens-per-step", type=int, default=32768)
    parser.add_argument(
        "--micro-tokens", type=int, help="tokens of one forward (default: all on a GPU, 4096 on the CPU)"
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of the cosine schedule")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--eval", type=int, default=500, help="held-out problems at the end; 0 for none")
    parser.add_argument("--dev-every", type=int, default=0, help="steps between looks at 250 problems of the dev split")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--workers", type=int, help="processes that make the data (default: 12 on a GPU, 0 on the CPU)")
    return parser.parse_args()


def build_tokenizer(vocab: int) -> Any:
    """Trained on 20,000 rendered chats of the training split."""
    rng = random.Random("tokenizer")
    texts = []
    for problem in itertools.islice(stream("sft", seed=10_001), 20_000):
        # The special tokens are added tokens, so the text between them is what merges are learned from.
        texts += [message["content"].strip() for message in chat(problem)] + [response(problem, rng)]
        texts += ["system", "user", "assistant", "\n\n"]
    return train_tokenizer(texts, vocab)


def build_model(tokenizer: Any, hidden: int, layers: int, head_dim: int = 32) -> Any:
    """A Llama with grouped queries (two query heads a key/value head) and tied embeddings, float32."""
    heads = hidden // head_dim
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=head_dim,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Residual writers start smaller, as in GPT-2: a deep sum of unit-variance updates would swamp the embedding.
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(linear.weight, std=config.initializer_range / math.sqrt(2 * layers))
    return model


class Progress(TrainerCallback):
    """One line every 50 steps, and the dev accuracy where asked."""

    def __init__(self, tokenizer: Any, dev_every: int) -> None:
        self.tokenizer = tokenizer
        self.dev_every = dev_every
        self.dev = problems("dev", 250, seed=1) if dev_every else []
        self.started = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            seconds = time.time() - self.started
            loss, lr = float(logs["loss"]), float(logs["learning_rate"])
            print(f"step {state.global_step} loss {loss:.4f} lr {lr:.2e} {seconds:.0f} s", flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.dev and state.global_step % self.dev_every == 0:
            found = evaluate(model, self.tokenizer, self.dev)
            print(
                f"step {state.global_step} dev accuracy {found['accuracy']:.3f} number {found['number']:.3f}",
                flush=True,
            )


def train(model: Any, tokenizer: Any, options: argparse.Namespace) -> float:
    """Trains in place for `options.steps` steps; the seconds it took."""
    sample = Responses(tokenizer, 200, seed=options.seed)
    mean = sum(len(sample[i]["input_ids"]) for i in range(len(sample))) / len(sample)
    cpu = options.device == "cpu"
    micro = min(options.tokens_per_step, options.micro_tokens or (4096 if cpu else options.tokens_per_step))
    accumulation = max(1, round(options.tokens_per_step / micro))
    batch = max(1, round(micro / mean))
    print(f"{mean:.0f} tokens an example, {batch} x {accumulation} examples a step, {options.steps} steps", flush=True)
    data = Responses(tokenizer, options.steps * batch * accumulation, seed=options.seed)
    optimizer = MasterAdamW(model.parameters(), lr=options.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, options.steps // 10 + 1), options.steps)
    workers = options.workers if options.workers is not None else (0 if cpu else 12)
    args = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
        logging_steps=50 if options.steps >= 200 else 5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=workers,
        dataloader_pin_memory=not cpu,
        dataloader_drop_last=True,
        use_cpu=cpu,
        seed=options.seed,
    )
    models.attach(model)
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=PackingCollator(),
        train_dataset=data,
        optimizers=(optimizer, schedule),
        callbacks=[Progress(tokenizer, options.dev_every)],
    )
    trainer.remove_callback(PrinterCallback)  # `Progress` prints the same in one line
    started = time.time()
    trainer.train()
    models.detach(model)
    return time.time() - started


def write_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Weights in bf16, both configs, tokenizer and template."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end_of_text|>")],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)  # written as 0600, which another user of an installed package could not read
    tokenizer.save_pretrained(out)


def save(model: Any, tokenizer: Any, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """The model, its card, and the evaluation as JSON."""
    out: Path = options.out
    write_model(model, tokenizer, out)
    kept = {key: value for key, value in report.items() if key != "samples"}
    (out / "evaluation.json").write_text(json.dumps(kept, indent=2) + "\n")
    fields = {"accuracy": "not measured", "number": "not measured", "problems": 0, **report}
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    (out / "README.md").write_text(CARD.read_text().format(**fields, megabytes=f"{size:.1f}"))


def main() -> None:
    options = arguments()
    set_seed(options.seed)
    if options.init_from is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.init_from)
        model = AutoModelForCausalLM.from_pretrained(options.init_from, dtype=torch.float32)
    elif options.steps == 0:
        raise SystemExit("--steps 0 only evaluates: give the model with --init-from")
    else:
        tokenizer = build_tokenizer(options.vocab)
        model = build_model(tokenizer, options.hidden, options.layers)
    model.to(device=options.device, dtype=torch.float32 if options.device == "cpu" else torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {len(tokenizer)} tokens, {options.device} {model.dtype}", flush=True)
    report: dict[str, Any] = {
        "parameters": parameters,
        "steps": options.steps,
        "tokens_per_step": options.tokens_per_step,
        "seed": options.seed,
        "lr": options.lr,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }
    if options.steps:
        report["seconds"] = round(train(model, tokenizer, options), 1)
    model.to(torch.bfloat16)  # what ships is what is measured
    if options.device == "cpu":
        model.float()
    if options.eval:
        report |= evaluate(model, tokenizer, problems("heldout", options.eval, seed=0))
    if options.steps:
        save(model, tokenizer, options, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
