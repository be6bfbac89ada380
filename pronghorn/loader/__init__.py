"""Loading: a transformers model built empty and filled shard by shard, its tokenizer, and LoRA on top."""

from .adapters import get_peft_model
from .pretrained import from_pretrained

__all__ = ["from_pretrained", "get_peft_model"]
