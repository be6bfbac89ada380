"""Rollouts and the scoring of them, walked for the kernels that they would launch: see ``kernels/warm.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq

import torch
from torch import nn

from ...config.sampling import SamplingParams
from ...kernels.nf4_matmul import MAX_ROWS
from ...kernels.sample import sample_step
from ...kernels.sample_state import SampleState, Variant
from ...models.attention import PackedAttention
from ...models.dry_run import layer_step
from ...models.forward import head
from ...models.fused_block import layer_forward
from ...models.packed_layer import prepared_layers
from ...models.parts import Groups, Parts
from ...models.tree import unwrap
from ..warmup import Walk
from .attention import PrefillAttention
from .decode_walk import DecodeWalk, PrefillWalk, why_no_walk
from .kv_cache import KVCache, KVShape
from .paged import PagedDecode
from .request import Prompt, Sequence
from .scheduler import Chunk

FEW_ROWS, FEW_TOKENS = 16, 2048
"""Rows decoded, and tokens of all prompts and completions, up to which :func:`rollout_steps` has all kernels."""

_TOKENS, _MORE_TOKENS = (8, 16, 32, 272), (2064, 4112, 4240)
"""One number of rows for each way that the adapters' narrow products are taken (``kernels/low_rank_triton.py``, and on
Hopper ``low_rank_cuda.py``)."""

_SCORED = ([8, 4, 4], [136, 68, 68], [1000] + 10 * [104])
_MORE_SCORED = ([1032] + 8 * [129], [2056] + 8 * [257], [2120] + 8 * [265])
"""A prompt and its completions, for each way that these products are written to two places. Attention's backward copies
the first two prompts for their completions; the third is too long for that (``kernels/shared_prefix.py``)."""

_POSITIONS = 512
"""Tokens of the longest row: two segments, so that their merging is walked too."""

_BLOCK = 16


def rollout_steps(model: nn.Module) -> None:
    """Inside :func:`pronghorn.kernels.launch.recording` and :func:`pronghorn.models.packed_layer.prepared`: what
    prefill, decode, plain sampling and GRPO's scoring of ``model`` launch, for up to :data:`FEW_ROWS` rows and
    :data:`FEW_TOKENS` tokens. Nothing where layers do not run fused.

    Penalties and minimum lengths compile when they are first asked for.
    """
    found = _found(model)
    if found is None:
        return
    _sample(model, Variant())  # first, as its kernels take the longest to compile
    with torch.no_grad():
        _scored_and_prefilled(model, found, _TOKENS)
        cache = _cache(model)
        for rows in (1, FEW_ROWS):  # a tile of the products, or a way of attention, each
            _decode(model, found, cache, rows, hold=False)
        # Attention in one launch before other products than those of few rows, which many heads take for short rows.
        _decode(model, found, cache, FEW_ROWS, hold=False, positions=_POSITIONS // 2)
    for lengths in _SCORED:
        layer_step(model, found[0], lengths, [None] + [0] * (len(lengths) - 1), ordered=True)


def larger_steps(model: nn.Module) -> None:
    """As :func:`rollout_steps`, for more rows or tokens: what these launch beside it."""
    found = _found(model)
    if found is None:
        return
    with torch.no_grad():
        _scored_and_prefilled(model, found, _MORE_TOKENS)
        cache = _cache(model)
        for rows in (24, 32, MAX_ROWS):
            _decode(model, found, cache, rows, hold=False)
        for rows in (32, MAX_ROWS, 128, 192, 256):  # where there is memory for weights in 16 bits, many rows read those
            _decode(model, found, cache, rows, hold=True)
    for lengths in _MORE_SCORED:
        layer_step(model, found[0], lengths, [None] + [0] * (len(lengths) - 1), ordered=True)


def truncated_draws(model: nn.Module) -> None:
    """As :func:`rollout_steps`: what drawing by top-k, top-p or min-p launches."""
    if _found(model) is not None:
        _sample(model, Variant(truncated=True))


WALKS: dict[str, Walk] = {
    "rollouts": rollout_steps,
    "larger rollouts": larger_steps,
    "draws by top-k, top-p or min-p": truncated_draws,
}
"""All of them, by what they are called."""


def walks_of(sequences: Seq[Sequence], max_rows: int) -> dict[str, Walk]:
    """Those that foresee a rollout of ``sequences``, at most ``max_rows`` at once, and its scoring."""
    few, larger, truncated = WALKS
    prompts = {id(s.prompt): len(s.prompt) for s in sequences}
    tokens = sum(prompts.values()) + sum(s.max_new for s in sequences)
    wanted = {
        few: True,
        larger: min(max_rows, len(sequences)) > FEW_ROWS or tokens > FEW_TOKENS,
        truncated: any(s.params.truncated for s in sequences),
    }
    return {name: WALKS[name] for name, so in wanted.items() if so}


def _found(model: nn.Module) -> list[tuple[Parts, Groups]] | None:
    """Its layers; None where they do not run fused."""
    found = prepared_layers(model)
    return None if found is None or why_no_walk(model) else found


def _scored_and_prefilled(model: nn.Module, found: list[tuple[Parts, Groups]], many_tokens: Seq[int]) -> None:
    cache = _cache(model)
    for tokens in many_tokens:
        _scored_forward(model, found[0], tokens)
        _prefill(model, found, cache, tokens)


def _scored_forward(model: nn.Module, layer: tuple[Parts, Groups], tokens: int) -> None:
    stack = unwrap(model).model
    weight_VD = stack.embed_tokens.weight
    hidden_TD = weight_VD.new_zeros(tokens, weight_VD.shape[1])
    cos_1TE, sin_1TE = stack.rotary_emb(hidden_TD, position_ids=torch.arange(tokens, device=weight_VD.device)[None])
    attention = PackedAttention([tokens], weight_VD.device, ordered=True)
    layer_forward(*layer, hidden_TD, (cos_1TE[0], sin_1TE[0]), attention)


def _cache(model: nn.Module) -> KVCache:
    return KVCache(dataclasses.replace(KVShape.of(unwrap(model)), layers=1), 2, _BLOCK)


def _decode(
    model: nn.Module,
    found: list[tuple[Parts, Groups]],
    cache: KVCache,
    rows: int,
    hold: bool,
    positions: int = _POSITIONS,
) -> None:
    device = cache.shape.device
    table_BN = torch.zeros(rows, positions // _BLOCK, dtype=torch.int32, device=device)
    counts_B = torch.zeros(rows, dtype=torch.int32, device=device)
    heads = unwrap(model).config.num_attention_heads
    walk = DecodeWalk(model, found[:1], rows, positions, hold)
    walk.refresh()
    walk(torch.zeros(rows, dtype=torch.int64, device=device), PagedDecode(cache, table_BN, counts_B, counts_B, heads))


def _prefill(model: nn.Module, found: list[tuple[Parts, Groups]], cache: KVCache, tokens: int) -> None:
    device, dtype = cache.shape.device, cache.shape.dtype
    sequence = Sequence(0, 0, 0, Prompt([0] * tokens), SamplingParams(), 1, table=[0] * -(-tokens // _BLOCK))
    walk = PrefillWalk(model, found[:1], dtype, DecodeWalk(model, found[:1], MAX_ROWS, _POSITIONS))
    walk(
        torch.zeros(tokens, dtype=torch.int64, device=device),
        PrefillAttention(cache, [Chunk(sequence, 0, tokens)]),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


@torch.no_grad()
def _sample(model: nn.Module, variant: Variant) -> None:
    """After a prefill rows are named, in a decode step they are the first ones."""
    base = unwrap(model)
    device, vocab = base.model.embed_tokens.weight.device, base.config.vocab_size
    state = SampleState(1, vocab, _BLOCK, device=device, penalties=False, tallies=False)
    x_1V = torch.zeros(1, vocab, device=device)
    out = head(model)
    for rows_1 in (None, torch.zeros(1, dtype=torch.int32, device=device)):
        sample_step(x_1V, state, variant, rows_1, out.bias_V, out.scale, out.softcap)
