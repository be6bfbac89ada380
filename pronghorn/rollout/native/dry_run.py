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
from .prefill import MOST_PROMPTS
from .request import Prompt, Sequence
from .scheduler import Chunk

_TOKENS, _MORE_TOKENS = (8, 16, 32, 272), (2064, 4112, 4240)
"""One number of rows for each way that the adapters' narrow products are taken (``kernels/low_rank_triton.py``, and on
Hopper ``low_rank_cuda.py``)."""

_SCORED, _MORE_SCORED = (
    ([8, 4, 4], [136, 68, 68]),
    ([1032] + 8 * [129], [2056] + 8 * [257], [2120] + 8 * [265]),
)
"""A prompt and its completions, for each way that these products are written to two places. Attention's backward copies
the first two prompts for their completions; the third is too long for that (``kernels/shared_prefix.py``)."""

_POSITIONS = 512
"""Tokens of the longest row: two segments, so that their merging is walked too."""

_BLOCK = 16


def rollout_steps(model: nn.Module) -> None:
    """Inside :func:`pronghorn.kernels.launch.recording` and :func:`pronghorn.models.packed_layer.prepared`: what
    prefill, decode, plain sampling and GRPO's scoring of ``model`` launch for few rows and tokens. That is what a first
    step waits for, so it is walked, and compiled, before the rest. Nothing where layers do not run fused.
    """
    found = _found(model)
    if found is None:
        return
    _sample(model, Variant())  # first, as its kernels take the longest to compile
    _prompts(model, found, _TOKENS, (16, 32, MOST_PROMPTS))
    _decoded(model, found, (1, 16), hold=False)  # a tile of the products, or a way of attention, each
    # Attention in one launch before other products than those of few rows, which many heads take for short rows.
    _decoded(model, found, (16,), hold=False, positions=_POSITIONS // 2)
    _scored(model, found, _SCORED)


def larger_steps(model: nn.Module) -> None:
    """As :func:`rollout_steps`: what more rows and tokens launch, and draws that are truncated (top-k, top-p, min-p).

    Penalties and minimum lengths compile when they are first asked for.
    """
    found = _found(model)
    if found is None:
        return
    _sample(model, Variant(truncated=True))
    _decoded(model, found, (24, 32, MAX_ROWS), hold=False)
    # Where there is memory for weights in 16 bits, many rows read those.
    _decoded(model, found, (32, MAX_ROWS, 128, 192, 256), hold=True)
    _prompts(model, found, _MORE_TOKENS, ())
    _scored(model, found, _MORE_SCORED)


WALKS: dict[str, Walk] = {"rollouts": rollout_steps, "larger rollouts": larger_steps}
"""Both, in the order in which their kernels are asked for."""


def _found(model: nn.Module) -> list[tuple[Parts, Groups]] | None:
    """Its layers; None where they do not run fused."""
    found = prepared_layers(model)
    return None if found is None or why_no_walk(model) else found


@torch.no_grad()
def _prompts(model: nn.Module, found: list[tuple[Parts, Groups]], many_tokens: Seq[int], many_asked: Seq[int]) -> None:
    cache = _cache(model, len(found[:2]))
    for tokens in many_tokens:
        _scored_forward(model, found[0], tokens)
        _prefill(model, found, cache, tokens)
    for asked in many_asked:
        _prefill(model, found, cache, many_tokens[-1], asked)


@torch.no_grad()
def _decoded(
    model: nn.Module,
    found: list[tuple[Parts, Groups]],
    many_rows: Seq[int],
    hold: bool,
    positions: int = _POSITIONS,
) -> None:
    cache = _cache(model, 1)
    for rows in many_rows:
        _decode(model, found, cache, rows, hold, positions)


def _scored(model: nn.Module, found: list[tuple[Parts, Groups]], many_lengths: Seq[list[int]]) -> None:
    for lengths in many_lengths:
        layer_step(model, found[0], lengths, [None] + [0] * (len(lengths) - 1), ordered=True)


def _scored_forward(model: nn.Module, layer: tuple[Parts, Groups], tokens: int) -> None:
    stack = unwrap(model).model
    weight_VD = stack.embed_tokens.weight
    hidden_TD = weight_VD.new_zeros(tokens, weight_VD.shape[1])
    cos_1TE, sin_1TE = stack.rotary_emb(hidden_TD, position_ids=torch.arange(tokens, device=weight_VD.device)[None])
    attention = PackedAttention([tokens], weight_VD.device, ordered=True)
    layer_forward(*layer, hidden_TD, (cos_1TE[0], sin_1TE[0]), attention)


def _cache(model: nn.Module, layers: int) -> KVCache:
    return KVCache(dataclasses.replace(KVShape.of(unwrap(model)), layers=layers), 2, _BLOCK)


def _decode(
    model: nn.Module,
    found: list[tuple[Parts, Groups]],
    cache: KVCache,
    rows: int,
    hold: bool,
    positions: int,
) -> None:
    device = cache.shape.device
    table_BN = torch.zeros(rows, positions // _BLOCK, dtype=torch.int32, device=device)
    counts_B = torch.zeros(rows, dtype=torch.int32, device=device)
    heads = unwrap(model).config.num_attention_heads
    walk = DecodeWalk(model, found[:1], rows, positions, hold)
    walk.refresh()
    walk(torch.zeros(rows, dtype=torch.int64, device=device), PagedDecode(cache, table_BN, counts_B, counts_B, heads))


def _prefill(model: nn.Module, found: list[tuple[Parts, Groups]], cache: KVCache, tokens: int, asked: int = 1) -> None:
    """By two layers, as the last one is done for the tokens alone that are ``asked`` for."""
    device, dtype = cache.shape.device, cache.shape.dtype
    sequence = Sequence(0, 0, 0, Prompt([0] * tokens), SamplingParams(), 1, table=[0] * -(-tokens // _BLOCK))
    walk = PrefillWalk(model, found[:2], dtype, DecodeWalk(model, found[:2], MAX_ROWS, _POSITIONS))
    walk(
        torch.zeros(tokens, dtype=torch.int64, device=device),
        PrefillAttention(cache, [Chunk(sequence, 0, tokens)]),
        torch.zeros(asked, dtype=torch.int64, device=device),
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
