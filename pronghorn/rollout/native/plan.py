"""From prompts and settings to checked sequences in queue order, and the KV blocks that they need."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from ...config.errors import ConfigError
from ...config.sampling import SamplingParams
from .blocks import blocks_for
from .random import fresh_seed
from .request import Prompt, Sequence
from .stopping import stop_ids


def make_sequences(
    prompts: Seq[Seq[int]],
    params: SamplingParams | Seq[SamplingParams],
    max_seq_length: int,
    vocab: int,
    eos: frozenset[int],
) -> list[Sequence]:
    """``n`` sequences a prompt, in order; equal prompts share one :class:`Prompt`, so that they share blocks.

    Completions that would pass ``max_seq_length`` are clipped to it, as vLLM does.

    Raises:
        ConfigError: an empty prompt, one that leaves no room, an id outside the vocabulary, unequal counts.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise ConfigError(f"{len(prompts)} prompts with {len(each)} sampling_params; give one for all, or one for each")
    known: dict[tuple[int, ...], Prompt] = {}
    sequences: list[Sequence] = []
    for request, (ids, settings) in enumerate(zip(prompts, each)):
        _check(request, ids, max_seq_length, vocab)
        prompt = known.setdefault(tuple(ids), Prompt(list(ids)))
        room = max_seq_length - len(ids)
        max_new = room if settings.max_tokens is None else min(settings.max_tokens, room)
        seed = fresh_seed() if settings.seed is None else settings.seed
        ends = stop_ids(settings, eos)
        sequences += [
            Sequence(len(sequences) + i, request, i, prompt, settings, max_new, seed, ends) for i in range(settings.n)
        ]
    return sequences


def _check(request: int, ids: Seq[int], max_seq_length: int, vocab: int) -> None:
    if len(ids) == 0:
        raise ConfigError(f"prompts[{request}] is empty; give at least one token, such as the BOS token")
    if len(ids) >= max_seq_length:
        raise ConfigError(
            f"prompts[{request}] has {len(ids)} tokens, which leaves no room for a new one under "
            f"max_seq_length={max_seq_length}; shorten the prompt, or load the model with a larger max_seq_length"
        )
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        raise ConfigError(
            f"prompts[{request}] holds the token id {low if low < 0 else high}, outside the model's vocabulary of "
            f"{vocab}; encode it with this model's own tokenizer"
        )


def blocks_needed(sequences: Seq[Sequence], block_size: int, max_rows: int) -> tuple[int, int]:
    """``(needed, at_least)``: blocks with which no sequence ever waits or is preempted for want of one, and the blocks
    of the longest single sequence."""
    own = sorted((blocks_for(s.longest, block_size) - len(s.prompt) // block_size for s in sequences), reverse=True)
    prompts = {id(s.prompt): len(s.prompt) // block_size for s in sequences}
    shared = sorted(prompts.values(), reverse=True)
    rows = min(max_rows, len(sequences))
    # One block a row more: admission keeps so many free (Scheduler._admit).
    needed = sum(own[:rows]) + sum(shared[:rows]) + rows + 1
    return needed, max(blocks_for(s.longest, block_size) for s in sequences)
