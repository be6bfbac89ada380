"""A prefill by the walk of kernels: the hidden states of the policy, for the tokens that are asked for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from pronghorn import FastLanguageModel
from pronghorn.config.sampling import SamplingParams
from pronghorn.models.modes import inference
from pronghorn.models.packed_layer import prepared, prepared_layers
from pronghorn.models.tree import unwrap
from pronghorn.rollout.native import dense, products
from pronghorn.rollout.native.attention import PrefillAttention
from pronghorn.rollout.native.decode_walk import DecodeWalk, PrefillWalk
from pronghorn.rollout.native.dense import DenseProduct, TrainerProduct
from pronghorn.rollout.native.kv_cache import KVCache, KVShape
from pronghorn.rollout.native.products import HeldProduct, Tables, align_of
from pronghorn.rollout.native.request import Prompt, Sequence
from pronghorn.rollout.native.runner import LivePolicy
from pronghorn.rollout.native.scheduler import Chunk
from tests.grpo.support import fill_lora
from tests.helpers import tiny_llama

SIZE = 4


@pytest.fixture(scope="module", params=["16 bits", "4 bits, held", "4 bits"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model under LoRA, and its walk."""
    in_4bit = request.param != "16 bits"
    folder = str(tiny_llama(tmp_path_factory.mktemp("llama")))
    model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=128, load_in_4bit=in_4bit, dtype=torch.float32)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    fill_lora(model)
    with inference(model), prepared(model):
        found = prepared_layers(model)
        assert found is not None
        dtype = unwrap(model).model.embed_tokens.weight.dtype
        decode = DecodeWalk(model, found, 256, 128, hold=request.param.endswith("held"))
        walk = PrefillWalk(model, found, dtype, decode)
        assert (walk.layers[0].qkv.held is not None) == request.param.endswith("held")
        yield model, walk


def test_is_the_policys_walk(made: Any) -> None:
    model, walk = made
    lengths = (7, 1, 12)
    tables = [list(range(4 * i, 4 * i + 4)) for i in range(3)]
    owners = [
        Sequence(i, i, 0, Prompt([0] * n), SamplingParams(), 1, table=table)
        for i, (n, table) in enumerate(zip(lengths, tables))
    ]
    chunks = [[Chunk(owners[0], 0, 7), Chunk(owners[1], 0, 1), Chunk(owners[2], 0, 5)], [Chunk(owners[2], 5, 12)]]
    generator = torch.Generator().manual_seed(0)
    tokens = {id(o): torch.randint(5, 90, (n,), generator=generator) for o, n in zip(owners, lengths)}
    caches = [KVCache(KVShape.of(unwrap(model)), 12, SIZE) for _ in range(2)]
    for step, asked in itertools.product(chunks, ([0], [2, 0], [])):
        ids = torch.cat([tokens[id(c.sequence)][c.start : c.stop] for c in step])
        positions = torch.cat([torch.arange(c.start, c.stop) for c in step])
        with torch.no_grad():
            wanted = LivePolicy(model).hidden_states(ids, positions, PrefillAttention(caches[0], step))
        got = walk(ids, PrefillAttention(caches[1], step), torch.tensor(asked, dtype=torch.int64))
        assert got.shape == (len(asked), wanted.shape[1])
        torch.testing.assert_close(got, wanted[torch.tensor(asked, dtype=torch.int64)], rtol=1e-5, atol=1e-5)
        for own, other in zip((*caches[1].keys, *caches[1].values), (*caches[0].keys, *caches[0].values)):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)


def test_an_input_is_written_where_it_is_multiplied(made: Any) -> None:
    """And one that lies elsewhere, or of another size than was announced, is copied there."""
    _, walk = made
    product = walk.layers[0].o
    x = torch.randn(5, product.group.members[0].base.in_features)
    wanted = product(x)
    place = product.place(5)
    assert place is not None
    torch.testing.assert_close(product(place.copy_(x)), wanted, rtol=0, atol=0)
    product.place(9)
    torch.testing.assert_close(product(x), wanted, rtol=0, atol=0)
    place = product.place(5)
    place.fill_(float("nan"))
    torch.testing.assert_close(product(x), wanted, rtol=0, atol=0)


def test_many_rows_of_a_16_bit_base_are_padded_only_where_bits_would_differ(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, walk = made
    group = walk.layers[0].qkv.group
    if group.members[0].nf4 is not None:
        pytest.skip("a 4-bit base")
    pads, call = [], TrainerProduct.__call__

    def watched(self: TrainerProduct, x: torch.Tensor, pad: bool = True) -> torch.Tensor:
        pads.append(pad)
        return call(self, x, pad)

    product = DenseProduct(group, torch.float32)
    monkeypatch.setattr(TrainerProduct, "__call__", watched)
    own: list[int] = []
    monkeypatch.setattr(DenseProduct, "by_kernel", lambda self, x: own.append(len(x)))
    asked: list[int] = []
    sizes = ((64, 64), (32, 256))  # rows that are tried once for all, and those that our own kernel is meant for
    for agrees, (tried, most), rows in itertools.product((True, False), sizes, (32, 33, 65, 256, 257, 383, 384, 1024)):
        monkeypatch.setattr(dense, "agrees", lambda *of, agrees=agrees: asked.append(of[-1]) or agrees)
        product.tried, product.most = tried, most
        by_kernel = rows <= tried or (agrees and rows <= most)
        assert (product.place(rows) is None) == by_kernel
        product(torch.randn(rows, group.members[0].base.in_features))
        if by_kernel:
            assert own.pop() == rows and not pads
        else:
            assert pads.pop() == (rows < 384 and not agrees) and not pads and not own
    assert min(asked) == 33 and max(asked) == 383  # from 384 on there is nothing to try


def test_rows_of_long_sums_end_with_a_whole_step_of_zeros(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, adapters and inputs alike: what stands beyond the last column changes no sum."""
    _, walk = made
    group = walk.layers[0].down.group
    if group.members[0].nf4 is None:
        pytest.skip("a 16-bit base is read as it lies")
    I = group.members[0].base.in_features  # noqa: E741 - a shape letter
    monkeypatch.setattr(products.ordered, "LONG_SUM", I)
    assert align_of(I) == 128 and align_of(I - 1) == 64
    product = HeldProduct(group, torch.float32, Tables(), 4)
    x = torch.randn(3, I)
    y = product(x)
    weight, inputs = product.member.weight_OI, products.whole_rows(product.table_TK[:3])
    assert weight.shape[1] == inputs.shape[1] and weight.shape[1] % 128 == 0
    assert not weight[:, I + group.rank :].any() and not inputs[:, I + group.rank :].any()
    torch.testing.assert_close(inputs @ weight.T, y, rtol=1e-5, atol=1e-5)


def assert_the_trainer_s(product: HeldProduct, rows: int) -> None:
    """Whatever lies in the rows behind these."""
    x = torch.randn(rows, product.inputs)
    product.table_TK[rows:].fill_(float("nan"))
    expected = TrainerProduct(product.group, torch.float32)(x.clone())
    torch.testing.assert_close(product(x), expected, rtol=1e-4, atol=1e-4)


def test_17_to_64_rows_are_multiplied_as_64_beside_their_narrow_product(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper, whatever lies in the rows behind them."""
    _, walk = made
    group = walk.layers[0].qkv.group
    if group.members[0].nf4 is None:
        pytest.skip("a 16-bit base is read as it lies")
    monkeypatch.setattr(products, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(products.ordered, "why_not", lambda *_: "")
    monkeypatch.setattr(products.ordered, "mapped_rows", lambda *_: 64)
    seen, call = [], products.ordered_matmul

    def watched(x: torch.Tensor, *given: Any, late: int = 0) -> torch.Tensor:
        seen.append((len(x), late))
        return call(x, *given, late=late)

    monkeypatch.setattr(products, "ordered_matmul", watched)
    product = HeldProduct(group, torch.float32, Tables(), 96)
    for rows in (16, 17, 40, 64):
        assert_the_trainer_s(product, rows)
    assert seen == [(64, product.inputs)] * 3
    product(torch.randn(65, product.inputs))
    assert len(seen) == 3, "more rows are the matrix library's"


def test_some_rows_of_kept_weights_are_one_launch_with_their_narrow_product(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper, whatever lies in the rows behind them; it makes a start of its own then. Others as before."""
    _, walk = made
    group = walk.layers[0].qkv.group
    if group.members[0].nf4 is None:
        pytest.skip("a 16-bit base is read as it lies")
    seen, call = [], products.adapted.adapted_matmul

    def watched(table: torch.Tensor, rows: int, *given: Any, **more: Any) -> torch.Tensor:
        seen.append((len(table), rows))
        assert more == {"coded": "codes"}
        return call(table, rows, *given)

    monkeypatch.setattr(products.adapted, "coded_of", lambda weights: "codes")  # a kernel's alone
    monkeypatch.setattr(products.adapted, "takes", lambda rows, weight, a: 17 <= rows <= 96 and a is not None)
    monkeypatch.setattr(products.adapted, "adapted_matmul", watched)
    product = HeldProduct(group, torch.float32, Tables(), 100)
    for rows in (16, 17, 96, 97):
        assert_the_trainer_s(product, rows)
        assert product.makes_a_start(rows) == (group.a_RI is not None and 17 <= rows <= 96)
    assert seen == ([(100, 17), (100, 96)] if group.a_RI is not None else [])


@pytest.mark.parametrize("rows", [32, 64])
def test_fewer_outputs_read_the_4_bit_weights_where_all_rows_can(
    made: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    group = made[1].layers[0].gate_up.group
    if group.members[0].nf4 is None:
        pytest.skip("a 16-bit base")
    monkeypatch.setattr(products, "_MANY_OUTPUTS", group.outputs + 1)
    monkeypatch.setattr(products, "_MANY_WIDE", group.outputs)
    monkeypatch.setattr(products, "takes_nf4", lambda *_: True)
    monkeypatch.setattr(products, "rows_by_codes", lambda members: rows)
    product = HeldProduct(group, torch.float32, Tables(), 65)
    assert [product.place(n) is None for n in (1, 64, 65)] == [rows == 64, rows == 64, False]
    monkeypatch.setattr(products, "_MANY_WIDE", group.outputs + 1)
    assert HeldProduct(group, torch.float32, Tables(), 65).in_nf4 is None


@pytest.mark.parametrize("many", [True, False])
def test_many_outputs_of_some_rows_read_the_4_bit_weights(
    made: Any, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    """Up to 32 rows; adapters that an optimizer has changed show either way."""
    _, walk = made
    group = walk.layers[0].gate_up.group
    if group.members[0].nf4 is None:
        pytest.skip("a 16-bit base")
    monkeypatch.setattr(products, "_MANY_OUTPUTS", group.outputs if many else group.outputs + 1)
    monkeypatch.setattr(products, "takes_nf4", lambda *_: True)
    seen, call = [], products.NF4Product.__call__
    monkeypatch.setattr(products.NF4Product, "__call__", lambda self, x: (seen.append(len(x)), call(self, x))[1])
    product = HeldProduct(group, torch.float32, Tables(), 48)
    for change in (0.1, -0.1):
        for b_Or in group.bs_Or:
            b_Or += change
        product.refresh()
        for rows in (17, 32, 33):
            x = torch.randn(rows, group.members[0].base.in_features)
            place = product.place(rows)
            assert (place is None) == (many and rows <= 32)
            expected = TrainerProduct(group, torch.float32)(x.clone())
            torch.testing.assert_close(product(x), expected, rtol=1e-4, atol=1e-4)
    assert seen == ([17, 32] * 2 if many else [])
