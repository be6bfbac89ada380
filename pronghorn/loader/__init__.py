"""Loading: a model built empty and filled shard by shard, its tokenizer, LoRA on top, and a step foreseen."""

from .adapters import get_peft_model
from .foresee import plan
from .pretrained import from_pretrained

__all__ = ["from_pretrained", "get_peft_model", "plan"]
