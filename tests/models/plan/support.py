"""The shapes that the plan's tests reason about."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from pronghorn.models.plan import ModelShape

EIGHT_B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 384, "tie_word_embeddings": False,
}  # fmt: skip


def config(**overrides: Any) -> LlamaConfig:
    return LlamaConfig(**{**EIGHT_B, **overrides})


def shape(settings: dict[str, Any] | None = None, **overrides: Any) -> ModelShape:
    """Llama-3.1-8B under rank 32, unless overridden; ``settings`` are fields of the config."""
    return ModelShape.from_config(config(**(settings or {})), **{"r": 32, **overrides})
