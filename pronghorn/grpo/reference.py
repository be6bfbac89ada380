"""The reference policy of the KL term: the base model under a fresh adapter, or a frozen copy of what trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from ..config.errors import ConfigError
from ..lora.active import adapter, adapter_names, live_names, wrappers

FILE = "reference.safetensors"


def is_fresh(model: nn.Module) -> bool:
    """Whether the live adapter adds nothing yet, so that the base model under it is the policy itself."""
    names = live_names(model)
    if any(model.peft_config[name].bias != "none" for name in names):  # type: ignore[union-attr,index]
        return False
    for wrapper in wrappers(model):
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and not _copies_its_original(wrapper, names):
            return False
    outer = ("lora_B", "lora_embedding_B")
    return not any(p.any() for name, p in model.named_parameters() if p.requires_grad and any(b in name for b in outer))


def _copies_its_original(wrapper: Any, names: list[str]) -> bool:
    own = [wrapper.modules_to_save[name] for name in names if name in getattr(wrapper, "modules_to_save", {})]
    pairs = [pair for module in own for pair in zip(module.parameters(), wrapper.original_module.parameters())]
    return all(torch.equal(p.to(q.dtype), q) for p, q in pairs)


class Reference:
    """What the policy is held to by beta (GRPO, arXiv:2402.03300, eq. 3): itself as the trainer got it (TRL's rule), or
    that moved along by syncs.

    Under a fresh adapter that is the base model, at no cost. Where an adapter already adds something, where all weights
    train, and with ``sync_ref_model``, it is a frozen copy of the trained weights: for LoRA a second copy of the
    adapter (4 bytes a parameter: 336 MB at rank 32 on all seven projections of an 8B Llama), for full fine-tuning one
    of the model. Held where the weights are, and written to every checkpoint.

    Args:
        model: the policy, before training.
        moves: whether it will be synced.
    """

    def __init__(self, model: nn.Module, moves: bool = False) -> None:
        self.model, self.moves = model, moves
        self._copies: dict[str, torch.Tensor] | None = None
        if moves or not adapter_names(model) or not is_fresh(model):
            self._copies = {name: p.detach().clone() for name, p in self._trained().items()}
        else:
            with adapter(model, None):  # what cannot be disabled raises now
                pass

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def nbytes(self) -> int:
        """Memory of the frozen copy, 0 without one."""
        return sum(copy.nbytes for copy in (self._copies or {}).values())

    def __str__(self) -> str:
        if self._copies is None:
            return "the reference policy is the base model under the adapter"
        return f"the reference policy is a frozen copy of the trained weights: {self.nbytes / 1e6:,.1f} MB"

    @contextmanager
    def acting(self) -> Iterator[None]:
        """The model is the reference policy inside; after, it is the trained one again, to the last bit.

        The copy and the weights change contents, in place: whatever reads the parameters (rounded adapters, optimizers)
        keeps reading the same memory. Only for use without gradients.
        """
        if self._copies is None:
            with adapter(self.model, None):
                yield
            return
        exchanged: list[tuple[nn.Parameter, torch.Tensor]] = []
        trained = self._trained()
        try:
            for name, copy in self._copies.items():
                _exchange(trained[name], copy)
                exchanged.append((trained[name], copy))
            yield
        finally:
            for parameter, copy in exchanged:
                _exchange(parameter, copy)

    @torch.no_grad()
    def sync(self, alpha: float) -> None:
        """Move the reference towards the policy: ``alpha * policy + (1 - alpha) * reference`` (TR-DPO, Gorbatovski et
        al. 2024, arXiv:2404.09656, eq. 4 and 5), tensor by tensor, so for LoRA on A and B each."""
        trained = self._trained()
        for name, copy in (self._copies or {}).items():
            copy.mul_(1.0 - alpha).add_(trained[name], alpha=alpha)

    def save(self, folder: str | Path) -> None:
        """Write the copy into a checkpoint; nothing for the base model."""
        if self._copies is not None:
            save_file({name: copy.cpu().contiguous() for name, copy in self._copies.items()}, Path(folder) / FILE)

    def load(self, folder: str | Path) -> None:
        """Take the reference of the run that wrote the checkpoint ``folder``.

        Raises:
            ConfigError: it had none where this run needs a copy, or one of other weights.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            if self.moves or not adapter_names(self.model):
                raise ConfigError(
                    f"{folder} has no {FILE}, the reference policy of beta and sync_ref_model; it was written by a run "
                    "without them: set them as that run had them, or start anew"
                )
            self._copies = None  # that run started from a fresh adapter
            return
        found, trained = load_file(str(path)), self._trained()
        wrong = [name for name in found.keys() | trained.keys() if not _fits(found.get(name), trained.get(name))]
        if wrong:
            raise ConfigError(
                f"{path} does not fit what trains here ({len(wrong)} tensors, {sorted(wrong)[0]!r} among them); use "
                "the model and LoRA settings of the run that wrote it"
            )
        self._copies = {name: tensor.to(trained[name].device, trained[name].dtype) for name, tensor in found.items()}


def _fits(found: torch.Tensor | None, trained: torch.Tensor | None) -> bool:
    return found is not None and trained is not None and found.shape == trained.shape


@torch.no_grad()
def _exchange(a: torch.Tensor, b: torch.Tensor) -> None:
    kept = a.detach().clone()
    a.copy_(b)
    b.copy_(kept)


class SyncReference(TrainerCallback):
    """Syncs the reference after every ``ref_model_sync_steps`` optimizer steps, as TRL's callback does (TR-DPO,
    arXiv:2404.09656)."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.sync(args.ref_model_mixup_alpha)
