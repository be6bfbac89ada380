"""The one-launch AdamW against bitsandbytes' own classes: steps, groups, overrides, state, checkpoints, the Trainer.

bitsandbytes' CPU quantizer is coarse, so its classes run here with its plain PyTorch update, in the order of its CUDA
kernel (decay after the update). The kernel itself is replaced by its reference, as everywhere on the CPU.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn

import pronghorn
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.kernels.reference import adamw8bit as reference
from pronghorn.optim import AdamW, AdamW8bit, PagedAdamW8bit, members
from tests.grpo import support

SHAPES = [(32, 256), (100, 77), (5000,), (60, 60), (16,)]  # the last two are below min_8bit_size


def _bitsandbytes_update(
    name: str, g: Any, p: Any, s1: Any, s2: Any, beta1: float, beta2: float, beta3: float, alpha: float, eps: float,
    step: int, lr: float, q1: Any, q2: Any, a1: Any, a2: Any, weight_decay: float = 0.0, **options: Any,
) -> None:  # fmt: skip
    with torch.compiler.set_stance("force_eager"):
        optimizer_update_8bit_blockwise_pytorch(
            p, g, s1, s2, beta1, beta2, beta3, alpha, eps, step, lr, q1, q2, a1, a2, 0.0, 1.0, False,
            optimizer_name=name,
        )  # fmt: skip
    p.data.mul_(1 - lr * weight_decay)


@pytest.fixture(autouse=True)
def manager(monkeypatch: pytest.MonkeyPatch) -> GlobalOptimManager:
    """bitsandbytes' manager of overrides, fresh."""
    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    return GlobalOptimManager.get_instance()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let tensors of the CPU pass for a GPU's; gives the number of tensors in each launch so far."""
    monkeypatch.setattr(members, "on_gpu", lambda param: True)
    monkeypatch.setattr(bnb.functional, "optimizer_update_8bit_blockwise", _bitsandbytes_update)
    counts: list[int] = []
    step = reference.Table.step

    def counted(self: reference.Table, gradients: Any, which: Any, rules: Any) -> None:
        counts.append(sum(gradient is not None for gradient in gradients))
        step(self, gradients, which, rules)

    monkeypatch.setattr(reference.Table, "step", counted)
    return counts


def _params(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in SHAPES]


def _groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": params[:2], "lr": 2e-3, "betas": (0.875, 0.96875), "weight_decay": 0.25},
        {"params": params[2:], "weight_decay": 0.0},
    ]


def _make(cls: type, params: list[nn.Parameter]) -> Any:
    return cls(_groups(params), lr=1e-3, betas=(0.875, 0.984375))


def _step(optimizer: Any, params: list[nn.Parameter], number: int, skip: int | None = None) -> None:
    """Step number ``number`` on gradients that depend on it alone; the tensor ``skip`` has none."""
    generator = torch.Generator().manual_seed(1000 + number)
    for i, param in enumerate(params):
        noise = torch.randn(param.shape, generator=generator), torch.randn(param.shape, generator=generator)
        param.grad = None if i == skip else noise[0] * torch.exp(noise[1]) * 1e-3
    optimizer.step()


def _assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> None:
    for got, exact in zip(ours, theirs):
        # A negative moment below the smallest level is kept as that level, 5.5e-7 of its block's largest, not as 0.
        torch.testing.assert_close(got, exact, rtol=2e-6, atol=1e-7)


PAIRS = [(AdamW8bit, bnb.optim.AdamW8bit), (PagedAdamW8bit, bnb.optim.PagedAdamW8bit)]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("cls", "peer"), PAIRS)
def test_steps_as_bitsandbytes(
    cls: type, peer: type, launches: list[int], manager: GlobalOptimManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups, a schedule, an override, small tensors, a tensor without a gradient: one launch a step."""
    ours, theirs = _params(), _params()
    optimizers = [_make(cls, ours), _make(peer, theirs)]
    for param in (ours[2], theirs[2]):
        manager.override_config(param, "lr", 5e-3)
    for number in range(1, 6):
        for optimizer, params in zip(optimizers, (ours, theirs)):
            optimizer.param_groups[0]["lr"] = 2e-3 / number
            _step(optimizer, params, number, skip=1 if number == 3 else None)
        _assert_same(ours, theirs)
    assert launches == [3, 3, 2, 3, 3]
    state = optimizers[0].state
    assert [state[p]["step"] for p in ours] == [5, 4, 5, 5, 5]
    assert [state[p]["state1"].dtype for p in ours] == [torch.uint8] * 3 + [torch.float32] * 2


def test_on_the_cpu_it_is_bitsandbytes() -> None:
    ours, theirs = _params(), _params()
    optimizers = [_make(AdamW8bit, ours), _make(bnb.optim.AdamW8bit, theirs)]
    for number in range(1, 4):
        for optimizer, params in zip(optimizers, (ours, theirs)):
            _step(optimizer, params, number)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def _saved(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _same_tree(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same_tree(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same_tree(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize(("first", "second"), [PAIRS[0], PAIRS[0][::-1]], ids=["to bitsandbytes", "from bitsandbytes"])
def test_checkpoints_go_over(first: type, second: type, launches: list[int]) -> None:
    """What one class saved the other loads, keeps bit for bit, and steps on from."""
    params = _params()
    optimizer = _make(first, params)
    for number in range(1, 4):
        _step(optimizer, params, number)
    other_params = [nn.Parameter(p.detach().clone()) for p in params]
    other = _make(second, other_params)
    other.load_state_dict(_saved(optimizer))
    assert _same_tree(_saved(other), _saved(optimizer))
    for number in range(4, 7):
        _step(optimizer, params, number)
        _step(other, other_params, number)
        _assert_same(params, other_params)


def test_resumed_is_uninterrupted(launches: list[int]) -> None:
    params = _params()
    optimizer = _make(AdamW8bit, params)
    for number in range(1, 4):
        _step(optimizer, params, number)
    again = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = _make(AdamW8bit, again)
    _step(resumed, again, 99)  # it has tables of its own before it loads
    for mine, theirs in zip(again, params):
        mine.data.copy_(theirs.data)
    resumed.load_state_dict(_saved(optimizer))
    for number in range(4, 7):
        _step(optimizer, params, number)
        _step(resumed, again, number)
    assert all(torch.equal(a, b) for a, b in zip(params, again))
    assert _same_tree(_saved(optimizer), _saved(resumed))
    maps = {id(state["qmap1"]) for state in resumed.state.values() if "qmap1" in state}
    assert len(maps) == 1  # the loaded copies of the map gave way to one


def _skip_zeros(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.args.skip_zeros = True


def _max_unorm(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.args.max_unorm = 1.0


def _other_map(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.name2qmap["dynamic"] = torch.linspace(-1, 1, 256)
    _step(optimizer, params, 0)
    optimizer.name2qmap["dynamic"] = bnb.functional.create_dynamic_map(True)
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("setting", [_max_unorm, _skip_zeros, _other_map])
def test_what_the_kernel_does_not_know_is_left_to_bitsandbytes(
    setting: Callable[[Any, list[nn.Parameter]], None], launches: list[int]
) -> None:
    ours, theirs = _params(), _params()
    optimizers = [_make(AdamW8bit, ours), _make(bnb.optim.AdamW8bit, theirs)]
    for optimizer, params in zip(optimizers, (ours, theirs)):
        setting(optimizer, params)
    del launches[:]
    for number in range(1, 3):
        for optimizer, params in zip(optimizers, (ours, theirs)):
            _step(optimizer, params, number)
    assert launches == []
    _assert_same(ours, theirs)


def test_parameters_that_move_and_gradients_that_lie_otherwise(launches: list[int]) -> None:
    """Tables follow a parameter's new memory and new parameters; a strided gradient is stepped by bitsandbytes."""
    ours, theirs = _params(), _params()
    optimizers = [_make(AdamW8bit, ours), _make(bnb.optim.AdamW8bit, theirs)]
    _step(optimizers[0], ours, 1)
    _step(optimizers[1], theirs, 1)
    ours[0].data = ours[0].data.clone()
    more = [nn.Parameter(torch.ones(64, 128)) for _ in range(2)]
    for optimizer, params, new in zip(optimizers, (ours, theirs), more):
        optimizer.add_param_group({"params": [new]})
        for param in (*params, new):
            param.grad = torch.full_like(param, 1e-3)
        params[1].grad = torch.full((77, 100), 1e-3).T
        optimizer.step()
    assert launches == [3, 3]
    _assert_same([*ours, more[0]], [*theirs, more[1]])


def test_closure_gives_the_loss(launches: list[int]) -> None:
    param = nn.Parameter(torch.ones(64, 128))
    optimizer = AdamW8bit([param], lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (param**2).mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and launches == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "paged"), [("paged_adamw_8bit", True), ("adamw_8bit", False), ("adamw_bnb_8bit", False)]
)
def test_the_trainer_takes_ours(name: str, paged: bool, tmp_path: Path) -> None:
    """In place of bitsandbytes' 8-bit AdamW, embeddings still registered for a 32-bit state; nothing else changes."""
    made = support.trainer(tmp_path)
    made.args.optim = name
    made.model.get_input_embeddings().weight.requires_grad_(True)
    optimizer = made.create_optimizer()
    assert type(optimizer) is AdamW and isinstance(optimizer, bnb.optim.AdamW) and optimizer.is_paged is paged
    assert optimizer.args.optim_bits == 8
    overrides = GlobalOptimManager.get_instance().module_weight_config_triple
    assert [config for module, _, config in overrides if module is made.model.get_input_embeddings()] == [
        {"optim_bits": 32}
    ]
    for other in ("adamw_torch", "paged_adamw_32bit", "lion_8bit"):
        made.args.optim = other
        theirs = super(GRPOTrainer, made).get_optimizer_cls_and_kwargs(made.args, made.model)
        assert made.get_optimizer_cls_and_kwargs(made.args, made.model) == theirs


def test_public_name() -> None:
    assert pronghorn.optim.PagedAdamW8bit is PagedAdamW8bit and "optim" in dir(pronghorn)
