"""Saving a trained model for others: merged into the 16-bit original, quantized again, or the adapter alone."""

from .hub import push_to_hub_merged
from .save import save_merged

__all__ = ["push_to_hub_merged", "save_merged"]
