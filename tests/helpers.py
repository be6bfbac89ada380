"""Tiny Llamas on disk for the tests: random weights, a byte-level BPE tokenizer, Llama 3's shape in small."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOT, EOM, END = "<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"
SPECIAL = [BOS, END, "<|start_header_id|>", "<|end_header_id|>", EOM, EOT]
# The first turn carries BOS, as Llama 3's template does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_CORPUS = [
    "Tom has 12 apples and buys 7 more. How many apples does Tom have now? #### 19",
    "<reasoning>\n12 + 7 = 19\n</reasoning>\n<answer>\n19\n</answer>\n",
    "A pen costs 3 dollars. What do 5 pens cost in dollars? 3 * 5 = 15 #### 15",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "system user assistant question answer reasoning calculate respond in the following format",
]


@functools.cache
def _bpe(vocab_size: int, extra: tuple[str, ...]) -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS * 4, trainer)
    return bpe.to_str()


def tiny_tokenizer(vocab_size: int = 384, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer with Llama 3's special tokens, a chat template that writes BOS, no pad token.

    ``encode`` with special tokens prepends BOS, as Llama 3's own does. ``extra`` adds special tokens such as
    ``"<|finetune_right_pad_id|>"``.
    """
    bpe = Tokenizer.from_str(_bpe(vocab_size, extra))
    bpe.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOT)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(**overrides: Any) -> LlamaConfig:
    """LlamaConfig of about 100k parameters: grouped-query attention, untied head, unless overridden."""
    settings: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": [1, 4, 5], "tie_word_embeddings": False,
        # larger than the usual 0.02, so that a random model's logits differ clearly from token to token
        "initializer_range": 0.1,
    }  # fmt: skip
    settings.update(overrides)
    return LlamaConfig(**settings)


def tiny_llama(
    tmp_path: Path,
    *,
    name: str = "tiny-llama",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    extra_tokens: tuple[str, ...] = (),
    **overrides: Any,
) -> Path:
    """Write a random Llama with its tokenizer under ``tmp_path / name`` and return that folder.

    Args:
        dtype: dtype of the saved weights.
        max_shard_size: as in ``save_pretrained``; ``"100KB"`` makes several shards and an index.
        extra_tokens: special tokens to add to the tokenizer, inside the vocabulary.
        overrides: LlamaConfig fields, e.g. ``tie_word_embeddings=True``, ``num_key_value_heads=4``.
    """
    folder = tmp_path / name
    config = tiny_config(**overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".bias") or "norm" in parameter_name:
            # zero biases and unit norms would hide a mistake in either
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + len(parameter_name))
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=[1, 4, 5], do_sample=False)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer(min(config.vocab_size, 384), extra_tokens).save_pretrained(folder)
    return folder


def perturb(model: torch.nn.Module, scale: float = 0.05, seed: int = 1) -> None:
    """Add noise to every trainable parameter, as a training run would: a fresh LoRA's B is zero and hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.data.add_(noise.to(parameter.device, parameter.dtype))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute value of ``expected``."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Upper-tail probability of Pearson's statistic (regularised incomplete gamma)."""
    keep = probs > 0
    assert counts[~keep].sum() == 0
    expected = probs[keep] * counts.sum()
    statistic = ((counts[keep] - expected) ** 2 / expected).sum()
    freedom = keep.sum() - 1
    return torch.special.gammaincc(freedom.double() / 2, statistic.double() / 2).item()
