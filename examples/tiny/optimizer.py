"""AdamW on float32 masters of a 16-bit model: a step smaller than half a bf16 ulp is kept, not lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose float32 masters are rounded into the model's parameters after each step.

    Parameters that are float32 already are their own masters. Decays matrices only, as is usual.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, weight_decay: float = 0.1) -> None:
        self.live: list[torch.Tensor] = [p for p in parameters if p.requires_grad]
        self.masters: list[torch.Tensor] = [
            p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.live
        ]
        groups: list[dict[str, Any]] = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        super().__init__(groups, lr=lr, betas=(0.9, 0.98), eps=1e-9)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for live, master in zip(self.live, self.masters):
            if live is not master:
                master.grad = None if live.grad is None else live.grad.float()
        loss = super().step(closure)
        torch._foreach_copy_(self.live, self.masters)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for live in self.live:
            live.grad = None
        super().zero_grad(set_to_none)
