r"""A decoder layer as one autograd node: pre-norm attention with rotary positions, then a gated MLP.

With :math:`n_i` the norms, :math:`P` LoRA projections, R the rotation and :math:`\phi` the gate's activation:

.. math:: q, k, v = P_{qkv}(n_1(h)), \quad h' = h + P_o(\mathrm{attn}(Rq, Rk, v)), \quad
          g, u = P_{gu}(n_2(h')), \quad h'' = h' + P_d(\phi(g) u).

Backward walks it in reverse with what :class:`Keep` says was kept, on the GPU or in host memory, and makes the rest
again. The last projection's output is never recomputed: its gradient needs only its input, which :math:`\phi(g) u`
gives back in the pass that makes :math:`dg` and :math:`du`. The gradients of g and u overwrite g and u. The low-rank
products :math:`x A^T` are kept at every level: 2.7% of a layer's input at rank 32 and hidden size 4096.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..kernels.rms_norm import add_norm_forward, norm_backward, norm_forward
from ..kernels.rope import rotate_
from ..lora.fused import Input, adapter_gradients, input_gradient, project
from ..lora.projection import table
from .attention import Attention, PackedAttention
from .fused_mlp import Lows, Middle, mlp_backward, mlp_forward
from .keep import Keep
from .offload import HostStore, Stored, look_ahead
from .parts import Groups, Held, Parts

RopeTE = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Saving:
    """How one layer trains.

    Attributes:
        keep: what is kept from forward to backward.
        store: where kept tensors go, or None to leave them on the GPU.
        mlp_rows: rows of one tile of the MLP; None for all at once.
        held: weights that stay in memory dequantized.
    """

    keep: Keep = Keep.ALL
    store: HostStore | None = None
    mlp_rows: int | None = None
    held: Held = Held()


def _normed(
    parts: Parts, groups: Groups, held: Held, hidden_TD: torch.Tensor, ordered: bool = False
) -> tuple[Input, torch.Tensor]:
    """The first norm, and one float32 a row."""
    normed = Input(groups.qkv, held.qkv, rows=hidden_TD.shape[0], like=hidden_TD, ordered=ordered)
    _, rstd_T = norm_forward(hidden_TD, parts.norm1_D, parts.eps, normed.x_TI)
    return normed, rstd_T


def _qkv(
    parts: Parts,
    groups: Groups,
    held: Held,
    rope_TE: RopeTE,
    normed: Input,
    low_TR: torch.Tensor | None,
    ordered: bool = False,
) -> torch.Tensor:
    """Rotated q and k, and v, side by side: ``[T, (H + 2K) E]``."""
    qkv_TO = project(normed, groups.qkv, low_TR, held.qkv, ordered=ordered)
    q_THE, k_TKE, _ = _heads(parts, qkv_TO)
    rotate_(q_THE, k_TKE, *rope_TE)
    return qkv_TO


def _attended(groups: Groups, held: Held, o_TI: torch.Tensor, ordered: bool) -> Input:
    """Attention's output as the input of its projection.

    It lies in a tensor of its own, so the adapter's term is written first and the base's product adds onto it. Ordered,
    it is copied to where ``x A^T`` fits beside it, and one accumulator sums both, as a rollout's few rows do.
    """
    if not ordered:
        return Input(groups.o, held.o, o_TI)
    given = Input(groups.o, held.o, rows=o_TI.shape[0], like=o_TI, ordered=True)
    given.x_TI.copy_(o_TI)
    return given


def _o(
    groups: Groups, held: Held, o_TI: torch.Tensor, low_TR: torch.Tensor | None = None, ordered: bool = False
) -> torch.Tensor:
    """The output projection; writes ``low_TR`` where it is given."""
    attended = _attended(groups, held, o_TI, ordered)
    return project(attended, groups.o, attended.lower(groups.o, low_TR, ordered), held.o, ordered=ordered)


def _heads(parts: Parts, qkv_TO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views ``[T, H, E]``, ``[T, K, E]`` and ``[T, K, E]``."""
    H, K = parts.heads
    heads = qkv_TO.view(qkv_TO.shape[0], H + 2 * K, parts.head_dim)
    return heads[:, :H], heads[:, H : H + K], heads[:, H + K :]


def _middle(
    parts: Parts,
    groups: Groups,
    held: Held,
    attended_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    rows: int | None,
    ordered: bool = False,
) -> Middle:
    """h' and, unless tiled, its norm in the same pass."""
    T = hidden_TD.shape[0]
    if rows is not None and rows < T:
        return Middle(attended_TD.add_(hidden_TD))
    normed = Input(groups.gate_up, held.gate_up, rows=T, like=hidden_TD, ordered=ordered)
    _, sum_TD, rstd_T = add_norm_forward(attended_TD, hidden_TD, parts.norm2_D, parts.eps, normed.x_TI)
    return Middle(sum_TD, normed, rstd_T)


@torch.no_grad()
def layer_forward(
    parts: Parts,
    groups: Groups,
    hidden_TD: torch.Tensor,
    rope_TE: RopeTE,
    attention: Attention,
    held: Held = Held(),  # noqa: B008 - immutable
) -> torch.Tensor:
    """One decoder layer without gradients: what a rollout's prefill runs."""
    ordered = bool(getattr(attention, "ordered", False))
    normed, _ = _normed(parts, groups, held, hidden_TD, ordered)
    qkv_TO = _qkv(parts, groups, held, rope_TE, normed, normed.lower(groups.qkv, None, ordered), ordered)
    del normed
    o_TI = attention(parts.layer_idx, *_heads(parts, qkv_TO), parts.scale).reshape(hidden_TD.shape[0], -1)
    del qkv_TO
    middle = _middle(parts, groups, held, _o(groups, held, o_TI, None, ordered), hidden_TD, None, ordered)
    return mlp_forward(parts, groups, held, middle, None, None, ordered)[0]


class _FusedBlock(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        rope_TE: RopeTE,
        attention: PackedAttention,
        parts: Parts,
        groups: Groups,
        saving: Saving,
        *trainables: torch.Tensor | None,
    ) -> torch.Tensor:
        held, keep, ordered = saving.held, saving.keep, attention.ordered
        lows = Lows.empty(groups, hidden_TD)
        normed, _ = _normed(parts, groups, held, hidden_TD, ordered)
        qkv_TO = _qkv(parts, groups, held, rope_TE, normed, normed.lower(groups.qkv, lows.qkv, ordered), ordered)
        del normed
        o_THE, stats = attention.forward(*_heads(parts, qkv_TO), parts.scale)
        o_TI = o_THE.reshape(hidden_TD.shape[0], -1)
        o_TD = _o(groups, held, o_TI, lows.o, ordered)
        middle = _middle(parts, groups, held, o_TD, hidden_TD, saving.mlp_rows, ordered)
        del o_TD
        kept = [hidden_TD, lows.table_TR]
        if keep is not Keep.INPUT:
            kept += [o_TI.contiguous(), *stats]
        if keep in (Keep.ATTENTION, Keep.ALL):
            kept += [qkv_TO, middle.sum_TD]
        del o_THE, o_TI, qkv_TO
        out_TD, gate_up_TI = mlp_forward(
            parts, groups, held, middle, lows, None if keep is Keep.ALL else saving.mlp_rows, ordered
        )
        if keep is Keep.ALL and gate_up_TI is not None:
            kept.append(gate_up_TI)
        ctx.rope, ctx.attention, ctx.saving, ctx.stats = rope_TE, attention, saving, len(stats)
        ctx.parts, ctx.groups = parts, groups
        if saving.store is not None:
            ctx.kept = saving.store.save(kept)
        else:
            ctx.kept = kept
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: torch.Tensor) -> Any:
        parts: Parts = ctx.parts
        saving: Saving = ctx.saving
        held, keep = saving.held, saving.keep
        hidden_TD, table_TR, *rest = _taken(ctx)
        T = hidden_TD.shape[0]
        groups: Groups = ctx.groups
        lows = Lows(groups, table_TR)
        normed, rstd_T = _normed(parts, groups, held, hidden_TD, ctx.attention.ordered)
        qkv_TO = o_TI = gate_up_TI = None
        stats: tuple[torch.Tensor, ...] = ()
        middle: Middle | None = None
        if keep is not Keep.INPUT:
            o_TI, stats = rest[0], tuple(rest[1 : 1 + ctx.stats])
        if keep in (Keep.ATTENTION, Keep.ALL):
            qkv_TO, middle = rest[1 + ctx.stats], Middle(rest[2 + ctx.stats])
        if keep is Keep.ALL:
            gate_up_TI = rest[3 + ctx.stats]
        del rest
        if qkv_TO is None:
            normed.restore(lows.qkv)
            qkv_TO = _qkv(parts, groups, held, ctx.rope, normed, lows.qkv, ctx.attention.ordered)
        if o_TI is None:
            o_THE, stats = ctx.attention.forward(*_heads(parts, qkv_TO), parts.scale)
            o_TI = o_THE.reshape(T, -1)
            del o_THE
        if middle is None:
            attended = _attended(groups, held, o_TI, ctx.attention.ordered)
            attended.restore(lows.o)
            attended_TD = project(attended, groups.o, lows.o, held.o, ordered=ctx.attention.ordered)
            del attended
            middle = _middle(parts, groups, held, attended_TD, hidden_TD, saving.mlp_rows)
            del attended_TD
        dmiddle_TD, d_gate_up, d_down = mlp_backward(
            parts, groups, held, middle, dout_TD, lows, gate_up_TI, saving.mlp_rows
        )
        del middle, gate_up_TI, dout_TD
        do_TI, g_o = input_gradient(dmiddle_TD, groups.o, held.o)
        d_o = adapter_gradients(dmiddle_TD, g_o, o_TI, lows.o, groups.o)
        assert do_TI is not None
        dqkv_TO = _attention_backward(parts, groups, ctx.attention, ctx.rope, do_TI, qkv_TO, o_TI, stats)
        del do_TI, qkv_TO, o_TI, stats
        dnormed_TD, g_qkv = input_gradient(dqkv_TO, groups.qkv, held.qkv, ctx.needs_input_grad[0])
        d_qkv = adapter_gradients(dqkv_TO, g_qkv, normed.x_TI, lows.qkv, groups.qkv)
        dhidden_TD = None
        if dnormed_TD is not None:
            dhidden_TD = norm_backward(dnormed_TD, dmiddle_TD, hidden_TD, parts.norm1_D, rstd_T)
        return dhidden_TD, None, None, None, None, None, *d_qkv, *d_o, *d_gate_up, *d_down


def _taken(ctx: Any) -> list[Any]:
    """What forward kept, once."""
    kept, ctx.kept = ctx.kept, None
    if kept is None:
        raise RuntimeError("backward ran twice through one fused layer: what it kept is overwritten; run forward again")
    if isinstance(kept, Stored):
        return kept.take()
    look_ahead(kept[0].device)
    found: list[Any] = kept
    return found


def _attention_backward(
    parts: Parts,
    groups: Groups,
    attention: PackedAttention,
    rope_TE: RopeTE,
    do_TI: torch.Tensor,
    qkv_TO: torch.Tensor,
    o_TI: torch.Tensor,
    stats: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Gradient of q, k and v before their rotation, side by side ``[T, (H + 2K) E]``, and R columns to spare."""
    q_THE, k_TKE, v_TKE = _heads(parts, qkv_TO)
    grads = attention.backward(do_TI.view_as(q_THE), q_THE, k_TKE, v_TKE, o_TI.view_as(q_THE), stats, parts.scale)
    T, O = qkv_TO.shape  # noqa: E741 - shape letters
    dqkv_TO = table(T, O + groups.qkv.rank, qkv_TO.dtype, qkv_TO.device)
    dq_THE, dk_TKE, dv_TKE = _heads(parts, dqkv_TO[:, :O])
    if rope_TE[0].shape[1] == parts.head_dim:
        rotate_(*grads[:2], *rope_TE, transpose=True, out=(dq_THE, dk_TKE))
    else:
        dq_THE.copy_(grads[0])
        dk_TKE.copy_(grads[1])
        rotate_(dq_THE, dk_TKE, *rope_TE, transpose=True)
    dv_TKE.copy_(grads[2])
    return dqkv_TO


def fused_block(
    parts: Parts,
    groups: Groups,
    hidden_TD: torch.Tensor,
    rope_TE: RopeTE,
    attention: PackedAttention,
    saving: Saving,
) -> torch.Tensor:
    """One decoder layer over packed tokens, ``[T, D]`` to ``[T, D]``, keeping what ``saving`` says for backward.

    ``groups`` are ``parts``' projections at ``hidden_TD``'s dtype; backward reads them too, as they are then.
    """
    trainables = parts.trainables()
    result: torch.Tensor = _FusedBlock.apply(hidden_TD, rope_TE, attention, parts, groups, saving, *trainables)
    return result
