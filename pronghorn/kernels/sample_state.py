"""The settings, counters and outputs of the rows of a decode batch: device memory that stays where it is.

A CUDA graph captured over a decode step reads and writes these tensors by address. Rows change hands between replays by
writes in place (:meth:`SampleState.load`); nothing here is ever made anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from pronghorn.kernels.spans import on_device

RUNS, STOPPED, FULL, NOT_A_NUMBER, EMPTY = range(5)
"""What ``finished_B`` holds: the row runs; ended by a stop id; by its length; by logits that are no numbers; unused."""


@dataclass(frozen=True)
class RowSettings:
    """One row's settings, and where it stands.

    Attributes:
        temperature: 0 is greedy. Greedy rows are not truncated.
        top_k, top_p, min_p, repetition_penalty: 0 (or below), 1, 0 and 1 are off.
        key: the row's random stream, a signed 64-bit integer.
        count: tokens drawn before.
        position: of the token that the next forward pass reads; its successor is what is drawn then.
        min_tokens: no stop id is drawn, nor ends the row, before so many tokens.
        max_tokens: the row ends with so many; None for as many as the state holds.
        stop_ids: ids that end the row.
        seen: ids of prompt and output; only a row with a repetition penalty needs them.
        presence_penalty, frequency_penalty: 0 is off.
        generated: ids of the output, each as often as it stands there; only a row with one of these two needs them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    key: int = 0
    count: int = 0
    position: int = 0
    min_tokens: int = 0
    max_tokens: int | None = None
    stop_ids: Sequence[int] = ()
    seen: Sequence[int] = field(default=())
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    generated: Sequence[int] = field(default=())

    @property
    def tallied(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


class Variant(NamedTuple):
    """What a batch needs beyond temperature: which of the kernel's few compilations runs.

    A row's result is the same, bit for bit, in each variant that does all that the row asks for.
    """

    truncated: bool = False
    penalised: bool = False
    held: bool = False
    tallied: bool = False

    @classmethod
    def of(cls, rows: Sequence[RowSettings], vocab: int) -> Variant:
        """The least that serves these rows from now to their end."""
        drawn = [r for r in rows if r.temperature > 0]
        return cls(
            any(0 < r.top_k < vocab or r.top_p < 1 or r.min_p > 0 for r in drawn),
            any(r.repetition_penalty != 1 for r in rows),
            any(r.count < r.min_tokens and r.stop_ids for r in rows),
            any(r.tallied for r in rows),
        )


class SampleState:
    """Tensors of ``rows`` rows, all unused at first.

    Settings: ``temperature_B`` and ``inverse_temperature_B`` (float32, 1 for greedy rows), ``greedy_B`` (int32),
    ``top_k_B`` (int32, V for off), ``top_p_B``, ``log_min_p_B`` (-inf for off), ``penalty_B`` (float32), ``keys_B``
    (int64), ``min_tokens_B``, ``max_tokens_B`` (int32), ``stop_ids_BS`` (int32, -1 for none), ``seen_BW`` (int32: bit
    ``v % 32`` of word ``v // 32``), ``presence_B``, ``frequency_B`` (float32), ``tally_BV`` (int32: how often the row
    drew each token, where it has one of the two penalties).

    Counters, int32: ``counts_B`` (tokens drawn), ``positions_B`` (of the token to read next), ``slots_B`` (where the
    cache is to be written: the position, or -1 for a row that does not run), ``lengths_B`` (tokens to attend to: the
    position + 1, or 0), ``finished_B`` (:data:`RUNS` and so on).

    Outputs: ``tokens_B`` (int64, the token to read next), ``token_logps_B``, ``policy_logps_B`` (float32, of the last
    draw), and all since the row was loaded by number, ``out_tokens_BT`` (int32, -1 where the logits were no numbers),
    ``out_token_logps_BT``, ``out_policy_logps_BT`` (float32).

    Args:
        rows: B.
        vocab: V.
        max_tokens: T, most tokens that a row may draw.
        stop_ids: S, most stop ids of a row.
        device: where.
        penalties: whether rows may have a repetition penalty: ``seen_BW`` is empty otherwise.
        tallies: whether rows may have a presence or frequency penalty: ``tally_BV``, 4 bytes a token of the vocabulary
            and row, is empty otherwise.
    """

    def __init__(
        self,
        rows: int,
        vocab: int,
        max_tokens: int,
        stop_ids: int = 8,
        device: torch.device | str = "cpu",
        penalties: bool = True,
        tallies: bool = True,
    ) -> None:
        self.rows, self.vocab, self.max_tokens = rows, vocab, max_tokens

        def full(value: float, dtype: torch.dtype, *more: int) -> torch.Tensor:
            return torch.full((rows, *more), value, dtype=dtype, device=device)

        f32, i32, i64 = torch.float32, torch.int32, torch.int64
        self.temperature_B, self.inverse_temperature_B = full(1, f32), full(1, f32)
        self.greedy_B = full(0, i32)
        self.top_k_B, self.top_p_B, self.log_min_p_B = full(vocab, i32), full(1, f32), full(-math.inf, f32)
        self.penalty_B, self.seen_BW = full(1, f32), full(0, i32, -(-vocab // 32) if penalties else 0)
        self.presence_B, self.frequency_B = full(0, f32), full(0, f32)
        self.tally_BV = full(0, i32, vocab if tallies else 0)
        self.keys_B = full(0, i64)
        self.min_tokens_B, self.max_tokens_B = full(0, i32), full(0, i32)
        self.stop_ids_BS = full(-1, i32, stop_ids)
        self.counts_B, self.positions_B = full(0, i32), full(0, i32)
        self.slots_B, self.lengths_B, self.finished_B = full(-1, i32), full(0, i32), full(EMPTY, i32)
        self.tokens_B = full(0, i64)
        self.token_logps_B, self.policy_logps_B = full(0, f32), full(0, f32)
        self.out_tokens_BT = full(-1, i32, max_tokens)
        self.out_token_logps_BT, self.out_policy_logps_BT = full(0, f32, max_tokens), full(0, f32, max_tokens)
        self._columns = [x for x in vars(self).values() if torch.is_tensor(x) and x.numel()]
        self.scratch: Any = None  # the kernel's; made at its first call

    def load(self, at: Sequence[int], rows: Sequence[RowSettings]) -> None:
        """Give the rows ``at`` to new owners, in place; small copies to the device, none of which waits for it.

        Raises:
            ValueError: a row's ``max_tokens`` or stop ids do not fit, or it has a penalty and there is no room for it.
        """
        if not len(at):
            return
        for r in rows:
            self._check(r)
        index = self._to(list(at), torch.int64)
        S = self.stop_ids_BS.shape[1]
        values: dict[str, list[Any]] = {
            "temperature_B": [r.temperature or 1.0 for r in rows],
            "inverse_temperature_B": [1 / (r.temperature or 1.0) for r in rows],
            "greedy_B": [int(r.temperature == 0) for r in rows],
            "top_k_B": [r.top_k if 0 < r.top_k < self.vocab else self.vocab for r in rows],
            "top_p_B": [r.top_p for r in rows],
            "log_min_p_B": [math.log(r.min_p) if r.min_p > 0 else -math.inf for r in rows],
            "penalty_B": [r.repetition_penalty for r in rows],
            "presence_B": [r.presence_penalty for r in rows],
            "frequency_B": [r.frequency_penalty for r in rows],
            "keys_B": [r.key for r in rows],
            "min_tokens_B": [r.min_tokens for r in rows],
            "max_tokens_B": [self._most(r) for r in rows],
            "stop_ids_BS": [[*sorted(r.stop_ids), *[-1] * (S - len(r.stop_ids))] for r in rows],
            "counts_B": [r.count for r in rows],
            "positions_B": [r.position for r in rows],
            "slots_B": [r.position for r in rows],
            "lengths_B": [r.position + 1 for r in rows],
            "finished_B": [RUNS] * len(rows),
        }
        for name, column in values.items():
            tensor: torch.Tensor = getattr(self, name)
            tensor.index_copy_(0, index, self._to(column, tensor.dtype).view(len(rows), *tensor.shape[1:]))
        for b, r in zip(at, rows):
            if r.repetition_penalty != 1:
                bits_W = _bits(r.seen, self.seen_BW.shape[1])
                self.seen_BW[b].copy_(on_device(bits_W, torch.int32, self.tokens_B.device))
            if r.tallied:
                tally_V = self.tally_BV[b].zero_()
                if len(r.generated):
                    ids = self._to(list(r.generated), torch.int64)
                    tally_V.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def clear(self, at: Sequence[int]) -> None:
        """Nobody owns the rows ``at`` any more: they draw nothing, and padding is all that the cache gets of them."""
        if len(at):
            index = self._to(list(at), torch.int64)
            self.finished_B.index_fill_(0, index, EMPTY)
            self.slots_B.index_fill_(0, index, -1)
            self.lengths_B.index_fill_(0, index, 0)

    def move(self, source: Sequence[int], target: Sequence[int]) -> None:
        """The rows ``source`` go on as the rows ``target``, which nobody owns; as they stand on the device, whatever
        that is by then.
        """
        from_, to = self._to([*source, *target], torch.int64).chunk(2)
        for x in self._columns:
            x.index_copy_(0, to, x.index_select(0, from_))
        self.clear(source)

    def _to(self, values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return on_device(values, dtype, self.tokens_B.device)

    def _most(self, r: RowSettings) -> int:
        return self.max_tokens if r.max_tokens is None else r.max_tokens

    def _check(self, r: RowSettings) -> None:
        S, most = self.stop_ids_BS.shape[1], self._most(r)
        if not r.count < most <= self.max_tokens:
            raise ValueError(
                f"a row that drew {r.count} tokens of max_tokens={most} has no room in a state of {self.max_tokens}; "
                f"make the state with max_tokens={max(most, r.count + 1)}"
            )
        if len(r.stop_ids) > S:
            raise ValueError(f"a row has {len(r.stop_ids)} stop ids; make the state with stop_ids={len(r.stop_ids)}")
        if r.repetition_penalty != 1 and not self.seen_BW.shape[1]:
            raise ValueError(f"repetition_penalty={r.repetition_penalty}: make the state with penalties=True")
        if r.tallied and not self.tally_BV.shape[1]:
            raise ValueError(
                f"presence_penalty={r.presence_penalty}, frequency_penalty={r.frequency_penalty}: make the state with "
                "tallies=True"
            )


def _bits(ids: Sequence[int], words: int) -> torch.Tensor:
    """int32 ``[words]``, the bits of ``ids`` set."""
    marks = torch.zeros(words * 32, dtype=torch.int64)
    marks[torch.tensor(list(ids), dtype=torch.int64)] = 1
    sums = (marks.view(words, 32) << torch.arange(32)).sum(-1)
    return torch.where(sums >= 1 << 31, sums - (1 << 32), sums).to(torch.int32)
