"""The attention core that a block calls, and the one that training uses: causal within each packed row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from ..kernels.attention import Choice, attention_backward, attention_forward, choose
from ..kernels.shared_prefix import SharedPrefix
from ..kernels.spans import Spans


class Attention(Protocol):
    """What a decoder block asks for: ``attention(layer_idx, q_THE, k_TKE, v_TKE, scale) -> o_THE``.

    H query heads share K key/value heads (H divisible by K). The implementation decides which tokens see which, and
    whether keys and values are kept.
    """

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor: ...


class PackedAttention:
    """Causal attention over rows that lie one after another without padding; a row sees itself, and its prefix.

    Args:
        row_lengths: tokens of each row, in order; their sum is T.
        device: where the tokens are.
        prefix: for each row the index of an earlier row, all of whose tokens it sees as well (a completion its prompt),
            or None. The rows that share a prefix follow it directly. None: no row sees another.
        window: a token sees at most the last ``window`` tokens of its row, itself included; None for all.
        softcap: scores go through ``softcap * tanh(score / softcap)``; on the CPU only.

    Raises:
        ValueError: a row without tokens; a prefix that is no row before it; a window that ends within a prefix.
    """

    def __init__(
        self,
        row_lengths: Sequence[int],
        device: torch.device | str,
        prefix: Sequence[int | None] | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        self.row_lengths = [int(n) for n in row_lengths]
        if not self.row_lengths or min(self.row_lengths) < 1:
            raise ValueError(f"row_lengths={self.row_lengths}: every row needs a token; leave empty rows out")
        self.device, self.softcap = torch.device(device), softcap
        lengths = tuple(self.row_lengths)
        self.shared: SharedPrefix | None = None
        reach = max(lengths)
        if prefix is not None and any(above is not None for above in prefix):
            self.shared = SharedPrefix(lengths, prefix, self.device)
            reach = max(n if above is None else n + lengths[above] for n, above in zip(lengths, prefix))
        self.window = None if window is None or window >= reach else window
        if self.shared is not None and self.window is not None:
            raise ValueError(
                f"window={window} is shorter than a row behind its prefix ({reach} tokens); "
                "repeat the prefix in every row"
            )
        self.own = Spans(lengths, lengths, causal=True, device=self.device, window=self.window)

    def choice(self, dtype: torch.dtype, head_dim: int) -> Choice:
        """Which kernels run for inputs of this kind, and why."""
        gpu = self.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.device) if gpu else None
        length = self.own.max_q if self.own.equal and self.shared is None else None
        return choose(capability, dtype, head_dim, length, self.window, self.softcap)

    @torch.no_grad()
    def forward(
        self, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """``o_THE`` in q's dtype and the log-sum-exps that :meth:`backward` needs; nothing is recorded for autograd."""
        path = self.choice(q_THE.dtype, q_THE.shape[2]).path
        o_THE, lse = attention_forward(q_THE, k_TKE, v_TKE, self.own, scale, path, self.softcap)
        if self.shared is not None:
            o_THE = o_THE.contiguous()
            self.shared.forward_(o_THE, lse, q_THE, k_TKE, v_TKE, scale, path, self.softcap)
        return o_THE, (lse,)

    @torch.no_grad()
    def backward(
        self,
        do_THE: torch.Tensor,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        o_THE: torch.Tensor,
        stats: tuple[torch.Tensor, ...],
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(dq_THE, dk_TKE, dv_TKE)`` in the inputs' dtypes, from :meth:`forward`'s inputs and what it returned."""
        path = self.choice(q_THE.dtype, q_THE.shape[2]).path
        given = (do_THE, q_THE, k_TKE, v_TKE, o_THE, stats[0])
        gradients = attention_backward(*given, self.own, scale, path, self.softcap)
        if self.shared is None:
            return gradients
        dq_THE, dk_TKE, dv_TKE = (t.contiguous() for t in gradients)
        self.shared.backward_(dq_THE, dk_TKE, dv_TKE, *given, scale, path, self.softcap)
        return dq_THE, dk_TKE, dv_TKE

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend within each row, differentiably; see :class:`Attention`."""
        if not torch.is_grad_enabled():
            return self.forward(q_THE, k_TKE, v_TKE, scale)[0]
        o_THE: torch.Tensor = _Attended.apply(q_THE, k_TKE, v_TKE, self, scale)
        return o_THE


class _Attended(torch.autograd.Function):
    """:class:`PackedAttention` as one node."""

    @staticmethod
    def forward(
        ctx: Any, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, core: PackedAttention, scale: float
    ) -> torch.Tensor:
        o_THE, stats = core.forward(q_THE, k_TKE, v_TKE, scale)
        ctx.save_for_backward(q_THE, k_TKE, v_TKE, o_THE, *stats)
        ctx.core, ctx.scale = core, scale
        return o_THE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THE: torch.Tensor) -> Any:
        q_THE, k_TKE, v_TKE, o_THE, *stats = ctx.saved_tensors
        grads = ctx.core.backward(do_THE, q_THE, k_TKE, v_TKE, o_THE, tuple(stats), ctx.scale)
        return *grads, None, None
