"""One step of the model for the scheduler: prefill chunks or decode rows, with the trainer's own modules."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from ...kernels.spans import on_device
from ...models.attention import Attention
from ...models.forward import hidden_states, logits
from .attention import PrefillAttention
from .decoder import Decoder
from .held import Buffers, HeldDecode
from .kv_cache import KVCache
from .paged import PagedDecode
from .request import Sequence
from .scheduler import Step


class Policy(Protocol):
    """What walks tokens to hidden states ``[T, D]`` and those to logits ``[N, V]``, as ``models/forward.py`` does."""

    def hidden_states(
        self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: Attention
    ) -> torch.Tensor: ...

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor: ...


class LivePolicy:
    """The model as it stands, by its own modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def hidden_states(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: Attention) -> torch.Tensor:
        return hidden_states(self.model, input_ids_T, positions_T, attention)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return logits(self.model, hidden_ND)


class Runner:
    """Runs steps over one KV cache. Holds no weights: it asks the policy.

    Args:
        policy: walks tokens: the model itself, or a snapshot of it.
        cache: where keys and values go.
        buffers: memory for the CPU's decode attention.
    """

    def __init__(self, policy: Policy, cache: KVCache, buffers: Buffers) -> None:
        self.policy = policy
        self.cache = cache
        self.buffers = buffers
        self.device = cache.shape.device
        self.held: HeldDecode | None = None

    def run(self, step: Step) -> tuple[torch.Tensor, list[Sequence]]:
        """Logits ``[B, V]`` and the B sequences to draw a token for; B may be 0 (a prompt not yet whole)."""
        self.cache.copy(step.copies)
        return self._prefill(step) if step.prefill else self._decode(step.decode)

    def ids(self, ids: list[int]) -> torch.Tensor:
        """int64, on the model's device."""
        return on_device(ids, torch.int64, self.device)

    def prefill(self, step: Step, decoder: Decoder | None = None) -> tuple[torch.Tensor, list[int], list[Sequence]]:
        """Compute the chunks; hidden states ``[L, D]`` that predict, which of them each drawing sequence reads, and
        those sequences. By ``decoder`` in place of the policy, where there is one.
        """
        ids: list[int] = []
        sequences: list[Sequence] = []
        last: list[int] = []
        copies: list[int] = []  # for each drawing sequence, its row of ``last``
        for chunk in step.prefill:
            ids += chunk.sequence.tokens(chunk.start, chunk.stop)
            if chunk.draws:
                copies += [len(last)] * (1 + len(chunk.followers))
                last.append(len(ids) - 1)
                sequences += [chunk.sequence, *chunk.followers]
        if decoder is not None:
            return decoder.prefill(ids, step.prefill, last), copies, sequences
        attention = PrefillAttention(self.cache, step.prefill)
        hidden_TD = self.policy.hidden_states(self.ids(ids), attention.positions_T.long(), attention)
        return hidden_TD.index_select(0, self.ids(last)), copies, sequences

    def _prefill(self, step: Step) -> tuple[torch.Tensor, list[Sequence]]:
        hidden_LD, copies, sequences = self.prefill(step)
        return self.policy.logits(hidden_LD).index_select(0, self.ids(copies)), sequences

    def _decode(self, rows: list[Sequence]) -> tuple[torch.Tensor, list[Sequence]]:
        ids = self.ids([row.last for row in rows])
        positions = self.ids([len(row) - 1 for row in rows])
        attention = self._decode_attention(rows)
        return self.policy.logits(self.policy.hidden_states(ids, positions, attention)), rows

    def _decode_attention(self, rows: list[Sequence]) -> PagedDecode | HeldDecode:
        if self.device.type != "cpu":
            return PagedDecode.of(self.cache, [row.table for row in rows], [len(row) for row in rows])
        if self.held is None or not self.held.serves(rows) or not self.held.prepare(rows):
            self.held = HeldDecode(self.cache, rows, self.buffers)
            if not self.held.prepare(rows):
                raise RuntimeError("held keys and values have no room for one token: a fault of the runner")
        return self.held
