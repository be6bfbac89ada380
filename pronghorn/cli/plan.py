"""``pronghorn plan``: peak memory and time of a training step, foreseen for the three ways to checkpoint."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..config.errors import ConfigError
from ..config.plan import PlanSettings
from .options import one_line_errors

_DEFAULTS = PlanSettings()


def plan(
    model: Annotated[str, typer.Argument(help="Folder with a config.json, or a hub name.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a micro-batch.")] = _DEFAULTS.batch_size,
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = _DEFAULTS.seq_length,
    gpu: Annotated[str | None, typer.Option(help="A card by name; the GPU here unless given.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Use at most this much of it, in GB of 2^30 bytes.")] = None,
    in_4bit: Annotated[bool, typer.Option("--4bit/--16bit", help="NF4 base, or 16 bits.")] = True,
    r: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = _DEFAULTS.r,
    optimizer: Annotated[str, typer.Option(help="transformers' name of the optimizer.")] = _DEFAULTS.optimizer,
) -> None:
    """Print what a training step would take, without running it."""
    settings: dict[str, Any] = {
        "batch_size": batch_size, "seq_length": seq_length, "gpu": gpu, "memory_gb": memory_gb,
        "load_in_4bit": in_4bit, "r": r, "optimizer": optimizer,
    }  # fmt: skip
    table = Table("checkpointing", "peak GB", "s a step", "tokens/s", "plan")
    with one_line_errors():
        from ..api import plan as foresee  # imports torch: after the settings were read

        for mode in ("auto", "memory", "off"):
            try:
                found = foresee(model, use_gradient_checkpointing=mode, **settings)
            except ConfigError as error:
                if mode == "auto":
                    raise  # nothing fits, or a setting is bad: the others would say the same
                table.add_row(mode, "", "", "", str(error))
                continue
            peak, seconds = f"{found.peak_bytes / 2**30:.1f}", f"{found.step_seconds:.3g}"
            table.add_row(mode, peak, seconds, f"{found.tokens_per_second:,.0f}", found.line())
    Console(highlight=False).print(table)
