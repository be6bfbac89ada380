"""Prefill of few tokens from tensors of fixed sizes: the walk of the same prompts by themselves, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn import FastLanguageModel
from pronghorn.config.sampling import SamplingParams
from pronghorn.kernels import ordered_attention_triton
from pronghorn.kernels.reference import ordered_attention as reference
from pronghorn.models.modes import inference
from pronghorn.models.packed_layer import prepared, prepared_layers
from pronghorn.models.tree import unwrap
from pronghorn.rollout.native import prefill
from pronghorn.rollout.native.attention import PrefillAttention
from pronghorn.rollout.native.decode_walk import DecodeWalk, PrefillWalk
from pronghorn.rollout.native.kv_cache import KVCache, KVShape
from pronghorn.rollout.native.prefill import MOST_PROMPTS, SIZES, FixedAttention, Prefill, size_of
from pronghorn.rollout.native.request import Prompt, Sequence
from pronghorn.rollout.native.scheduler import Chunk
from tests.grpo.support import fill_lora
from tests.helpers import tiny_llama

SIZE = 4


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tiny_llama(tmp_path_factory.mktemp("llama")))
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=128, load_in_4bit=True, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    fill_lora(model)
    with inference(model), prepared(model):
        found = prepared_layers(model)
        assert found is not None
        yield model, PrefillWalk(model, found, torch.float32, DecodeWalk(model, found, 16, 128))


def chunks_of(*lengths: int) -> list[Chunk]:
    """Prompts in blocks of 4 of a cache, from its last block down."""
    chunks, free = [], 64 if sum(lengths) < 200 else 2000
    for i, n in enumerate(lengths):
        count = -(-n // SIZE)
        table = [free - 1 - j for j in range(count)]
        free -= count
        chunks.append(Chunk(Sequence(i, i, 0, Prompt([0] * n), SamplingParams(), 1, table=table), 0, n))
    return chunks


def test_fixed_sizes_change_nothing(made: Any) -> None:
    """One prompt, several, as many tokens as there is room for, and fewer again."""
    model, walk = made
    caches = [KVCache(KVShape.of(unwrap(model)), 64, SIZE) for _ in range(2)]
    heads = unwrap(model).config.num_attention_heads
    fixed = FixedAttention(caches[0], heads, tokens=40, prompts=4)
    for lengths, asked in (((7,), [6]), ((12, 1, 9), [11, 12, 21]), ((20, 20), [39, 0]), ((3,), [2])):
        chunks, ids = chunks_of(*lengths), torch.randint(5, 90, (sum(lengths),))
        for pages in (*caches[0].keys, *caches[0].values, *caches[1].keys, *caches[1].values):
            pages.fill_(0.5)
        wanted = walk(ids, PrefillAttention(caches[1], chunks), torch.tensor(asked))
        fixed.fill(ids.tolist(), chunks, asked)
        got = walk(fixed.ids_T, fixed, fixed.asked_L)
        assert got.shape[0] == 4
        torch.testing.assert_close(got[: len(asked)], wanted, rtol=1e-5, atol=1e-5)
        for own, other in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values)):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_tiles_that_are_not_there_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernel, with the tiles of two prompts among zeros: as with no others, and the rest is left alone."""
    cache = KVCache(KVShape(1, 2, 16, torch.float16, torch.device("cpu")), 64, SIZE)
    cache.keys[0].normal_()
    cache.values[0].normal_()
    fixed = FixedAttention(cache, 4, tokens=128, prompts=3)
    assert fixed._tiles_N4.shape[0] > 3
    chunks = chunks_of(70, 33)
    fixed.fill([0] * 103, chunks, [102])
    q = torch.randn(128, 4, 16).half()
    k, v = (t[0].flatten(0, 1) for t in (cache.keys, cache.values))
    out = torch.full((128, 4, 16), 7.0).half()
    ordered_attention_triton.ordered_attention_forward(q, k, v, fixed._rows, 0.25, out)
    wanted = torch.empty_like(out)
    reference.ordered_attention_forward(q, k, v, fixed._rows, 0.25, wanted)
    torch.testing.assert_close(out[:103], wanted[:103], rtol=2e-3, atol=2e-3)
    assert (out[103:] == 7.0).all()


def test_which_graph_holds_which_prefill() -> None:
    least, second, third, most = SIZES
    assert size_of(chunks_of(100, 100, 40)) == size_of(chunks_of(least)) == size_of(chunks_of(1)) == least
    assert size_of(chunks_of(200, second - 300)) == size_of(chunks_of(second)) == second
    assert size_of(chunks_of(least + 1)) is None  # nearly half of it would be padding
    assert size_of(chunks_of(second + 100)) == third and size_of(chunks_of(most)) == most
    assert size_of(chunks_of(most, 1)) is None
    assert size_of(chunks_of(*[1] * MOST_PROMPTS)) == least and size_of(chunks_of(*[1] * (MOST_PROMPTS + 1))) is None
    assert size_of([Chunk(chunks_of(9)[0].sequence, 4, 9)]) is None


class Graph:
    """What a graph would be is a call here."""

    said: list[str] = []

    def __init__(self, run: Any) -> None:
        self.run, self.out = run, run()

    def replay(self) -> None:
        self.said.append("replayed")
        self.out.copy_(self.run())

    @classmethod
    def captured(cls, run: Any) -> Any:
        cls.said.append("captured")
        graph = cls(run)
        return graph, graph.out


def test_the_second_of_a_size_is_captured_and_then_replayed(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of many tokens stay launches."""
    model, walk = made
    cache = KVCache(KVShape.of(unwrap(model)), 200, SIZE)
    monkeypatch.setattr(prefill, "SIZES", (16, 32))
    own = Prefill(walk, cache, unwrap(model).config.num_attention_heads, Graph.captured)
    assert not own.fixed  # on a CPU
    own.fixed = True
    for lengths, expected in (
        ((9,), []), ((40,), []), ((25,), []), ((5, 6), ["captured", "replayed"]), ((33,), []), ((16,), ["replayed"]),
        ((32,), ["captured", "replayed"]), ((15,), ["replayed"]), ((24,), ["replayed"]), ((23,), []),
    ):  # fmt: skip
        Graph.said.clear()
        ids, chunks = torch.randint(5, 90, (sum(lengths),)), chunks_of(*lengths)
        asked = [sum(lengths[: i + 1]) - 1 for i in range(len(lengths))]
        got = own(ids.tolist(), chunks, asked).clone()
        wanted = walk(ids, PrefillAttention(cache, chunks), torch.tensor(asked))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert Graph.said == expected


def test_all_can_be_captured_ahead(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, walk = made
    cache = KVCache(KVShape.of(unwrap(model)), 64, SIZE)
    monkeypatch.setattr(prefill, "SIZES", (16, 32))
    own = Prefill(walk, cache, unwrap(model).config.num_attention_heads, Graph.captured)
    own.capture_all()
    assert not own.graphs  # there are none on a CPU
    own.fixed = True
    own.capture_all()
    assert list(own.graphs) == [32, 16]
    Graph.said.clear()
    own(list(range(5, 14)), chunks_of(9), [8])
    assert Graph.said == ["replayed"]
