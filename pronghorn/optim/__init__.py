"""Optimizers: bitsandbytes' 8-bit AdamW with its classes, state and checkpoints, all tensors stepped in one launch."""

from .bitsandbytes import AdamW, AdamW8bit, PagedAdamW8bit

__all__ = ["AdamW", "AdamW8bit", "PagedAdamW8bit"]
