"""The key under which a compiled kernel is called again tells apart whatever Triton compiles apart."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pronghorn.kernels
from pronghorn.kernels.launch import (
    Launcher,
    TensorLike,
    _chained,
    before_a_start,
    chain_of,
    chained,
    current_recording,
    not_recorded,
    recording,
)

KERNELS = Path(pronghorn.kernels.__file__).parent


class Compiled:
    packed_metadata = ()

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.calls.append((grid, args))


class OnGPU(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


class Kernel:
    """As a ``@triton.jit`` function: parameters, and a call that gives the compiled kernel back."""

    def __init__(self) -> None:
        self.params = [SimpleNamespace(is_constexpr=c) for c in (False, False, False, True)]
        self.bound, self.calls = 0, list[Any]()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, **options: Any) -> Compiled:
            self.bound += 1
            return Compiled(self.calls)

        return call


def test_one_binding_for_each_specialization() -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    x = torch.empty(64)
    same = [(x, 32, 0.5, 7), (torch.empty(64), 64, 0.25, 7)]
    for args in same:
        launch((4,), *args, num_warps=4)
    assert kernel.bound == 1
    assert kernel.calls == [((4, 1, 1), (same[1][0].data_ptr(), *same[1][1:]))]
    others = [
        (x[1:], 32, 0.5, 7),  # not aligned to 16 bytes
        (x.double(), 32, 0.5, 7),
        (x.as_subclass(OnGPU), 32, 0.5, 7),
        (x, 33, 0.5, 7),  # not divisible by 16
        (x, 1, 0.5, 7),
        (x, 1 << 33, 0.5, 7),  # 64 bits
        (x, 32, 1, 7),  # an integer where a float was
        (x, 32, 0.5, 8),  # another constant
    ]
    for number, other in enumerate(others, start=2):
        launch((4,), *other, num_warps=4)
        assert kernel.bound == number, other
    launch((4,), *same[0], num_warps=8)
    assert kernel.bound == len(others) + 2


def test_recorded_launches_are_not_made_and_each_specialization_is_noted_once() -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    x = torch.empty(64)
    with recording() as recorded:
        launch((4,), x, 32, 0.5, 7, num_warps=4)
        launch((9,), torch.empty(8), 64, 0.25, 7, num_warps=4)  # the same to the compiler
        launch((4,), x[1:], 32, 0.5, 7, num_warps=4)
        launch((4,), x, 32, 0.5, 7, num_warps=8)
        with pytest.raises(RuntimeError, match="recorded already"), recording():
            pass
    assert kernel.bound == 0 and kernel.calls == []
    first, second, third = recorded.launches
    assert first.args == (TensorLike(torch.float32, x.data_ptr()), 32, 0.5, 7) and first.options == {"num_warps": 4}
    assert second.args[0].data_ptr() == x.data_ptr() + 4
    assert third.options == {"num_warps": 8}
    launch((4,), x, 32, 0.5, 7, num_warps=4)
    assert kernel.bound == 1


def test_recorded_sources_are_noted_once() -> None:
    with recording() as recorded:
        found = current_recording()
        assert found is recorded
        for rank in (1, 2, 1):
            found.source("text", {"RANK": rank}, (9, 0))
    assert current_recording() is None
    assert [source.defines for source in recorded.sources] == [{"RANK": 1}, {"RANK": 2}]
    assert recorded.before == [0, 0]


def test_a_bound_launch_goes_straight_to_the_kernel_while_its_tensors_are_aligned() -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    x = torch.empty(64)
    bound = launch.bind((4,), [None, 32, 0.5, 7], (0,), num_warps=4)
    with recording() as recorded:
        bound(x)
    assert len(recorded.launches) == 1 and kernel.bound == 0 and kernel.calls == []
    bound(x)
    assert kernel.bound == 1 and kernel.calls == []  # compiled, and launched by that call
    other = torch.empty(64)
    bound(other)
    assert kernel.bound == 1 and kernel.calls == [((4, 1, 1), (other.data_ptr(), 32, 0.5, 7))]
    bound(x[1:])  # another specialization
    assert kernel.bound == 2 and len(kernel.calls) == 1
    bound(x)
    assert kernel.bound == 2 and kernel.calls[-1] == ((4, 1, 1), (x.data_ptr(), 32, 0.5, 7))
    with recording() as recorded:
        bound(x)
    assert len(recorded.launches) == 1 and len(kernel.calls) == 2


def test_kernels_of_a_chain_are_told_to_wait_where_they_begin_early(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(), torch.empty(64)
    launch = Launcher(kernel, chains=True)
    plain = ((x, 32, 0.5), {"num_warps": 4})
    with recording() as recorded, chained():
        launch((4,), *plain[0], **plain[1])  # on the CPU nothing begins early
    monkeypatch.setattr("pronghorn.kernels.launch._can_chain", lambda index: True)
    with recording() as on_hopper:
        launch((4,), *plain[0], **plain[1])
        with chained():
            launch((4,), *plain[0], **plain[1])
            seen: list[bool] = []
            thread = threading.Thread(target=lambda: seen.append(_chained.get()))
            thread.start()
            thread.join()
    assert seen == [False]  # a trainer beside a rollout has launches of its own
    assert [made.args[3] for made in recorded.launches] == [False]
    assert [(made.args[3], made.options.get("launch_pdl")) for made in on_hopper.launches] == [
        (False, None),
        (True, True),
    ]


def test_a_kernel_before_a_products_start_lets_it_begin_at_once_if_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(64)
    launches = [Launcher(Kernel(), chains=True), Launcher(Kernel(), chains=True, hurries=True)]

    def made() -> list[int]:
        with recording() as recorded:
            for launch in launches:
                launch((4,), x, 32, 0.5, num_warps=4)
        return [launch.args[3] for launch in recorded.launches]

    with chained(), before_a_start():
        assert made() == [0, 0] and chain_of(x) == 0  # on the CPU
    monkeypatch.setattr("pronghorn.kernels.launch._can_chain", lambda index: True)
    with before_a_start():
        assert made() == [0, 0] and chain_of(x) == 0
        with chained():
            assert made() == [1, 2] and chain_of(x) == 2
            with before_a_start(False):
                assert made() == [1, 1] and chain_of(x) == 1


def test_a_rollouts_launches_are_made_while_another_thread_records() -> None:
    kernel = Kernel()
    launch, x = Launcher(kernel), torch.empty(64)

    def draw() -> None:
        with not_recorded():
            launch((4,), x, 32, 0.5, 7, num_warps=4)
            assert current_recording() is None

    with recording() as recorded:
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        assert kernel.bound == 1 and recorded.launches == []
        launch((4,), x, 32, 0.5, 7, num_warps=4)
    assert kernel.bound == 1 and len(recorded.launches) == 1


EARLY = {"rms_norm": {"weight_ptr", "residual_ptr"}, "low_rank": {"a_ptr"}}
"""What kernels of a chain read before they wait: it was whole two kernels before."""

HURRY = "if CHAIN == 2:\n    gdc_launch_dependents()"


def test_every_kernel_of_a_chain_waits_before_it_writes() -> None:
    """And before it reads what the kernel before it writes, or lets the next begin, which may read what was whole two
    kernels before it: but where that is told to be a product, which reads nothing of the chain before it has waited.
    """
    pytest.importorskip("triton")
    modules = [importlib.import_module(f"pronghorn.kernels.{path.stem}") for path in KERNELS.glob("*_triton.py")]
    members = [member for module in modules for member in vars(module).values()]
    chained_kernels = [m.kernel.fn for m in members if isinstance(m, Launcher) and m.chains]
    assert len(chained_kernels) >= 6  # norm, GLU, rotation, attention, its merge, x A^T
    for kernel in chained_kernels:
        (function,) = ast.parse(inspect.getsource(kernel)).body
        assert isinstance(function, ast.FunctionDef)
        body = function.body[0 if ast.get_docstring(function) is None else 1 :]
        if ast.unparse(body[0]) == HURRY:
            body.pop(0)
        (at,) = [i for i, node in enumerate(body) if "gdc_wait()" in ast.unparse(node)]
        wait = body[at]
        assert isinstance(wait, ast.If) and ast.unparse(wait.test) == "CHAIN", kernel
        before = ast.unparse(ast.Module([*body[:at], *wait.body], [])).split("gdc_wait()")[0]
        assert not re.search(r"store|atomic|gdc_launch", before), kernel
        part = kernel.__module__.rsplit(".", 1)[1].removesuffix("_triton")
        assert set(re.findall(r"(?:load|fetch)\((\w+)", before)) == EARLY.get(part, set()), kernel
