"""Where scripts for this flow import ``train_on_responses_only`` from."""

from __future__ import annotations

from .sft.responses import train_on_responses_only

__all__ = ["train_on_responses_only"]
