"""What is compiled ahead is what a rollout will launch, and not what only larger ones, or other draws, would."""

from __future__ import annotations

from typing import Any

import pytest

from pronghorn import SamplingParams
from pronghorn.config.load import LoadConfig
from pronghorn.rollout.native import engine as engine_module
from pronghorn.rollout.native.dry_run import FEW_ROWS, FEW_TOKENS, WALKS, walks_of
from pronghorn.rollout.native.engine import NativeEngine
from pronghorn.rollout.native.plan import make_sequences

FEW, LARGER, TRUNCATED = WALKS
PROMPT = [*range(5, 105)]  # 100 tokens


@pytest.mark.parametrize(
    "prompts, max_rows, settings, expected",
    [
        (1, 256, {"n": 6, "max_tokens": 200}, [FEW]),  # a step of the blog's: 1,300 tokens
        (1, 256, {"n": FEW_ROWS, "max_tokens": 20}, [FEW]),
        (1, 256, {"n": FEW_ROWS + 1, "max_tokens": 20}, [FEW, LARGER]),
        (1, FEW_ROWS, {"n": 2 * FEW_ROWS, "max_tokens": 20}, [FEW]),  # not at once
        (1, 256, {"n": 1, "max_tokens": FEW_TOKENS - 100}, [FEW]),
        (1, 256, {"n": 1, "max_tokens": FEW_TOKENS - 99}, [FEW, LARGER]),
        (4, 256, {"n": 1, "max_tokens": FEW_TOKENS // 4 - 100}, [FEW]),
        (4, 256, {"n": 1, "max_tokens": FEW_TOKENS // 4 - 99}, [FEW, LARGER]),  # each of four prompts counts
        (1, 256, {"top_p": 0.9}, [FEW, TRUNCATED]),
        (1, 256, {"top_k": 5}, [FEW, TRUNCATED]),
        (1, 256, {"min_p": 0.1}, [FEW, TRUNCATED]),
        (1, 256, {"top_p": 0.9, "temperature": 0.0}, [FEW]),  # greedy: nothing is drawn
        (1, 256, {"top_k": -1}, [FEW]),
        (5, 256, {"n": 4, "min_p": 0.1}, [FEW, LARGER, TRUNCATED]),
    ],
)
def test_what_a_rollout_needs(prompts: int, max_rows: int, settings: dict[str, Any], expected: list[str]) -> None:
    many = [[i, *PROMPT[1:]] for i in range(prompts)]
    sequences = make_sequences(many, SamplingParams(**settings), 4096, 300, frozenset())
    assert walks_of(sequences, max_rows) == {name: WALKS[name] for name in expected}


def test_the_engine_asks_for_them(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(engine_module, "compile_ahead", lambda model, walks: asked.append([*walks]))
    model, tokenizer = loaded
    engine = NativeEngine(model.requires_grad_(False), tokenizer, max_num_seqs=32)
    engine.generate([[5, 6]], SamplingParams(n=FEW_ROWS + 1, max_tokens=1, top_p=0.5))
    engine.generate([[5, 6]], SamplingParams(max_tokens=1))
    engine.ready([[5, 6]], SamplingParams(max_tokens=1, top_k=3), 1.0)
    assert asked == [[FEW, LARGER, TRUNCATED], [FEW], [FEW, TRUNCATED]]


def test_it_is_the_default() -> None:
    assert LoadConfig("a").compile_ahead
