"""NF4 with double quantization in plain PyTorch.

Bit for bit what bitsandbytes 0.50 computes on the CPU, including what it does with zero blocks and with a last block
that is not full. Blocks run flat over the flattened weight and take no notice of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pronghorn.kernels.nf4_code import (
    NESTED_BLOCKSIZE,
    NF4_BLOCKSIZE,
    dynamic_code,
    dynamic_grid,
    nf4_midpoints,
    nf4_pairs,
)
from pronghorn.kernels.nf4_layout import TILE_OUTPUTS, to_rows

# Elements handled at a time: small enough to stay in a core's cache, so that temporaries cost little and stay little.
_QUANTIZE_CHUNK = 1 << 20
_DEQUANTIZE_CHUNK = 1 << 17


def quantize_nf4(weight: torch.Tensor, blocksize: int = NF4_BLOCKSIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight of any shape to 4-bit codes and one scale a block.

    Args:
        weight: float32, float16 or bfloat16, any shape.
        blocksize: elements that share a scale; even.

    Returns:
        codes, uint8 [ceil(numel / 2)], two codes a byte with the earlier element in the high nibble (an odd last
        element is followed by the code of zero); absmax, float32 [ceil(numel / blocksize)].
    """
    flat = source(weight)
    numel, device = flat.numel(), flat.device
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=device)
    chunk = max(_QUANTIZE_CHUNK // blocksize, 1) * blocksize
    full = numel - numel % blocksize
    for start in range(0, full, chunk):
        stop = min(start + chunk, full)
        blocks = flat[start:stop].float().view(-1, blocksize)
        scale = blocks.abs().amax(dim=1)
        absmax[start // blocksize : stop // blocksize] = scale
        codes[start // 2 : stop // 2] = _pack((blocks * (1.0 / scale.clamp(min=1e-38)).unsqueeze(1)).reshape(-1))
    if full < numel:
        # The last, short block is divided by its scale where full blocks are multiplied by its inverse; bitsandbytes
        # does so too, and the two differ in the last bit.
        tail = flat[full:].float()
        scale = tail.abs().max().clamp(min=1e-38)
        absmax[-1] = scale
        codes[full // 2 :] = _pack(tail / scale)
    return codes, absmax


def source(weight: torch.Tensor) -> torch.Tensor:
    """The weight, flat.

    Raises:
        TypeError: not float32, float16 or bfloat16.
        ValueError: no elements.
    """
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"weight: dtype {weight.dtype} cannot be quantized to NF4; cast it to bfloat16 first")
    if not weight.numel():
        raise ValueError(f"weight: shape {tuple(weight.shape)} has no elements; leave this layer unquantized")
    return weight.detach().reshape(-1)


def _pack(scaled: torch.Tensor) -> torch.Tensor:
    """Nearest codes of values in [-1, 1], float32 [n], packed two a byte, uint8 [ceil(n / 2)]."""
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    code = torch.bucketize(scaled.clamp_(-1, 1), nf4_midpoints(scaled.device), out_int32=True).to(torch.uint8)
    return (code[::2] << 4) | code[1::2]


def quantize_scales(
    absmax: torch.Tensor, blocksize: int = NESTED_BLOCKSIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization (QLoRA, section 3): centre the block scales and store them in 8 bits.

    Args:
        absmax: float32 [blocks].
        blocksize: scales that share a nested scale.

    Returns:
        scales, uint8 [blocks], codes in the dynamic map; nested_absmax, float32 [ceil(blocks / blocksize)];
        offset, float32 scalar, the mean of ``absmax``.
    """
    offset = absmax.mean()
    blocks = absmax.numel()
    centred = torch.nn.functional.pad(absmax - offset, (0, -blocks % blocksize)).view(-1, blocksize)
    nested_absmax = centred.abs().amax(dim=1)
    unit = (centred * (1.0 / nested_absmax).unsqueeze(1)).clamp_(-1, 1)
    # One rounding for the multiply and the add, as the fused instruction does: both are exact in float64.
    step = (((unit + 1.0) * 0.5).double() * 65535 + 0.5).float()
    step = torch.where(nested_absmax.unsqueeze(1) == 0, 0.0, step)  # 0 * inf above; a zero block takes code 0
    scales = dynamic_grid().to(absmax.device)[step.long()].view(-1)[:blocks]
    return scales.contiguous(), nested_absmax, offset


def dequantize_scales(
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_code: torch.Tensor | None = None,
    nested_blocksize: int = NESTED_BLOCKSIZE,
) -> torch.Tensor:
    """Block scales, float32 [blocks], from 8-bit codes: nested_code[scales] * nested_absmax, rounded, + offset.

    ``scales`` in float32 are scales already (single quantization) and come back as they are.
    """
    if nested_absmax is None or offset is None:
        return scales
    code = dynamic_code(scales.device) if nested_code is None else nested_code
    level = code.index_select(0, scales.to(torch.int32))
    blocks = scales.numel()
    nested = nested_absmax.repeat_interleave(nested_blocksize)[:blocks]
    return level.mul_(nested).add_(offset)


def output(out: torch.Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``out``, checked against what will be written to it, or a new tensor where it is None.

    Raises:
        ValueError: ``out`` has another shape or dtype, or is neither contiguous nor rows at an even distance.
    """
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    rows = out.dim() == 2 and out.stride(1) == 1 and out.stride(0) >= out.shape[1]
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or not (rows or out.is_contiguous()):
        raise ValueError(
            f"out: {tuple(out.shape)}, {out.dtype}, strides {out.stride()} given; pass a {dtype} tensor of shape "
            f"{tuple(shape)}, contiguous or the left part of a wider one"
        )
    return out


def dequantize_nf4(
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    *,
    nested_code: torch.Tensor | None = None,
    blocksize: int = NF4_BLOCKSIZE,
    nested_blocksize: int = NESTED_BLOCKSIZE,
    tiled: bool = False,
) -> torch.Tensor:
    """Weights from 4-bit codes: level * scale in float32, rounded once to ``dtype``.

    Args:
        codes: uint8, ceil(numel / 2) bytes of any shape.
        scales: uint8 [blocks] with ``nested_absmax`` [ceil(blocks / nested_blocksize)] and ``offset`` (scalar), or
            float32 [blocks] with neither.
        shape: shape of the weight; its numel decides how many codes count.
        out: tensor of that shape and ``dtype`` to write to, contiguous or the left part of a wider matrix.
        nested_code: float32 [256]; the dynamic map where None.
        tiled: the codes lie in tiles (``nf4_layout.py``).

    Returns:
        The weight, ``dtype``, of ``shape``.
    """
    numel = math.prod(shape)
    absmax = dequantize_scales(scales, nested_absmax, offset, nested_code, nested_blocksize)
    result = output(out, shape, dtype, codes.device)
    whole = result if result.is_contiguous() else torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    flat, packed = whole.view(-1), codes.reshape(-1)
    # A byte's two float32 levels are moved as one 64-bit item.
    pairs = nf4_pairs(codes.device).view(torch.int64).view(-1)
    piece = math.lcm(blocksize, TILE_OUTPUTS * shape[1]) if tiled else blocksize  # whole rows of tiles, whole blocks
    chunk = max(_DEQUANTIZE_CHUNK // piece, 1) * piece
    for start in range(0, numel, chunk):
        stop = min(start + chunk, numel)
        own = packed[start // 2 : (stop + 1) // 2]
        byte = (to_rows(own, ((stop - start) // shape[1], shape[1])) if tiled else own).to(torch.int32)
        level = pairs.index_select(0, byte).view(torch.float32)[: stop - start]
        scale = absmax[start // blocksize : -(-stop // blocksize)]
        if level.numel() % blocksize:
            flat[start:stop] = level.mul_(scale.repeat_interleave(blocksize)[: stop - start])
        else:
            flat[start:stop] = level.view(-1, blocksize).mul_(scale.unsqueeze(1)).view(-1)
    return result if whole is result else result.copy_(whole)
