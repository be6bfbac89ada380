"""From finished sequences to results in vLLM's shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..base import CompletionOutput, RequestOutput
from .request import Sequence


def request_outputs(
    sequences: list[Sequence], requests: int, ids: Iterator[int], tokenizer: Any
) -> list[RequestOutput]:
    """One result for each request, in order; ``ids`` numbers them."""
    results: list[RequestOutput | None] = [None] * requests
    for sequence in sequences:
        result = results[sequence.request]
        if result is None:
            prompt = sequence.prompt
            text = prompt.decoded(tokenizer) if sequence.params.detokenize else None
            result = results[sequence.request] = RequestOutput(str(next(ids)), text, list(prompt.tokens))
        result.outputs.append(_completion(sequence))
    return [result for result in results if result is not None]


def _completion(sequence: Sequence) -> CompletionOutput:
    return CompletionOutput(
        index=sequence.index,
        text=sequence.stopped_text or "",
        token_ids=sequence.output,
        token_logprobs=sequence.token_logprobs,
        policy_logprobs=sequence.policy_logprobs,
        cumulative_logprob=math.fsum(sequence.token_logprobs),
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        logprobs=sequence.logprobs if sequence.params.logprobs is not None else None,
    )
