"""Supervised fine-tuning by TRL's SFTTrainer, on the answers only: teach the shipped model to answer in tags.

python examples/sft_responses_only.py                      # under a minute on two CPU cores
python examples/sft_responses_only.py --steps 200 --packing
"""

from __future__ import annotations

import argparse
import re
from importlib import resources
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from pronghorn import FastLanguageModel, SamplingParams, is_bfloat16_supported, train_on_responses_only
from pronghorn.data.gsm8k import SYSTEM_PROMPT, XML_COT_FORMAT
from pronghorn.data.synthetic import Problem, problems

TAGS = re.compile(r"<reasoning>\n.*\n</reasoning>\n<answer>\n(-?\d+)\n</answer>", re.DOTALL)


def question(problem: Problem) -> list[dict[str, str]]:
    """The prompt of one problem."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": problem.question}]


def conversations(count: int) -> Dataset:
    """Whole chats, each answered in the tags that the system prompt asks for."""
    return Dataset.from_list(
        [
            {
                "messages": [
                    *question(problem),
                    {
                        "role": "assistant",
                        "content": XML_COT_FORMAT.format(reasoning=problem.reasoning, answer=problem.result),
                    },
                ]
            }
            for problem in problems("sft", count)
        ]
    )


def measure(model: Any, count: int) -> str:
    """Greedy answers to held-out problems: how many are in the tags, and how many of those are right."""
    asked = problems("heldout", count)
    params = SamplingParams(temperature=0.0, max_tokens=120)
    outputs = model.fast_generate([question(problem) for problem in asked], sampling_params=params)
    found = [TAGS.fullmatch(output.outputs[0].text.strip()) for output in outputs]
    right = sum(match is not None and int(match[1]) == problem.result for match, problem in zip(found, asked))
    return f"in tags {sum(match is not None for match in found)} of {count}, right {right}"


def main() -> None:
    """Load, adapt, train on the answers only, and measure before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=50, help="held-out problems to measure on")
    parser.add_argument("--packing", action="store_true", help="several chats in one row, without padding")
    parser.add_argument("--output", default="sft-out")
    given = parser.parse_args()

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(resources.files("pronghorn") / "assets" / "tiny-arithmetic"), max_seq_length=512, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32)
    before = measure(model, given.problems)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=conversations(8 * given.steps),
        args=SFTConfig(
            output_dir=given.output,
            max_steps=given.steps,
            per_device_train_batch_size=2 if given.packing else 8,
            packing=given.packing,
            learning_rate=2e-3,
            warmup_steps=5,
            lr_scheduler_type="cosine",
            max_length=512,
            logging_steps=5,
            save_strategy="no",
            bf16=is_bfloat16_supported(),
            fp16=torch.cuda.is_available() and not is_bfloat16_supported(),
            report_to="none",
            seed=3407,
        ),
    )
    trainer = train_on_responses_only(
        trainer,
        instruction_part="<|start_header_id|>user<|end_header_id|>\n\n",
        response_part="<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    trainer.train()
    print(f"before: {before}\nafter:  {measure(model, given.problems)}")
    model.save_lora(f"{given.output}/adapter")


if __name__ == "__main__":
    main()
