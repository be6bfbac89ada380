"""A model's sizes, as far as memory and time depend on them, from a transformers config and the settings of LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...config.errors import ConfigError, nearest
from ...kernels.nf4_code import NESTED_BLOCKSIZE, NF4_BLOCKSIZE
from ...lora.projection import row_columns

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

GROUPS = ((0, 1, 2), (3,), (4, 5), (6,))
"""Which of :data:`PROJECTIONS` read one input."""

OPTIMIZER_BYTES = {
    "paged_adamw_8bit": 0.0, "paged_adamw_32bit": 0.0, "paged_adamw": 0.0, "paged_lion_8bit": 0.0,
    "adamw_8bit": 2.0, "adamw_bnb_8bit": 2.0, "lion_8bit": 1.0,
    "adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adafactor": 0.1, "sgd": 0.0,
}  # fmt: skip
"""Bytes of state that an optimizer (by transformers' name) holds on the GPU for each trained parameter."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model under training.

    Attributes:
        layers, hidden, inner, heads, kv_heads, head_dim, vocab: L, D, I, H, K, E, V.
        compute_bytes: bytes of an activation, 2 or 4.
        quant: "nf4", or the base's own dtype ("bf16", "fp16", "fp32").
        weight_bytes: base weights, embeddings, head and norms as they lie on the GPU.
        ranks: LoRA rank of each of :data:`PROJECTIONS`, 0 without an adapter.
        trained: parameters that train, in all.
        trained_tensors: how many tensors they are.
        trained_bytes: bytes of those parameters; their gradients take as many.
        adapter_bytes: bytes of the masters that are held besides ``weight_bytes``.
        optimizer_bytes: of state on the GPU for each trained parameter.
        optimizer_kind: whose optimizer it is, "bitsandbytes" or "torch".
        fused: the layers run as fused nodes; else by their own sub-modules, kept whole or recomputed.
        trains_base: the projections themselves train.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    compute_bytes: int
    quant: str
    weight_bytes: int
    ranks: tuple[int, ...]
    trained: int
    trained_tensors: int
    trained_bytes: int
    adapter_bytes: int
    optimizer_bytes: float = 0.0
    optimizer_kind: str = "bitsandbytes"
    fused: bool = True
    trains_base: bool = False

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of each of :data:`PROJECTIONS`."""
        return projection_sizes(self.hidden, self.inner, self.heads, self.kv_heads, self.head_dim)

    @property
    def layer_weights(self) -> int:
        """Weights of the projections of one layer."""
        return sum(o * i for o, i in self.sizes)

    @property
    def adapter_weights(self) -> int:
        """Parameters of all adapters."""
        return self.layers * sum(n * (o + i) for n, (o, i) in zip(self.ranks, self.sizes))

    @property
    def cached_bytes(self) -> int:
        """What a 4-bit base takes on the GPU once more, dequantized, its adapters beside it."""
        return self.layers * self.compute_bytes * self.held_weights(GROUPS) if self.quant == "nf4" else 0

    def held_weights(self, groups: Iterable[tuple[int, ...]]) -> int:
        """Elements of these groups' weights in one layer as they are held: ``[O + R, I + R]`` each, padded rows."""
        found = 0
        for group in groups:
            outputs, rank = sum(self.sizes[i][0] for i in group), sum(self.ranks[i] for i in group)
            found += (outputs + rank) * row_columns(self.sizes[group[0]][1] + rank)
        return found

    @property
    def layer_gradient_bytes(self) -> int:
        """Gradients of what trains in one layer (what trains elsewhere is spread over the layers)."""
        return self.trained_bytes // self.layers

    @property
    def fixed_bytes(self) -> int:
        """Weights, adapters and optimizer state: what lies on the GPU before a step."""
        return self.weight_bytes + self.adapter_bytes + int(self.optimizer_bytes * self.trained)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        load_in_4bit: bool = True,
        r: int = 16,
        target_modules: Any = PROJECTIONS,
        optimizer: str = "paged_adamw_8bit",
        compute_bytes: int = 2,
        full_finetuning: bool = False,
    ) -> ModelShape:
        """The shape that a transformers config has once loaded with these settings.

        Args:
            config: a transformers config of the Llama kind (``num_hidden_layers``, ``hidden_size`` ...).
            r: LoRA rank of every target.
            target_modules: names among :data:`PROJECTIONS`, or "all-linear".
            optimizer: one of :data:`OPTIMIZER_BYTES`.
            compute_bytes: bytes of an activation and of an unquantized weight.
            full_finetuning: every weight trains, and there is no adapter.

        Raises:
            ConfigError: an unknown target or optimizer, with the nearest known name.
        """
        D, L, V = int(config.hidden_size), int(config.num_hidden_layers), int(config.vocab_size)
        H = int(config.num_attention_heads)
        K = int(getattr(config, "num_key_value_heads", None) or H)
        E = int(getattr(config, "head_dim", None) or D // H)
        sizes = projection_sizes(D, int(config.intermediate_size), H, K, E)
        rank = 0 if full_finetuning else int(r)
        ranks = tuple(rank if name in checked_targets(target_modules) else 0 for name in PROJECTIONS)
        adapters = L * sum(n * (o + i) for n, (o, i) in zip(ranks, sizes))
        biases = _biases(config, sizes)
        held = nf4_bytes if load_in_4bit else lambda count: count * compute_bytes
        plain = (V * D if getattr(config, "tie_word_embeddings", False) else 2 * V * D) + (2 * L + 1) * D + L * biases
        weight_bytes = plain * compute_bytes + L * sum(held(o * i) for o, i in sizes)
        base = plain + L * sum(o * i for o, i in sizes)
        return cls(
            L, D, int(config.intermediate_size), H, K, E, V, compute_bytes,
            quant="nf4" if load_in_4bit else "bf16" if compute_bytes == 2 else "fp32",
            weight_bytes=weight_bytes,
            ranks=ranks,
            trained=base if full_finetuning else adapters,
            trained_tensors=9 * L + 3 if full_finetuning else 2 * L * sum(n > 0 for n in ranks),
            trained_bytes=weight_bytes if full_finetuning else 4 * adapters,
            adapter_bytes=4 * adapters,
            optimizer_bytes=optimizer_bytes(optimizer),
            optimizer_kind=optimizer_kind(optimizer),
            fused=not full_finetuning,
            trains_base=full_finetuning,
        )  # fmt: skip


def projection_sizes(D: int, I: int, H: int, K: int, E: int) -> tuple[tuple[int, int], ...]:  # noqa: E741
    """(outputs, inputs) of each of :data:`PROJECTIONS`."""
    return ((H * E, D), (K * E, D), (K * E, D), (D, H * E), (I, D), (I, D), (D, I))


def nf4_bytes(count: int) -> int:
    """Bytes of ``count`` weights in NF4 with double quantization: codes, scales, scales of scales, their offset."""
    blocks = math.ceil(count / NF4_BLOCKSIZE)
    return math.ceil(count / 2) + blocks + 4 * math.ceil(blocks / NESTED_BLOCKSIZE) + 4


def optimizer_bytes(name: str) -> float:
    """Bytes of state on the GPU for each trained parameter.

    Raises:
        ConfigError: the optimizer is not among those known.
    """
    if name not in OPTIMIZER_BYTES:
        close = nearest(str(name), OPTIMIZER_BYTES)
        hint = f"did you mean {close!r}?" if close else f"known: {', '.join(sorted(OPTIMIZER_BYTES))}"
        raise ConfigError(f"plan: optimizer={name!r} is unknown; {hint}")
    return OPTIMIZER_BYTES[name]


def optimizer_kind(name: str) -> str:
    """Whose optimizer a name of transformers means."""
    return "bitsandbytes" if "8bit" in name or name.startswith("paged") else "torch"


def checked_targets(targets: Any) -> tuple[str, ...]:
    """Names of the projections that get an adapter.

    Raises:
        ConfigError: a name that is no projection of a decoder layer.
    """
    if targets == "all-linear":
        return PROJECTIONS
    names = [targets] if isinstance(targets, str) or not isinstance(targets, Iterable) else list(targets)
    for name in names:
        if name not in PROJECTIONS:
            close = nearest(str(name), PROJECTIONS)
            hint = (
                f"did you mean {close!r}?" if close else f"give names among {', '.join(PROJECTIONS)}, or 'all-linear'"
            )
            raise ConfigError(f"plan: target_modules has {name!r}, which is no projection; {hint}")
    return tuple(names)


def _biases(config: Any, sizes: tuple[tuple[int, int], ...]) -> int:
    """Elements of the projections' biases in one layer."""
    outputs = [o for o, _ in sizes]
    attention = sum(outputs[:4]) if getattr(config, "attention_bias", False) else 0
    return attention + (sum(outputs[4:]) if getattr(config, "mlp_bias", False) else 0)
