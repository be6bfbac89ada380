"""A linear layer whose frozen weight is held in NF4, in the state-dict keys of bitsandbytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from pronghorn.config.errors import ConfigError
from pronghorn.kernels.nf4_code import NESTED_BLOCKSIZE, NF4_BLOCKSIZE
from pronghorn.kernels.nf4_layout import takes_tiles
from pronghorn.quant.bnb import SUFFIXES, from_bnb, is_quantized, to_bnb
from pronghorn.quant.matmul import nf4_linear
from pronghorn.quant.nf4 import NF4Tensor

# Fields of NF4Tensor that are buffers of the module; the weight parameter holds ``codes``.
_BUFFERS = ("scales", "nested_absmax", "offset", "nested_code")
_ZERO_BYTE = 0x77  # two codes of the level 0.0
_left_out: ContextVar[bool] = ContextVar("left_out", default=False)


@contextmanager
def weights_left_out() -> Iterator[None]:
    """State dicts made in this thread have no 4-bit weights: to make those, every layer's codes would be copied."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)


class Linear4bit(nn.Linear):
    """``y = x @ W^T + b`` with W in NF4; a gradient reaches x and b, never W.

    Subclasses ``nn.Linear``, so that code that looks for linear layers (PEFT, ``all-linear``) finds it. ``weight`` is
    the packed codes, a uint8 Parameter [ceil(out * in / 2), 1] that asks for no gradient, in tiles where the shape
    allows it (``kernels/nf4_layout.py``); the scales are buffers. No cast (``.half()``, ``.to(dtype)``) touches either.
    The state dict has bitsandbytes' keys and order, so codes that lie in tiles are copied for it, and what is written
    to the copy changes no layer. It loads from such keys, or from a plain ``weight`` of 16 or 32 bits, which is then
    quantized. Until loaded, the weight is zero.
    """

    weight: nn.Parameter
    scales: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    nested_code: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the 16-bit weight
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        self.blocksize, self.nested_blocksize = NF4_BLOCKSIZE, NESTED_BLOCKSIZE
        self.tiled = takes_tiles((out_features, in_features), NF4_BLOCKSIZE)
        self.saved_dtype = compute_dtype  # what the saved format says the weight was made from
        numel = in_features * out_features
        blocks = -(-numel // NF4_BLOCKSIZE)
        codes = torch.full(((numel + 1) // 2, 1), _ZERO_BYTE, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        made = {
            "scales": torch.zeros(blocks, dtype=torch.uint8, device=device),
            "nested_absmax": torch.zeros(-(-blocks // NESTED_BLOCKSIZE), dtype=torch.float32, device=device),
            "offset": torch.zeros((), dtype=torch.float32, device=device),
            "nested_code": None,
        }
        for name in _BUFFERS:
            self.register_buffer(name, made[name], persistent=False)
        values = torch.zeros(out_features, dtype=compute_dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values))

    def reset_parameters(self) -> None:
        """Nothing: a 4-bit weight is loaded, never drawn."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> Linear4bit:
        """Quantize a copy of ``linear`` on its own device; the bias keeps its values, dtype and ``requires_grad``."""
        dtype = linear.weight.dtype if compute_dtype is None else compute_dtype
        layer = cls(linear.in_features, linear.out_features, False, dtype, linear.weight.device)
        if not linear.weight.is_meta:
            layer.load_weight(linear.weight)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def nf4(self) -> NF4Tensor:
        """The weight; its tensors are the module's own, so writing to them writes to the module."""
        return NF4Tensor(
            codes=self.weight.detach().view(-1),
            scales=self.scales,
            nested_absmax=self.nested_absmax,
            offset=self.offset,
            shape=(self.out_features, self.in_features),
            blocksize=self.blocksize,
            nested_blocksize=self.nested_blocksize,
            dtype=self.compute_dtype,
            nested_code=self.nested_code,
            tiled=self.tiled,
        )

    def load_weight(self, weight: torch.Tensor) -> None:
        """Quantize ``weight`` [out, in] (float32, float16 or bfloat16), where it lies, and hold the result."""
        self.load_nf4(NF4Tensor.quantize(weight, weight.dtype))

    @torch.no_grad()
    def load_nf4(self, nf4: NF4Tensor) -> None:
        """Hold ``nf4``, on the module's device (on the weight's own where the module is on the meta device).

        Tensors of the same shape are written in place, so that whoever holds their addresses (a CUDA graph) sees
        the new weight; others are replaced. ``compute_dtype`` stays.
        """
        expected = (self.out_features, self.in_features)
        if tuple(nf4.shape) != expected:
            raise ConfigError(f"weight: shape {tuple(nf4.shape)} does not fit this layer; it needs {expected}")
        if not self.weight.is_meta:
            nf4 = nf4.to(self.weight.device)
        nf4 = nf4.in_tiles()
        codes = nf4.codes.detach().reshape(-1, 1)
        if _fits(self.weight, codes):
            self.weight.copy_(codes)
        else:
            self.weight = nn.Parameter(codes, requires_grad=False)
        for name in _BUFFERS:
            held, given = getattr(self, name), getattr(nf4, name)
            if held is not None and given is not None and _fits(held, given):
                held.copy_(given)
            else:
                setattr(self, name, given)
        self.blocksize, self.nested_blocksize, self.saved_dtype = nf4.blocksize, nf4.nested_blocksize, nf4.dtype
        self.tiled = nf4.tiled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] to [..., out], in x's dtype (in autocast's dtype under autocast)."""
        return nf4_linear(x, self.nf4, self.bias)

    def extra_repr(self) -> str:
        scales = "nf4" if self.nested_absmax is None else "nf4, double quantization"
        return f"{super().extra_repr()}, {scales}, compute_dtype={self.compute_dtype}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear4bit:
        """Move as every module does, but keep the dtype of the codes and scales: a cast would corrupt them."""
        fixed = {id(t) for t in (self.weight, *(getattr(self, name) for name in _BUFFERS)) if t is not None}

        def move(t: torch.Tensor) -> torch.Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in fixed and out.dtype != t.dtype else out

        return super()._apply(move, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _left_out.get():
            del destination[f"{prefix}weight"]
            return
        saved = dataclasses.replace(self.nf4, dtype=self.saved_dtype)
        destination.update(to_bnb(saved, f"{prefix}weight"))

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        if key in state_dict:
            try:
                if is_quantized(key, state_dict):
                    self.load_nf4(from_bnb(key, state_dict))
                else:
                    self.load_weight(state_dict[key])
            except (TypeError, ValueError) as error:
                error_msgs.append(str(error))
        read = {key, *(f"{key}.{suffix}" for suffix in SUFFIXES)}
        rest = {k: v for k, v in state_dict.items() if k not in read}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [name for name in missing if name != key or key not in state_dict]


def _fits(held: torch.Tensor, given: torch.Tensor) -> bool:
    return held.shape == given.shape and held.dtype == given.dtype and held.device == given.device
