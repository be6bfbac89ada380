"""Lossless from and to the state-dict format of bitsandbytes' ``Linear4bit`` (the keys transformers saves and loads).

For a weight called ``p`` the format is: ``p`` (packed codes, uint8 [ceil(numel / 2), 1]), ``p.absmax``,
``p.quant_map``, with double quantization ``p.nested_absmax`` and ``p.nested_quant_map``, and
``p.quant_state.bitsandbytes__nf4``: the JSON of the rest, as bytes in a uint8 tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from pronghorn.config.errors import ConfigError
from pronghorn.kernels.nf4_code import dynamic_code, nf4_code
from pronghorn.quant.nf4 import NF4Tensor

STATE_KEY = "quant_state.bitsandbytes__nf4"
SUFFIXES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE_KEY)
_CPU = torch.device("cpu")


def is_quantized(prefix: str, tensors: Mapping[str, Any]) -> bool:
    """Whether ``tensors`` holds weight ``prefix`` in the 4-bit format of bitsandbytes (NF4 or FP4)."""
    start = f"{prefix}.quant_state.bitsandbytes__"
    return any(key in tensors for key in (start + "nf4", start + "fp4"))


def from_bnb(prefix: str, tensors: Mapping[str, torch.Tensor]) -> NF4Tensor:
    """Read weight ``prefix`` (``"model.layers.0.mlp.up_proj.weight"``) out of a bitsandbytes state dict.

    Raises:
        ConfigError: a key is missing, the weight is not NF4, or its code book is not the standard one.
    """
    if f"{prefix}.quant_state.bitsandbytes__fp4" in tensors:
        raise ConfigError(f"{prefix}: quant_type 'fp4' is not supported; quantize the 16-bit checkpoint to NF4 instead")
    needed = [prefix, *(f"{prefix}.{name}" for name in ("absmax", "quant_map", STATE_KEY))]
    missing = [key for key in needed if key not in tensors]
    if missing:
        raise ConfigError(f"{prefix}: not a whole bitsandbytes NF4 weight, {missing} missing; re-save the checkpoint")
    state = json.loads(bytes(tensors[f"{prefix}.{STATE_KEY}"].cpu().tolist()).decode("utf-8"))
    if state["quant_type"] != "nf4":
        raise ConfigError(f"{prefix}: quant_type {state['quant_type']!r} is not supported; use an NF4 checkpoint")
    if not torch.equal(tensors[f"{prefix}.quant_map"].to(_CPU, torch.float32), nf4_code(_CPU)):
        raise ConfigError(f"{prefix}: quant_map is not the NF4 code book; quantize the 16-bit checkpoint anew")
    codes = tensors[prefix].detach()
    if codes.dtype != torch.uint8:  # bnb_4bit_quant_storage: the same bytes under another dtype
        codes = codes.contiguous().view(torch.uint8)
    absmax = tensors[f"{prefix}.absmax"].detach()
    nested_absmax = offset = nested_code = None
    if f"{prefix}.nested_absmax" in tensors:
        nested_absmax = tensors[f"{prefix}.nested_absmax"].detach().float()
        offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=codes.device)
        nested_code = tensors[f"{prefix}.nested_quant_map"].detach().float()
        if torch.equal(nested_code.to(_CPU), dynamic_code(_CPU)):
            nested_code = None
    else:
        absmax = absmax.float()
    return NF4Tensor(
        codes=codes.reshape(-1),
        scales=absmax.reshape(-1),
        nested_absmax=nested_absmax,
        offset=offset,
        shape=tuple(state["shape"]),
        blocksize=int(state["blocksize"]),
        nested_blocksize=int(state.get("nested_blocksize", 256)),
        dtype=getattr(torch, state["dtype"]),
        nested_code=nested_code,
    )


def to_bnb(nf4: NF4Tensor, prefix: str) -> dict[str, torch.Tensor]:
    """The entries that bitsandbytes would save for weight ``prefix``; scales are shared, not copied, and so are codes
    that lie row by row.

    On the meta device, where the offset has no value, the JSON entry is empty.
    """
    nf4, device = nf4.in_rows(), nf4.codes.device
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": nf4.blocksize,
        "dtype": str(nf4.dtype).removeprefix("torch."),
        "shape": list(nf4.shape),
    }
    entries = {
        prefix: nf4.codes.view(-1, 1),
        f"{prefix}.absmax": nf4.scales,
        f"{prefix}.quant_map": nf4_code(device).clone(),  # a copy each: safetensors refuses shared tensors
    }
    if nf4.nested_absmax is not None and nf4.offset is not None:
        code = dynamic_code(device) if nf4.nested_code is None else nf4.nested_code
        entries[f"{prefix}.nested_absmax"] = nf4.nested_absmax
        entries[f"{prefix}.nested_quant_map"] = code.clone()
        if not nf4.offset.is_meta:
            state |= {
                "nested_blocksize": nf4.nested_blocksize,
                "nested_dtype": "float32",
                "nested_offset": nf4.offset.item(),
            }
    text = b"" if device.type == "meta" else json.dumps(state).encode("utf-8")
    entries[f"{prefix}.{STATE_KEY}"] = torch.tensor(list(text), dtype=torch.uint8, device="cpu").to(device)
    return entries
