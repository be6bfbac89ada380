"""A plan: what every decoder layer keeps for its backward pass and where, with the peak and the time foreseen."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from ..keep import Keep
from .constants import GIB


@dataclass(frozen=True)
class LayerPlan:
    """One layer: what it keeps, and whether that waits in pinned host memory instead of on the GPU."""

    keep: Keep
    host: bool = False

    def __str__(self) -> str:
        return f"keep {self.keep.value}{' (offloaded)' if self.host else ''}"


@dataclass(frozen=True)
class TrainingPlan:
    """A training step as it will run.

    Attributes:
        layers: each layer's plan, first layer first.
        mlp_rows: rows of one MLP tile; None runs the MLP in one piece.
        cached_weights: the 4-bit base also lies on the GPU in 16 bits, dequantized once.
        tokens: packed tokens of a step.
        peak_bytes: most memory that the allocator holds at once (``torch.cuda.max_memory_allocated``).
        step_seconds: forward, backward, clipping and optimizer.
        mode: "auto", "memory" or "off".
        host_bytes: pinned host memory.
        card: the GPU's name, empty on the CPU.
        total_bytes: the GPU's memory, or the part of it that the process may use.
        estimated: the card's rates are not measured but scaled from its datasheet.
        fits: the peak lies within the budget.
    """

    layers: tuple[LayerPlan, ...]
    mlp_rows: int | None = None
    cached_weights: bool = False
    tokens: int = 0
    peak_bytes: int = 0
    step_seconds: float = 0.0
    mode: str = "off"
    host_bytes: int = field(default=0, compare=False)
    card: str = field(default="", compare=False)
    total_bytes: int = field(default=0, compare=False)
    estimated: bool = field(default=False, compare=False)
    fits: bool = field(default=True, compare=False)

    @property
    def choice(self) -> tuple[tuple[LayerPlan, ...], int | None, bool]:
        """What the model does by it, without what is foreseen."""
        return self.layers, self.mlp_rows, self.cached_weights

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds if self.step_seconds else 0.0

    def line(self) -> str:
        """One line of text: tokens, what the layers keep, peak in GB of 2^30 bytes, seconds a step, the card."""
        kept = ", ".join(f"{len(list(run))} {plan}" for plan, run in groupby(self.layers))
        tile = f", MLP in tiles of {self.mlp_rows:,} rows" if self.mlp_rows else ""
        cached = ", base held in 16 bits" if self.cached_weights else ""
        text = f"Pronghorn plan: {self.tokens:,} tokens, {len(self.layers)} layers: {kept}{tile}{cached}"
        if not self.card:
            return text
        host = f", {self.host_bytes / GIB:.1f} GB pinned on the host" if self.host_bytes else ""
        fits = "" if self.fits else ", which by this estimate does not fit: lower the batch or the length"
        name = f"{self.card}, estimated" if self.estimated else self.card
        return (
            f"{text}; peak {self.peak_bytes / GIB:.1f} of {self.total_bytes / GIB:.1f} GB{host}, "
            f"{_seconds(self.step_seconds)} a step ({name}){fits}"
        )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
