"""bitsandbytes' AdamW classes with a ``step`` that launches once for all tensors instead of once for each.

Same arguments, same mathematics, same state and checkpoints, which go over to bitsandbytes' classes and back. What
changes is the host's time a step: bitsandbytes launches a kernel and synchronizes for each of the hundreds of tensors
that LoRA trains. Tensors that the one kernel does not take are stepped by bitsandbytes: on the CPU, small ones (their
state is in 32 bits), other maps, ``max_unorm`` and ``skip_zeros``.

The module has bitsandbytes' name because transformers' Trainer knows bitsandbytes' classes by it: it then registers
embeddings for a 32-bit state, as it does with theirs.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from bitsandbytes.optim.optimizer import Optimizer2State

from .one_launch import OneLaunch


class AdamW(OneLaunch, bnb.optim.AdamW):
    """``bitsandbytes.optim.AdamW``; with ``optim_bits=8`` its tensors step in one launch."""


class AdamW8bit(OneLaunch, bnb.optim.AdamW8bit):
    """``bitsandbytes.optim.AdamW8bit``, stepped in one launch."""


class PagedAdamW8bit(OneLaunch, bnb.optim.PagedAdamW8bit):
    """``bitsandbytes.optim.PagedAdamW8bit``, stepped in one launch.

    Its moments are managed memory, which the driver moves to the host when the GPU runs full.
    """


_OURS: dict[type[Optimizer2State], type[OneLaunch]] = {
    bnb.optim.AdamW: AdamW,
    bnb.optim.AdamW8bit: AdamW8bit,
    bnb.optim.PagedAdamW8bit: PagedAdamW8bit,
}


def one_launch_class(optimizer_cls: Any, kwargs: dict[str, Any]) -> Any:
    """Our class for bitsandbytes' 8-bit AdamW; any other class, and bitsandbytes' own with other bits, as it is.

    Args:
        optimizer_cls, kwargs: what ``Trainer.get_optimizer_cls_and_kwargs`` gave.
    """
    if optimizer_cls is bnb.optim.AdamW and kwargs.get("optim_bits") != 8:
        return optimizer_cls
    return _OURS.get(optimizer_cls, optimizer_cls) if isinstance(optimizer_cls, type) else optimizer_cls
