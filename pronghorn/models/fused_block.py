r"""A decoder layer as one autograd node: pre-norm attention with rotary positions, then a gated MLP.

With :math:`n_i` the norms, :math:`P` LoRA projections, R the rotation and :math:`\phi` the gate's activation:

.. math:: q, k, v = P_{qkv}(n_1(h)), \quad h' = h + P_o(\mathrm{attn}(Rq, Rk, v)), \quad
          g, u = P_{gu}(n_2(h')), \quad h'' = h' + P_d(\phi(g) u).

Backward walks it in reverse with what :class:`Keep` says was kept, and makes the rest again. The last projection's
output is never recomputed: its gradient needs only its input, which :math:`\phi(g) u` gives back in the pass that makes
:math:`dg` and :math:`du`. The gradients of g and u overwrite g and u.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..kernels.glu import ACTIVATIONS, glu, glu_backward_
from ..kernels.rms_norm import norm_backward, norm_forward
from ..kernels.rope import rotate_
from ..lora.fused import adapter_gradients, input_gradient, project, project_backward
from ..lora.projection import Projection, hooked, read_projection
from .attention import Attention


class Keep(enum.Enum):
    """What a layer keeps between forward and backward, besides its input.

    INPUT: nothing; everything but the last projection is computed again.
    ATTENTION: q, k, v, the attention's output and h'; only gate and up are computed again.
    ALL: those and gate and up; only norms and element-wise products are computed again.
    """

    INPUT = "input"
    ATTENTION = "attention"
    ALL = "all"


@dataclass(frozen=True)
class Parts:
    """A layer's pieces: its projections in the order q, k, v, o, gate, up, down, its norms and its sizes."""

    projections: tuple[Projection, ...]
    norm1_D: torch.Tensor
    norm2_D: torch.Tensor
    eps: float
    head_dim: int
    scale: float
    layer_idx: int
    activation: str

    @property
    def qkv(self) -> tuple[Projection, ...]:
        return self.projections[:3]

    @property
    def o(self) -> tuple[Projection, ...]:
        return self.projections[3:4]

    @property
    def gate_up(self) -> tuple[Projection, ...]:
        return self.projections[4:6]

    @property
    def down(self) -> tuple[Projection, ...]:
        return self.projections[6:]

    def trainables(self) -> list[torch.Tensor | None]:
        """A and B of every projection, in order."""
        return [t for p in self.projections for t in (p.a_rI, p.b_Or)]


def read_parts(layer: Any, activation: str) -> Parts | str:
    """``layer`` (Llama's names) as :class:`Parts`, or in words why its own sub-modules have to be called."""
    attn, mlp = layer.self_attn, layer.mlp
    if activation not in ACTIVATIONS:
        return f"hidden_act={activation!r}"
    for module in (attn, mlp, layer.input_layernorm, layer.post_attention_layernorm):
        if hooked(module):
            return f"a hook on {type(module).__name__}"
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    if any(w.requires_grad for w in norms):
        return "a norm that trains"
    found = []
    for module in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        projection = read_projection(module)
        if isinstance(projection, str):
            return projection
        found.append(projection)
    eps = float(layer.input_layernorm.variance_epsilon)
    return Parts(tuple(found), *norms, eps, attn.head_dim, attn.scaling, attn.layer_idx, activation)


class _Attended:
    """The differentiable attention core, run apart from the outer graph; its own backward frees its own graph."""

    def __init__(self, parts: Parts, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.inputs = tuple(t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad():
            q, k, v = self.inputs
            self.output = attention(parts.layer_idx, q, k, v, parts.scale)

    def backward(self, do_THE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.output, self.inputs, do_THE)


def _heads(x_TI: torch.Tensor, head_dim: int) -> torch.Tensor:
    return x_TI.view(x_TI.shape[0], -1, head_dim)


def _attend(
    parts: Parts, attention: Attention, rope_TE: tuple[torch.Tensor, torch.Tensor], hidden_TD: torch.Tensor
) -> tuple[_Attended, torch.Tensor | None]:
    """The first half up to the attention's output; also ``x A^T`` of q, k, v."""
    normed_TD, _ = norm_forward(hidden_TD, parts.norm1_D, parts.eps)
    (q, k, v), low = project(normed_TD, parts.qkv)
    q_THE, k_TKE, v_TKE = (_heads(t, parts.head_dim) for t in (q, k, v))
    rotate_(q_THE, k_TKE, *rope_TE)
    return _Attended(parts, attention, q_THE, k_TKE, v_TKE), low


class _FusedBlock(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        rope_TE: tuple[torch.Tensor, torch.Tensor],
        attention: Attention,
        parts: Parts,
        keep: Keep,
        *trainables: torch.Tensor | None,
    ) -> torch.Tensor:
        attended, low_qkv = _attend(parts, attention, rope_TE, hidden_TD)
        o_TI = attended.output.detach().reshape(hidden_TD.shape[0], -1)
        (y_TD,), low_o = project(o_TI, parts.o)
        middle_TD = y_TD.add_(hidden_TD)
        normed_TD, _ = norm_forward(middle_TD, parts.norm2_D, parts.eps)
        (gate_TI, up_TI), low_gu = project(normed_TD, parts.gate_up)
        del normed_TD
        product_TI = glu(gate_TI, up_TI, parts.activation)
        (out_TD,), _ = project(product_TI, parts.down)
        out_TD.add_(middle_TD)
        ctx.rope, ctx.attention, ctx.parts, ctx.keep = rope_TE, attention, parts, keep
        ctx.attended = ctx.lows = ctx.gated = None
        kept = [hidden_TD]
        if keep is not Keep.INPUT:
            ctx.attended, ctx.lows = attended, (low_qkv, low_o)
            kept.append(middle_TD)
        if keep is Keep.ALL:
            ctx.gated = (gate_TI, up_TI, low_gu)
        ctx.save_for_backward(*kept)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> Any:
        parts: Parts = ctx.parts
        hidden_TD, *rest = ctx.saved_tensors
        T = hidden_TD.shape[0]
        if ctx.attended is None:
            attended, low_qkv = _attend(parts, ctx.attention, ctx.rope, hidden_TD)
            o_TI = attended.output.detach().reshape(T, -1)
            (y_TD,), low_o = project(o_TI, parts.o)
            middle_TD = y_TD.add_(hidden_TD)
        else:
            attended, (low_qkv, low_o) = ctx.attended, ctx.lows
            o_TI = attended.output.detach().reshape(T, -1)
            (middle_TD,) = rest
        normed_TD, rstd_T = norm_forward(middle_TD, parts.norm2_D, parts.eps)
        if ctx.gated is None:
            (gate_TI, up_TI), low_gu = project(normed_TD, parts.gate_up)
        else:
            gate_TI, up_TI, low_gu = ctx.gated
        dproduct_TI, g_down = input_gradient((dout_TD,), parts.down)
        assert dproduct_TI is not None
        product_TI = glu_backward_(dproduct_TI, gate_TI, up_TI, want_h=True, activation=parts.activation)
        assert product_TI is not None
        del dproduct_TI
        d_down = adapter_gradients((dout_TD,), g_down, product_TI, None, parts.down)
        del product_TI
        dnormed_TD, d_gate_up = project_backward((gate_TI, up_TI), normed_TD, low_gu, parts.gate_up)
        del gate_TI, up_TI, normed_TD
        ctx.gated = None
        assert dnormed_TD is not None
        dmiddle_TD = norm_backward(dnormed_TD, dout_TD, middle_TD, parts.norm2_D, rstd_T)
        del dnormed_TD
        do_TI, d_o = project_backward((dmiddle_TD,), o_TI, low_o, parts.o)
        assert do_TI is not None
        dq_THE, dk_TKE, dv_TKE = attended.backward(do_TI.view_as(attended.output))
        del attended, o_TI, do_TI
        ctx.attended = None
        cos_TE, sin_TE = ctx.rope
        rotate_(dq_THE, dk_TKE, cos_TE, sin_TE, transpose=True)
        normed_TD, rstd_T = norm_forward(hidden_TD, parts.norm1_D, parts.eps)
        dqkv = [t.reshape(T, -1) for t in (dq_THE, dk_TKE, dv_TKE)]
        need_dx = ctx.needs_input_grad[0]
        dnormed_TD, d_qkv = project_backward(dqkv, normed_TD, low_qkv, parts.qkv, need_dx)
        dhidden_TD = None
        if dnormed_TD is not None:
            dhidden_TD = norm_backward(dnormed_TD, dmiddle_TD, hidden_TD, parts.norm1_D, rstd_T)
        return dhidden_TD, None, None, None, None, *d_qkv, *d_o, *d_gate_up, *d_down


def fused_block(
    parts: Parts, hidden_TD: torch.Tensor, rope_TE: tuple[torch.Tensor, torch.Tensor], attention: Attention, keep: Keep
) -> torch.Tensor:
    """One decoder layer over packed tokens, ``[T, D]`` to ``[T, D]``, keeping what ``keep`` says for backward."""
    result: torch.Tensor = _FusedBlock.apply(hidden_TD, rope_TE, attention, parts, keep, *parts.trainables())
    return result
