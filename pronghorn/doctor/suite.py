"""Which checks there are, in the order of the report."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from . import compute, environment, gpu, hub, packages, storage
from .base import Checker


def checkers(device: int | None = None) -> Mapping[str, Checker]:
    """Every check by name; ``device`` is the index of the GPU that the user asked for, if any."""
    return {
        "python": packages.python_version,
        "packages": packages.versions,
        "GPU": functools.partial(gpu.gpus, device),
        "triton": compute.triton_kernel,
        "attention": compute.attention,
        "bitsandbytes": compute.optimizer,
        "CUDA variables": environment.cuda_variables,
        "PRONGHORN_*": environment.settings,
        "hub": hub.hub,
        "disk": storage.disk,
        "/dev/shm": storage.shared_memory,
    }
