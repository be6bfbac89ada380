"""The loop that looks at every token: on the CPU, and on a GPU for alternatives or hooked layers."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..base import Logprob
from .ending import Ending
from .request import Sequence
from .runner import Runner
from .sampler import Drawn, sample
from .sampling_rows import SamplingRows
from .scheduler import Scheduler


def run_stepwise(scheduler: Scheduler, runner: Runner, ending: Ending, vocab: int, tokenizer: Any) -> None:
    """Run until every sequence has ended."""
    rows: SamplingRows | None = None
    while (step := scheduler.next_step()) is not None:
        logits_BV, sequences = runner.run(step)
        if not sequences:
            continue
        if rows is None or not rows.serves(sequences):
            rows = SamplingRows(sequences, vocab, logits_BV.device)
        drawn = sample(logits_BV, rows)
        rows.advance(drawn.tokens_B)
        _record(drawn, sequences, tokenizer)
        for sequence in sequences:
            ending.check(sequence)
        ending.report(len(sequences))


def _record(drawn: Drawn, sequences: list[Sequence], tokenizer: Any) -> None:
    """Append each row's token and log-probs to its sequence."""
    tokens = drawn.tokens_B.tolist()
    own, policy = torch.stack((drawn.token_logps_B, drawn.policy_logps_B)).tolist()
    if any(math.isnan(x) for x in policy):
        raise FloatingPointError(
            "the model gave logits that are not numbers (NaN); a weight or an activation overflowed: check the "
            "adapter's values, lower the learning rate, or use bfloat16 in place of float16"
        )
    for sequence, token, own_logp, policy_logp in zip(sequences, tokens, own, policy):
        sequence.output.append(token)
        sequence.token_logprobs.append(own_logp)
        sequence.policy_logprobs.append(policy_logp)
    if drawn.top_ids_BA is not None and drawn.top_logps_BA is not None:
        _record_alternatives(drawn, sequences, tokenizer)


def _record_alternatives(drawn: Drawn, sequences: list[Sequence], tokenizer: Any) -> None:
    """vLLM's ``logprobs``: the likeliest ids of each row that asked, and the drawn one."""
    assert drawn.top_ids_BA is not None and drawn.top_logps_BA is not None
    assert drawn.raw_logps_B is not None and drawn.ranks_B is not None
    table = zip(
        sequences, drawn.top_ids_BA.tolist(), drawn.top_logps_BA.tolist(), drawn.raw_logps_B.tolist(),
        drawn.ranks_B.tolist(),
    )  # fmt: skip
    for sequence, ids, logps, chosen, rank in table:
        if sequence.params.logprobs is None:
            continue
        token = sequence.output[-1]
        found = {token: Logprob(chosen, rank, tokenizer.decode([token]))}
        for place, (i, logp) in enumerate(zip(ids[: sequence.params.logprobs], logps)):
            found.setdefault(i, Logprob(logp, place + 1, tokenizer.decode([i])))
        sequence.logprobs.append(found)
