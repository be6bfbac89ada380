"""NF4 quantize and dequantize: Triton on CUDA, plain PyTorch elsewhere. See ``reference/nf4.py`` for the arithmetic."""

from __future__ import annotations

from pronghorn.kernels.reference.nf4 import dequantize_nf4, quantize_nf4, quantize_scales

__all__ = ["dequantize_nf4", "quantize_nf4", "quantize_scales"]
