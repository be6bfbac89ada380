"""A look of the host at what rows drew: begun behind the steps that draw it, taken when the host can wait no longer."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import torch

from ...kernels.sample_state import NOT_A_NUMBER, RUNS, SampleState
from ...kernels.spans import on_device
from .request import Sequence


class Drawn(NamedTuple):
    """What one row drew since the look before, and whether a stop id or its length has ended it."""

    tokens: list[int]
    token_logps: list[float]
    policy_logps: list[float]
    ended: bool


class Look:
    """The unseen tokens of some rows, as they are once everything queued before has run. Beginning it queues their copy
    to the host and waits for nothing. Steps may be queued between beginning it and taking it: their tokens are no part
    of it, and their rows' slots may change hands. One look is begun at a time: the one before it has been taken.

    Args:
        state: the rows' outputs.
        sequences: at least one, each with unseen tokens.
        slots: the row of each.
    """

    def __init__(self, state: SampleState, sequences: Seq[Sequence], slots: list[int]) -> None:
        self.sequences = list(sequences)
        self.unseen = [s.unseen for s in self.sequences]
        """How many tokens of each row it covers, at most."""
        self._had = [len(s.output) for s in self.sequences]
        at_N1, had_N1 = np.array((slots, self._had), dtype=np.int64)[:, :, None]
        columns_NC = np.minimum(had_N1 + np.arange(max(self.unseen)), state.max_tokens - 1)
        places = torch.from_numpy(np.concatenate((at_N1, at_N1 * state.max_tokens + columns_NC), axis=1))
        places = on_device(places, torch.int64, state.tokens_B.device)
        books = [x.take(places[:, :1]) for x in (state.counts_B, state.finished_B)]
        kinds = (state.out_tokens_BT, state.out_token_logps_BT, state.out_policy_logps_BT)
        found = torch.cat([*books, *(x.take(places[:, 1:]).view(torch.int32) for x in kinds)], dim=1)
        self._ready: torch.cuda.Event | None = None
        self._found = found  # one copy, in whole 32-bit words
        if found.is_cuda:
            # Pinned memory of its own: nobody else gets it before this copy is done, even if nobody takes the look.
            self._found = torch.empty(found.shape, dtype=found.dtype, pin_memory=True).copy_(found, non_blocking=True)
            self._ready = torch.cuda.current_stream(found.device).record_event()

    def take(self) -> list[Drawn]:
        """The tokens, row by row. The host waits for what was queued before the look began, and for nothing after it.

        Raises:
            FloatingPointError: a row's logits were no numbers.
        """
        if self._ready is not None:
            self._ready.synchronize()
        for s, covered in zip(self.sequences, self.unseen):
            s.unseen -= covered
        found = self._found.numpy()
        ended = found[:, 1]
        if (ended == NOT_A_NUMBER).any():
            raise FloatingPointError(
                "the model gave logits that are not numbers (NaN); a weight or an activation overflowed: check the "
                "adapter's values, lower the learning rate, or use bfloat16 in place of float16"
            )
        tokens, own, policy = np.split(found[:, 2:], 3, axis=1)
        logps = (x.view(np.float32).tolist() for x in (own, policy))
        fresh = (found[:, 0] - self._had).tolist()
        return [
            Drawn(t[:n], o[:n], p[:n], end)
            for t, o, p, n, end in zip(tokens.tolist(), *logps, fresh, (ended != RUNS).tolist())
        ]
