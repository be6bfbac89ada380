"""A product with its adapters in one launch on a GPU: the bits of x A^T and of the ordered product, one behind the
other; races, in a graph and in a chain; what lies beside its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from pronghorn.kernels import low_blocks
from pronghorn.kernels.adapted_matmul import adapted_matmul, coded_of, takes
from pronghorn.kernels.launch import before_a_start, chained
from pronghorn.kernels.low_rank import low_rank
from pronghorn.kernels.ordered_matmul import DenseMember, ordered_matmul
from pronghorn.kernels.rms_norm import norm_forward
from pronghorn.quant.nf4 import NF4Tensor

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Hopper's alone"
    ),
]
SHAPES = {"down": (4096, 14336, 32), "o": (4096, 4096, 32), "qkv": (6144, 4096, 96)}  # of an 8B Llama
MEMBERS = {"down": (4096,), "o": (4096,), "qkv": (4096, 1024, 1024)}


class Operands:
    """``members``: of so many outputs, NF4; the weight is what these are in 16 bits. ``eighths`` of its steps are
    codes, None: as many as are meant to be.
    """

    def __init__(
        self,
        outputs: int,
        inputs: int,
        ranks: int,
        dtype: torch.dtype = torch.bfloat16,
        members: Sequence[int] = (),
        eighths: int | None = None,
    ) -> None:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda").to(dtype)

        width = -(-(inputs + ranks) // 64) * 64
        self.inputs, self.ranks = inputs, ranks
        self.weight, self.a, self.norm = normal(outputs, width), normal(ranks, inputs), normal(inputs)
        self.weight[:, inputs + ranks :] = 0
        self.coded = None
        if members:
            nf4 = [NF4Tensor.quantize(normal(n, inputs) / 50).in_tiles() for n in members]
            self.coded = coded_of(nf4, eighths)
            self.weight[:, :inputs] = torch.cat([w.dequantize(dtype) for w in nf4])
        self.table = torch.zeros(384, width, dtype=dtype, device="cuda")
        self.table[:, :inputs] = normal(384, inputs)

    def expected(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """By the kernel of x A^T, and by that of the ordered product."""
        table = self.table[:rows].clone()
        low = low_rank(table[:, : self.inputs], self.a, table[:, self.inputs : self.inputs + self.ranks])
        return torch.cat([ordered_matmul(part, [DenseMember(self.weight)]) for part in table.split(64)]), low

    def low(self, rows: int) -> torch.Tensor:
        return self.table[:rows, self.inputs : self.inputs + self.ranks]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [17, 33, 64, 65, 100, 128, 129, 200, 256])
@pytest.mark.parametrize("name", SHAPES)
def test_its_bits_are_those_of_two_launches(name: str, rows: int, dtype: torch.dtype) -> None:
    of = Operands(*SHAPES[name], dtype)
    y, low = of.expected(rows)
    of.low(rows).fill_(float("nan"))
    wide = torch.full((rows, y.shape[1] + 8), 7.0, dtype=dtype, device="cuda")
    assert takes(rows, of.weight, of.a)
    got = adapted_matmul(of.table, rows, of.weight, of.a, wide[:, : y.shape[1]])
    assert torch.equal(got, y) and torch.equal(of.low(rows), low) and bool((wide[:, y.shape[1] :] == 7).all())
    assert not of.low(384)[rows:].any(), "rows behind stay"


@pytest.mark.parametrize(
    ("outputs", "inputs", "ranks"),
    [(3584, 18944, 16), (4608, 3584, 48), (5120, 13824, 128), (3072, 8192, 8)],
)
def test_other_models_have_the_same_bits(outputs: int, inputs: int, ranks: int) -> None:
    of = Operands(outputs, inputs, ranks)
    for rows in (24, 64, 96, 256):
        y, low = of.expected(rows)
        of.low(rows).fill_(float("nan"))
        assert takes(rows, of.weight, of.a), rows
        assert torch.equal(adapted_matmul(of.table, rows, of.weight, of.a), y) and torch.equal(of.low(rows), low)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [17, 50, 64])
@pytest.mark.parametrize("eighths", [None, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_of_codes_the_bits_are_the_same(name: str, eighths: int | None, rows: int, dtype: torch.dtype) -> None:
    """Of the columns that are read as codes the weight in 16 bits is not."""
    of = Operands(*SHAPES[name], dtype, MEMBERS[name], eighths)
    share = of.coded.eighths if of.coded else 0
    assert share == (eighths or {"down": 2, "o": 0, "qkv": 4}[name])
    y, low = of.expected(rows)
    of.low(rows).fill_(float("nan"))
    given = torch.full_like(of.weight, float("nan"))  # where codes are read, it is not
    for step in range(0, given.shape[1] // 128 + 1):
        if step * share // 8 == (step + 1) * share // 8 or step >= of.inputs // 128:
            given[:, step * 128 : step * 128 + 128] = of.weight[:, step * 128 : step * 128 + 128]
    got = adapted_matmul(of.table, rows, given, of.a, coded=of.coded)
    assert torch.equal(got, y) and torch.equal(of.low(rows), low)


@pytest.mark.parametrize("rows", [64, 128, 256])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_in_a_chain_and_a_graph_it_waits_for_what_it_reads(name: str, coded: bool, rows: int) -> None:
    """Norms of changing inputs, each product behind its norm: a graph of four steps, 25 times, every bit."""
    members = MEMBERS[name] if coded else ()
    of, other = (Operands(*SHAPES[name], members=members) for _ in range(2))
    x = torch.randn(rows, of.inputs, device="cuda").bfloat16()
    out, second = (torch.empty(rows, of.weight.shape[0], dtype=x.dtype, device="cuda") for _ in range(2))

    def step() -> None:
        with chained():
            for each, to in ((of, out), (other, second)):
                with before_a_start():
                    norm_forward(x, each.norm, 1e-5, each.table[:rows, : each.inputs])
                adapted_matmul(each.table, rows, each.weight, each.a, to, each.coded)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(4):
                step()
        for i in range(25):
            x.copy_(torch.randn(rows, of.inputs, device="cuda"))
            for each in (of, other):
                each.low(rows).fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            for each, to in ((of, out), (other, second)):
                each.table[:rows, : each.inputs] = norm_forward(x, each.norm, 1e-5)[0]
                y, low = each.expected(rows)
                assert torch.equal(each.low(rows), low) and torch.equal(to, y), i
    flags = low_blocks.workspace(x.device, stream.cuda_stream, low_blocks.whole_ranks(of.ranks))[1]
    assert not flags.any()
