"""The policy as it was at one moment, for a generation that is drawn while training goes on.

Training flips modes, rounds adapters into one buffer for every walk, and the optimizer writes the masters in place. A
:class:`Snapshot` shares none of it: it rounds the masters into memory of its own, and walks the layers' pieces without
calling a module of them. What does not train (base weights, embedding, norms, head) is read where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...config.errors import ConfigError
from ...lora.projection import hooked
from ...lora.rounded import Rounded
from ...models.attention import Attention
from ...models.forward import logits
from ...models.fused_block import layer_forward
from ...models.modes import inference
from ...models.modules import norm
from ...models.parts import Groups, Parts
from ...models.registry import spec_for
from ...models.tree import layers, unwrap
from .decode_walk import why_no_walk


class Snapshot:
    """The layers of a model with the adapters of one moment: 2 bytes a LoRA parameter in 16 bits.

    Made and refreshed on the trainer's own thread, between optimizer steps; read from any.

    Args:
        model: a Pronghorn model under LoRA.

    Raises:
        ConfigError: the model cannot be walked so, in words (:func:`why_no_snapshot`).
    """

    def __init__(self, model: nn.Module) -> None:
        found = _read(model)
        if isinstance(found, str):
            raise ConfigError(
                f"generations drawn beside training (rollout_overlap=True) cannot serve {found}; set "
                "rollout_overlap=False"
            )
        self.base = unwrap(model)
        self.dtype = self.base.model.embed_tokens.weight.dtype
        self._key = _key(found)
        self._rounded = Rounded([members for parts in found for members in parts.members], self.dtype)
        groups = self._rounded.groups
        self.found = [(parts, Groups(*groups[4 * i : 4 * i + 4])) for i, parts in enumerate(found)]

    def serves(self, model: nn.Module) -> bool:
        """Whether ``model`` is still made of what this was made of; its masters may have moved."""
        found = _read(model)
        same = unwrap(model) is self.base and self.base.model.embed_tokens.weight.dtype == self.dtype
        return same and not isinstance(found, str) and _key(found) == self._key

    def refresh(self) -> None:
        """Round the masters as they stand now, into the same memory: the groups stay the same objects."""
        self._rounded.refresh()

    def copies(self) -> list[torch.Tensor]:
        """The rounded masters on the host, for :meth:`load`."""
        return self._rounded.copies()

    def load(self, copies: Sequence[torch.Tensor]) -> None:
        """Be the policy that :meth:`copies` was taken of, until the next :meth:`refresh`.

        Raises:
            ConfigError: it was of another model or other adapters.
        """
        given, own = [tuple(c.shape) for c in copies], [tuple(p.shape) for p in self._rounded.pieces]
        if given != own:
            raise ConfigError(
                f"a generation is to be drawn by {len(given)} LoRA matrices that do not fit the {len(own)} of this "
                "model; resume with the model and the LoRA settings of the run that began it"
            )
        self._rounded.load(copies)

    @torch.no_grad()
    def hidden_states(self, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: Attention) -> torch.Tensor:
        """As :func:`pronghorn.models.forward.hidden_states`, to the last bit, under the snapshot's policy."""
        stack = self.base.model
        hidden_TD = F.embedding(input_ids_T, stack.embed_tokens.weight)
        cos_1TE, sin_1TE = stack.rotary_emb(hidden_TD, position_ids=positions_T.unsqueeze(0))
        rope_TE = (cos_1TE[0], sin_1TE[0])
        for parts, groups in self.found:
            hidden_TD = layer_forward(parts, groups, hidden_TD, rope_TE, attention)
        return norm(stack.norm, hidden_TD)

    @torch.no_grad()
    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """As :func:`pronghorn.models.forward.logits`; the head does not train."""
        return logits(self.base, hidden_ND)


def why_no_snapshot(model: nn.Module) -> str:
    """In words, what of ``model`` a :class:`Snapshot` cannot serve; empty where it can."""
    found = _read(model)
    return found if isinstance(found, str) else ""


def _read(model: nn.Module) -> list[Parts] | str:
    """Every layer's pieces, or what is in the way: anything that trains beside LoRA's A and B, or has to be called."""
    stack, found = unwrap(model).model, []
    layer: Any
    with inference(model):  # rollouts have no dropout, whatever mode the model is in
        for layer in layers(model):
            if hooked(layer):
                return f"a hook on {type(layer).__name__}"
            parts = spec_for(layer.self_attn.config).read_parts(layer)
            if isinstance(parts, str):
                return parts
            found.append(parts)
    reason = why_no_walk(model)
    if reason or hooked(stack.rotary_emb):
        return reason or f"a hook on {type(stack.rotary_emb).__name__}"
    masters = {id(t) for parts in found for t in parts.trainables() if t is not None}
    other = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in masters]
    if other:
        return f"{other[0]} ({len(other)} such), which trains and is no LoRA matrix of a layer's projection"
    return found


def _key(found: list[Parts]) -> list[Any]:
    return [parts.key for parts in found]
