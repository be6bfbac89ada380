r"""A decoder layer as one autograd node: pre-norm attention with rotary positions, then a gated MLP.

With :math:`n_i` the norms, :math:`P` LoRA projections, R the rotation and :math:`\phi` the gate's activation:

.. math:: q, k, v = P_{qkv}(n_1(h)), \quad h' = h + P_o(\mathrm{attn}(Rq, Rk, v)), \quad
          g, u = P_{gu}(n_2(h')), \quad h'' = h' + P_d(\phi(g) u).

Backward walks it in reverse with what :class:`Keep` says was kept, and makes the rest again. The last projection's
output is never recomputed: its gradient needs only its input, which :math:`\phi(g) u` gives back in the pass that makes
:math:`dg` and :math:`du`. The gradients of g and u overwrite g and u.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..kernels.glu import ACTIVATIONS, glu, glu_backward_
from ..kernels.rms_norm import norm_backward, norm_forward
from ..kernels.rope import rotate_
from ..lora.fused import adapter_gradients, input_gradient, project, project_backward
from ..lora.projection import Group, Projection, group, hooked, read_projection
from .attention import Attention
from .keep import Keep


class Groups(NamedTuple):
    """A layer's projections by their common input, at a compute dtype."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group


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

    def rounded(self, dtype: torch.dtype) -> Groups:
        """The projections by their common inputs, adapters rounded to ``dtype``."""
        p = self.projections
        return Groups(*(group(part, dtype) for part in (p[:3], p[3:4], p[4:6], p[6:])))

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


def _qkv(
    parts: Parts, groups: Groups, rope_TE: tuple[torch.Tensor, torch.Tensor], hidden_TD: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Rotated q and k, and v, by heads; and ``x A^T`` of the three."""
    normed_TD, _ = norm_forward(hidden_TD, parts.norm1_D, parts.eps)
    outputs, low = project(normed_TD, groups.qkv)
    q_THE, k_TKE, v_TKE = (t.view(t.shape[0], -1, parts.head_dim) for t in outputs)
    rotate_(q_THE, k_TKE, *rope_TE)
    return (q_THE, k_TKE, v_TKE), low


class _Attended:
    """The differentiable attention core, run apart from the outer graph; its own backward frees its own graph."""

    def __init__(self, parts: Parts, attention: Attention, qkv: tuple[torch.Tensor, ...]) -> None:
        self.inputs = tuple(t.detach().requires_grad_() for t in qkv)
        with torch.enable_grad():
            q, k, v = self.inputs
            self.output = attention(parts.layer_idx, q, k, v, parts.scale)

    @property
    def flat_TI(self) -> torch.Tensor:
        return self.output.detach().reshape(self.output.shape[0], -1)

    def backward(self, do_THE: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(self.output, self.inputs, do_THE)


@torch.no_grad()
def layer_forward(
    parts: Parts,
    groups: Groups,
    hidden_TD: torch.Tensor,
    rope_TE: tuple[torch.Tensor, torch.Tensor],
    attention: Attention,
) -> torch.Tensor:
    """One decoder layer without gradients: what a rollout runs at every token."""
    (q_THE, k_TKE, v_TKE), _ = _qkv(parts, groups, rope_TE, hidden_TD)
    o_THE = attention(parts.layer_idx, q_THE, k_TKE, v_TKE, parts.scale)
    (middle_TD,), _ = project(o_THE.reshape(hidden_TD.shape[0], -1), groups.o)
    middle_TD.add_(hidden_TD)
    out_TD, _ = _mlp(parts, groups, middle_TD)
    return out_TD


def _mlp(
    parts: Parts, groups: Groups, middle_TD: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """The second half with its residual; also gate, up and their ``x A^T``."""
    normed_TD, _ = norm_forward(middle_TD, parts.norm2_D, parts.eps)
    (gate_TI, up_TI), low = project(normed_TD, groups.gate_up)
    del normed_TD
    (out_TD,), _ = project(glu(gate_TI, up_TI, parts.activation), groups.down)
    return out_TD.add_(middle_TD), (gate_TI, up_TI, low)


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
        groups = parts.rounded(hidden_TD.dtype)
        qkv, low_qkv = _qkv(parts, groups, rope_TE, hidden_TD)
        attended = _Attended(parts, attention, qkv)
        del qkv
        (middle_TD,), low_o = project(attended.flat_TI, groups.o)
        middle_TD.add_(hidden_TD)
        ctx.rope, ctx.attention, ctx.parts, ctx.keep = rope_TE, attention, parts, keep
        ctx.attended = ctx.lows = ctx.gated = None
        kept = [hidden_TD]
        if keep is not Keep.INPUT:
            ctx.attended, ctx.lows = attended, (low_qkv, low_o)
            kept.append(middle_TD)
        del attended
        out_TD, gated = _mlp(parts, groups, middle_TD)
        if keep is Keep.ALL:
            ctx.gated = gated
        ctx.save_for_backward(*kept)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> Any:
        parts: Parts = ctx.parts
        hidden_TD, *rest = ctx.saved_tensors
        T, (cos_TE, sin_TE) = hidden_TD.shape[0], ctx.rope
        groups = parts.rounded(hidden_TD.dtype)
        if ctx.attended is None:
            qkv, low_qkv = _qkv(parts, groups, ctx.rope, hidden_TD)
            attended = _Attended(parts, ctx.attention, qkv)
            del qkv
            (middle_TD,), low_o = project(attended.flat_TI, groups.o)
            middle_TD.add_(hidden_TD)
        else:
            attended, (low_qkv, low_o), (middle_TD,) = ctx.attended, ctx.lows, rest
            ctx.attended = None
        dmiddle_TD, d_gate_up, d_down = _mlp_backward(parts, groups, middle_TD, dout_TD, ctx.gated)
        ctx.gated = None
        do_TI, d_o = project_backward((dmiddle_TD,), attended.flat_TI, low_o, groups.o)
        assert do_TI is not None
        dq_THE, dk_TKE, dv_TKE = attended.backward(do_TI.view_as(attended.output))
        del attended, do_TI
        rotate_(dq_THE, dk_TKE, cos_TE, sin_TE, transpose=True)
        normed_TD, rstd_T = norm_forward(hidden_TD, parts.norm1_D, parts.eps)
        dqkv = [t.reshape(T, -1) for t in (dq_THE, dk_TKE, dv_TKE)]
        dnormed_TD, d_qkv = project_backward(dqkv, normed_TD, low_qkv, groups.qkv, ctx.needs_input_grad[0])
        dhidden_TD = None
        if dnormed_TD is not None:
            dhidden_TD = norm_backward(dnormed_TD, dmiddle_TD, hidden_TD, parts.norm1_D, rstd_T)
        return dhidden_TD, None, None, None, None, *d_qkv, *d_o, *d_gate_up, *d_down


def _mlp_backward(
    parts: Parts,
    groups: Groups,
    middle_TD: torch.Tensor,
    dout_TD: torch.Tensor,
    gated: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
) -> tuple[torch.Tensor, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Gradient of h', and of the adapters of gate, up and down; overwrites gate and up."""
    normed_TD, rstd_T = norm_forward(middle_TD, parts.norm2_D, parts.eps)
    if gated is None:
        (gate_TI, up_TI), low = project(normed_TD, groups.gate_up)
    else:
        gate_TI, up_TI, low = gated
    dproduct_TI, g_down = input_gradient((dout_TD,), groups.down)
    assert dproduct_TI is not None
    product_TI = glu_backward_(dproduct_TI, gate_TI, up_TI, want_h=True, activation=parts.activation)
    assert product_TI is not None
    del dproduct_TI
    d_down = adapter_gradients((dout_TD,), g_down, product_TI, None, groups.down)
    del product_TI
    dnormed_TD, d_gate_up = project_backward((gate_TI, up_TI), normed_TD, low, groups.gate_up)
    assert dnormed_TD is not None
    return norm_backward(dnormed_TD, dout_TD, middle_TD, parts.norm2_D, rstd_T), d_gate_up, d_down


def fused_block(
    parts: Parts, hidden_TD: torch.Tensor, rope_TE: tuple[torch.Tensor, torch.Tensor], attention: Attention, keep: Keep
) -> torch.Tensor:
    """One decoder layer over packed tokens, ``[T, D]`` to ``[T, D]``, keeping what ``keep`` says for backward."""
    result: torch.Tensor = _FusedBlock.apply(hidden_TD, rope_TE, attention, parts, keep, *parts.trainables())
    return result
