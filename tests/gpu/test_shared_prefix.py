"""GRPO's loss in bfloat16 on a GPU: the prompt once or for each completion, both as close to float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pronghorn.grpo.batch import pack
from pronghorn.grpo.loss_step import LossStep, window_of
from pronghorn.grpo.metrics import Metrics
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.support import config, pronghorn_model

DEVICE = "cuda"
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def rollouts() -> list[Rollout]:
    """Two groups and a single, over several tiles of the attention kernels."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length, completions in ((150, (200, 31, 1, 170)), (260, (64, 129, 90)), (40, (77,))):
        prompt = torch.randint(6, 384, (length,), generator=generator).tolist()
        for n in completions:
            ids = torch.randint(6, 384, (n,), generator=generator).tolist()
            made.append(Rollout(prompt, ids, [-6.0] * n, advantage=float(torch.randn((), generator=generator))))
    return made


def gradients(model: Any, folder: Path, shared: bool) -> dict[str, torch.Tensor]:
    step, made = LossStep(config(folder), model), rollouts()
    model.zero_grad()
    step(pack(made, DEVICE, step.dtype, shared), window_of(made), Metrics()).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def test_both_layouts_are_as_close_to_float32(tmp_path: Path) -> None:
    model, exact = (pronghorn_model(dtype, **SIZES).train() for dtype in (torch.bfloat16, torch.float32))
    exact.load_state_dict(model.state_dict())
    rotary, precise = (m.get_base_model().model.rotary_emb for m in (model, exact))
    rotary.inv_freq = precise.inv_freq.clone()  # .to(bfloat16) rounded the angles too
    model, exact = model.to(DEVICE), exact.to(DEVICE)
    truth = gradients(exact, tmp_path, shared=False)
    again = gradients(exact, tmp_path, shared=True)
    shared, plain = (gradients(model, tmp_path, which) for which in (True, False))
    assert len(truth) == 28
    errors = []
    for name, wanted in truth.items():
        assert (again[name] - wanted).norm() <= 1e-5 * wanted.norm(), name
        errors.append([((got[name] - wanted).norm() / wanted.norm()).item() for got in (shared, plain)])
    ours, theirs = torch.tensor(errors).mean(0).tolist()
    assert ours < 0.05 and ours <= 1.2 * theirs, (ours, theirs)


def test_nothing_waits_between_forward_and_backward(tmp_path: Path) -> None:
    model = pronghorn_model(torch.bfloat16, **SIZES).train().to(DEVICE)
    step, made = LossStep(config(tmp_path), model), rollouts()
    metrics = Metrics()
    for mode in ("default", "error"):  # the first compiles
        batch = pack(made, DEVICE, step.dtype)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            step(batch, window_of(made), metrics).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert metrics.flush()["entropy"] is not None
