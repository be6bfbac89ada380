"""``pronghorn quickstart``: GRPO on the model that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..config.quickstart import QuickstartConfig
from ..env import Settings, select_device
from .options import Device, one_line_errors

_DEFAULTS = QuickstartConfig()


def quickstart(
    seed: Annotated[int, typer.Option(help="Seed of adapter, training problems and samples.")] = _DEFAULTS.seed,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = _DEFAULTS.steps,
    output: Annotated[Path, typer.Option(help="Folder for the run and its report.")] = Path(_DEFAULTS.output_dir),
    device: Device = None,
) -> None:
    """Train the shipped model by GRPO on arithmetic word problems, save it, and check what was saved."""
    with one_line_errors():
        config = QuickstartConfig(output_dir=str(output), steps=steps, seed=seed)
        device = Settings.from_environ().device if device is None else device
        if device is not None:
            select_device(device)
        from ..recipes.quickstart import run  # imports torch and starts CUDA: after the choice of the GPU

        run(config)
