r"""Gated linear units (arXiv:2002.05202): ``h = a(gate) * up`` with a = SiLU (SwiGLU) or GELU (GEGLU), and backward.

Backward is :math:`d\text{up} = dh \, a(g)` and :math:`d\text{gate} = dh \, \text{up} \, a'(g)`, with

- silu: :math:`a = g \sigma`, :math:`a' = \sigma (1 + g (1 - \sigma))`, :math:`\sigma` the sigmoid of g;
- gelu_pytorch_tanh: :math:`a = g (1 + \tanh u) / 2 = g \, \sigma(2u)` with
  :math:`u = \sqrt{2/\pi} \, (g + 0.044715 g^3)`; :math:`a' = \sigma + 2 g u' \sigma (1 - \sigma)`,
  :math:`u' = \sqrt{2/\pi} \, (1 + 3 \cdot 0.044715 g^2)`;
- gelu: :math:`a = g \Phi(g)`, :math:`a' = \Phi(g) + g \varphi(g)`, the normal distribution and density.

Values go to float32 at the load and are rounded once at the store; eager PyTorch rounds a(gate) as well. Each element's
gradients need only that element, so they are written over gate and up, which nothing reads again: at 14,336 columns
that saves two of the largest activations there are. h, which the gradient of ``down_proj``'s adapter needs, is made
again in the same pass where asked, instead of kept.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pronghorn.kernels.reference import glu as reference

ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")
"""transformers' names: SiLU, GELU by tanh, GELU by the error function."""


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import glu_triton

    return glu_triton


def _check(gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str, dh_TI: torch.Tensor | None = None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    for name, other in (("up", up_TI), ("dh", dh_TI)):
        if other is not None and (other.shape != gate_TI.shape or other.dtype != gate_TI.dtype):
            raise ValueError(
                f"{name} is {tuple(other.shape)} {other.dtype} and gate {tuple(gate_TI.shape)} {gate_TI.dtype}; "
                "give both one shape and one dtype"
            )
    if gate_TI.dtype == torch.float64 and gate_TI.is_cuda:
        raise ValueError(
            "gate is float64 on a GPU, whose kernel computes in float32; use pronghorn.kernels.reference.glu"
        )


def _apart(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> bool:
    """Whether each element of both has memory of its own."""
    repeated = any(step == 0 and size > 1 for t in (gate_TI, up_TI) for step, size in zip(t.stride(), t.shape))
    return not repeated and (gate_TI.data_ptr() != up_TI.data_ptr() or gate_TI.numel() == 0)


def _overwritable(gate_TI: torch.Tensor, up_TI: torch.Tensor) -> bool:
    """A leaf's values are a person's; one that takes no gradient is somebody's constant."""
    return all(t.requires_grad and not t.is_leaf for t in (gate_TI, up_TI)) and _apart(gate_TI, up_TI)


def glu_forward(
    gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str = "silu", out_TI: torch.Tensor | None = None
) -> torch.Tensor:
    """``activation(gate) * up`` without autograd, for a caller that writes its own backward.

    It is written to ``out_TI`` where given (the left part of a wider tensor, say), else to a new contiguous tensor.
    """
    _check(gate_TI, up_TI, activation, out_TI)
    h_TI: torch.Tensor = _path(gate_TI).glu_forward(gate_TI, up_TI, activation, out_TI)
    return h_TI


def glu_backward_(
    dh_TI: torch.Tensor,
    gate_TI: torch.Tensor,
    up_TI: torch.Tensor,
    want_h: bool = False,
    activation: str = "silu",
    over_dh: bool = False,
) -> torch.Tensor | None:
    """Overwrite gate with its gradient and up with its own, outside autograd: for hand-written backward passes.

    Args:
        dh_TI: gradient of h, in gate's shape and dtype.
        gate_TI: ``[..., I]``, float32, float16 or bfloat16; rows may be strided (a half of one ``[T, 2I]`` tensor).
        up_TI: same shape and dtype; must not overlap gate.
        want_h: also return h, computed again in the same pass.
        activation: one of :data:`ACTIVATIONS`.
        over_dh: write h over ``dh_TI``, which must be contiguous then.

    Returns:
        h, contiguous, or None.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or the activation is unknown.
    """
    _check(gate_TI, up_TI, activation, dh_TI)
    if not _apart(gate_TI, up_TI):
        raise ValueError("gate and up share memory, or repeat it; each is overwritten, so give each its own")
    if over_dh and not dh_TI.is_contiguous():
        raise ValueError(f"dh has strides {dh_TI.stride()}; to be overwritten by h it has to be contiguous")
    h_TI = None
    if want_h:
        h_TI = dh_TI if over_dh else torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device)
    with torch.no_grad():
        _path(gate_TI).glu_backward(dh_TI, gate_TI, up_TI, gate_TI, up_TI, h_TI, activation)
    return h_TI


class GLU(torch.autograd.Function):
    """Saves gate and up, which live on anyway, and in backward writes their gradients over them (``overwrite``).

    A leaf's values are a person's, so a leaf is never overwritten, nor its partner. Backward through the same graph
    twice raises, since the first pass has consumed what was saved.
    """

    @staticmethod
    def forward(ctx: Any, gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str, overwrite: bool) -> torch.Tensor:
        ctx.save_for_backward(gate_TI, up_TI)
        ctx.activation = activation
        ctx.overwrite = overwrite and _overwritable(gate_TI, up_TI)
        h_TI: torch.Tensor = _path(gate_TI).glu_forward(gate_TI, up_TI, activation)
        return h_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh_TI: torch.Tensor) -> Any:
        gate_TI, up_TI = ctx.saved_tensors
        if ctx.overwrite:
            dgate_TI, dup_TI = gate_TI, up_TI
        else:
            dgate_TI, dup_TI = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (gate_TI, up_TI))
        _path(gate_TI).glu_backward(dh_TI, gate_TI, up_TI, dgate_TI, dup_TI, None, ctx.activation)
        # Detached, so that a gradient is not taken for the variable whose memory it now fills.
        return dgate_TI.detach(), dup_TI.detach(), None, None


def glu(gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str = "silu", overwrite: bool = True) -> torch.Tensor:
    """``activation(gate) * up``, with gradient.

    Args:
        gate_TI: ``[..., I]``, float32, float16 or bfloat16; rows may be strided (a half of one ``[T, 2I]`` tensor).
        up_TI: same shape and dtype.
        activation: one of :data:`ACTIVATIONS`.
        overwrite: backward writes the gradients over gate and up (leaves excepted), so their values are gone after it:
            right for outputs of linear layers, which nothing reads again. Pass False to keep them.

    Returns:
        ``h_TI``, contiguous, in gate's dtype.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or the activation is unknown.
        RuntimeError: (from autograd, in backward) something else needs gate or up after they were overwritten.
    """
    _check(gate_TI, up_TI, activation)
    h_TI: torch.Tensor = GLU.apply(gate_TI, up_TI, activation, overwrite)
    return h_TI


def swiglu(gate_TI: torch.Tensor, up_TI: torch.Tensor, overwrite: bool = True) -> torch.Tensor:
    """:func:`glu` with SiLU, as in Llama."""
    return glu(gate_TI, up_TI, "silu", overwrite)


def geglu(
    gate_TI: torch.Tensor, up_TI: torch.Tensor, approximate: str = "tanh", overwrite: bool = True
) -> torch.Tensor:
    """:func:`glu` with GELU; ``approximate`` is ``"tanh"`` (Gemma) or ``"none"``, as in ``torch.nn.functional.gelu``.

    Raises:
        ValueError: ``approximate`` is neither, or as :func:`glu`.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate={approximate!r} is unknown; choose 'tanh' or 'none'")
    return glu(gate_TI, up_TI, "gelu_pytorch_tanh" if approximate == "tanh" else "gelu", overwrite)
