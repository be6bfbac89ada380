"""The attention core that a block calls, and the one that training uses: causal within each packed row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from ..kernels.attention import Choice, Path, attention_backward, attention_forward, choose
from ..kernels.ordered_attention import ordered_attention_forward, refusal
from ..kernels.ordered_rows import OrderedRows
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


def in_order(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None = None,
    softcap: float | None = None,
) -> bool:
    """Whether :mod:`pronghorn.kernels.ordered_attention` runs; where it does not on a GPU, one line says why, once."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    reason = refusal(capability, dtype, head_dim, window, softcap)
    if reason is not None and capability is not None:
        _say_once(reason)
    return reason is None


@cache
def _say_once(reason: str) -> None:
    print(
        f"Pronghorn: attention sums in another order when it scores than when it samples, because of {reason}; "
        "log-probs of the two differ by rounding",
        flush=True,
    )


class PackedAttention:
    """Causal attention over rows that lie one after another without padding; a row sees itself, and its prefix.

    Args:
        row_lengths: tokens of each row, in order; their sum is T.
        device: where the tokens are.
        prefix: for each row the index of an earlier row, all of whose tokens it sees as well (a completion its prompt),
            or None. The rows that share a prefix follow it directly. None: no row sees another.
        window: a token sees at most the last ``window`` tokens of its row, itself included; None for all.
        softcap: scores go through ``softcap * tanh(score / softcap)``; on the CPU only.
        ordered: forward takes :mod:`pronghorn.kernels.ordered_attention`, whose bits are those of a rollout's prefill
            and decode steps. Where that does not run on a GPU (float32, a window), one line says why.

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
        ordered: bool = False,
    ) -> None:
        self.row_lengths = [int(n) for n in row_lengths]
        if not self.row_lengths or min(self.row_lengths) < 1:
            raise ValueError(f"row_lengths={self.row_lengths}: every row needs a token; leave empty rows out")
        self.device, self.softcap, self.prefix, self.ordered = torch.device(device), softcap, prefix, ordered
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

    @cached_property
    def rows(self) -> OrderedRows:
        """The rows as ordered attention takes them."""
        return OrderedRows.packed(self.row_lengths, self.device, self.prefix)

    def in_order(self, dtype: torch.dtype, head_dim: int) -> bool:
        """Whether forward sums in the order that the sampler's kernels keep."""
        return self.ordered and in_order(self.device, dtype, head_dim, self.window, self.softcap)

    def choice(self, dtype: torch.dtype, head_dim: int) -> Choice:
        """Which kernels run for inputs of this kind, and why; backward's, where forward is in order."""
        if self.in_order(dtype, head_dim):
            return Choice(Path.FLASH, "forward in the sampler's order, whose log-sum-exps flash's backward takes")
        gpu = self.device.type == "cuda"
        capability = torch.cuda.get_device_capability(self.device) if gpu else None
        length = self.own.max_q if self.own.equal and self.shared is None else None
        deterministic = torch.are_deterministic_algorithms_enabled()
        return choose(capability, dtype, head_dim, length, self.window, self.softcap, deterministic)

    @torch.no_grad()
    def forward(
        self, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """``o_THE`` in q's dtype and the log-sum-exps that :meth:`backward` needs; nothing is recorded for autograd."""
        if self.in_order(q_THE.dtype, q_THE.shape[2]):
            o_THE, lse_HT = ordered_attention_forward(q_THE, k_TKE, v_TKE, self.rows, scale)
            return o_THE, (lse_HT,)
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
        if self.shared is not None and path is Path.FLASH and self.shared.gathered is not None:
            return self.shared.gathered.backward(*given, scale)
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
