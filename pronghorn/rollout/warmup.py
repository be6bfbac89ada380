"""Compiling what a model will launch as soon as it is known: when adapters are added, or a first rollout begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..kernels.launch import recording
from ..kernels.warm import Warming, warm
from ..models.dry_run import training_step
from ..models.packed_layer import prepared
from ..models.state import state_of
from ..models.tree import decoder

Walk = Callable[[nn.Module], None]


def warm_up(model: Any) -> Warming | None:
    """Begin to compile the kernels of a training step, and of rollouts where there is a native engine, if the model was
    loaded with ``compile_ahead=True``.

    On a GPU in 16 bits only: the CPU has no kernels to compile. One line says how long it took, unless they were in the
    cache. A step that begins earlier waits for the kernels that it needs and no longer.
    """
    step: dict[str, Walk] = {"a training step": training_step}
    if state_of(model).engine is None:
        return compile_ahead(model, step)
    from .native.dry_run import WALKS

    (first, few), *rest = WALKS.items()  # a run begins with few rows, and trains before it has many
    return compile_ahead(model, {first: few, **step, **dict(rest)})


def begun(model: Any, walks: dict[str, Walk]) -> dict[str, Walk]:
    """Those of ``walks`` that nobody has begun for ``model`` under the adapters that it has; they are from now on."""
    seen = state_of(model).warmed
    adapters = tuple(sorted(getattr(model, "peft_config", ())))  # what is launched depends on whether there are any
    new = {name: walk for name, walk in walks.items() if (name, adapters) not in seen}
    seen.update((name, adapters) for name in new)
    return new


def compile_ahead(model: Any, walks: dict[str, Walk]) -> Warming | None:
    """Record ``walks`` over ``model`` and compile what they would launch, each by its name once; None where not begun.

    The walks' own work (torch's operations on one layer) takes a moment and leaves no memory taken.
    """
    state = state_of(model)
    device = decoder(model).embed_tokens.weight.device
    if not state.compile_ahead or device.type != "cuda" or state.compute_dtype not in (torch.bfloat16, torch.float16):
        return None
    new = begun(model, walks)
    if not new:
        return None
    what = " and ".join(new)
    try:
        with torch.cuda.device(device), recording() as recorded, prepared(model):
            for walk in new.values():
                walk(model)
    except Exception as error:  # noqa: BLE001 - a walk only for the compiler's sake must not stop a run; it is said
        print(
            f"Pronghorn: the kernels of {what} are compiled one by one at their first launch, because walking through "
            f"them raised {type(error).__name__}: {error}",
            flush=True,
        )
        return None
    finally:
        torch.cuda.empty_cache()
    return warm(recorded, device, what)
