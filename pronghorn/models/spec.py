"""What Pronghorn has to know of a model family, in one frozen record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .attention import Attention
from .parts import Parts

RopeTE = tuple[torch.Tensor, torch.Tensor]
"""Rotary cos and sin, each ``[T, E]`` in the compute dtype."""

Block = Callable[[Any, torch.Tensor, RopeTE, Attention], torch.Tensor]
"""``block(layer, hidden_TD, rope_TE, attention) -> hidden_TD``: one decoder layer over packed tokens."""


@dataclass(frozen=True)
class ModelSpec:
    """One model family.

    Attributes:
        family: the name that messages use.
        model_types: values of ``config.model_type`` that it serves.
        architectures: transformers' classes that it serves.
        classifiers: those that score sequences with the same layers (``num_labels=``).
        projections: names of the linear layers inside a decoder layer: what NF4 replaces and LoRA may target.
        block: the decoder layer as a function of packed tokens.
        read_parts: a decoder layer's pieces for the fused path, or in words why its own sub-modules have to be called.
        logit_scale: multiplies the logits (1 where a family has none).
        logit_softcap: bounds the scaled logits by ``softcap * tanh(logit / softcap)`` (None where a family has none).
    """

    family: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    projections: tuple[str, ...]
    block: Block = field(repr=False)
    read_parts: Callable[[Any], Parts | str] = field(repr=False)
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    classifiers: tuple[str, ...] = ()

    def is_projection(self, module_name: str) -> bool:
        """Whether the dotted ``module_name`` of the ForCausalLM is a projection inside a decoder layer."""
        return ".layers." in f".{module_name}" and module_name.rpartition(".")[2] in self.projections
