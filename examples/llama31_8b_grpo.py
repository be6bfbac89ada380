"""Teach Llama-3.1-8B to reason on GSM8K: 4-bit model, LoRA, five rewards, GRPO, try it, save it. One GPU.

python examples/llama31_8b_grpo.py                                    # model and data from the hub
python examples/llama31_8b_grpo.py --model ./llama --dataset ./gsm8k --max-steps 10
"""

from __future__ import annotations

import argparse
from typing import Any

from pronghorn import FastLanguageModel, PatchFastRL, SamplingParams, is_bfloat16_supported
from pronghorn.data.gsm8k import SYSTEM_PROMPT, get_gsm8k_questions
from pronghorn.rewards.gsm8k import (
    correctness_reward_func,
    int_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    xmlcount_reward_func,
)

PatchFastRL("GRPO", FastLanguageModel)

from trl import GRPOConfig, GRPOTrainer  # noqa: E402 - after PatchFastRL these names are Pronghorn's

MAX_SEQ_LENGTH = 512
LORA_RANK = 32


def load(name: str) -> tuple[Any, Any]:
    """The model in 4 bits with LoRA on all seven projections, and its tokenizer."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=name,
        max_seq_length=MAX_SEQ_LENGTH,
        load_in_4bit=True,
        fast_inference=True,
        max_lora_rank=LORA_RANK,
        gpu_memory_utilization=0.6,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=LORA_RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        lora_alpha=LORA_RANK,
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    return model, tokenizer


def training_args(max_steps: int, output: str) -> GRPOConfig:
    """The settings as the flow's users write them."""
    return GRPOConfig(
        use_vllm=True,
        learning_rate=5e-6,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        warmup_ratio=0.1,
        lr_scheduler_type="cosine",
        optim="paged_adamw_8bit",
        logging_steps=1,
        bf16=is_bfloat16_supported(),
        fp16=not is_bfloat16_supported(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        num_generations=6,
        max_prompt_length=256,
        max_completion_length=200,
        max_steps=max_steps,
        save_steps=250,
        max_grad_norm=0.1,
        report_to="none",
        output_dir=output,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="meta-llama/Llama-3.1-8B-Instruct", help="hub name or folder")
    parser.add_argument("--dataset", default="openai/gsm8k", help="hub name, or a folder with train.jsonl")
    parser.add_argument("--max-steps", type=int, default=250)
    parser.add_argument("--output", default="outputs")
    parser.add_argument("--adapter", default="grpo_saved_lora", help="where the adapter is saved")
    parser.add_argument("--merged", default="model", help="where the merged 16-bit model is saved")
    options = parser.parse_args()

    model, tokenizer = load(options.model)
    dataset = get_gsm8k_questions(path_or_hub=options.dataset)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[
            xmlcount_reward_func,
            soft_format_reward_func,
            strict_format_reward_func,
            int_reward_func,
            correctness_reward_func,
        ],
        args=training_args(options.max_steps, options.output),
        train_dataset=dataset,
    )
    trainer.train()

    model.save_lora(options.adapter)
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=1024)
    chat = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "calculate 11111 * 111"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    for name, adapter in (("base model", None), ("trained", model.load_lora(options.adapter))):
        output = model.fast_generate([text], sampling_params=sampling_params, lora_request=adapter)[0].outputs[0].text
        print(f"--- {name}\n{output}\n")
    model.save_pretrained_merged(options.merged, tokenizer, save_method="merged_16bit")


if __name__ == "__main__":
    main()
