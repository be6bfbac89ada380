"""Run by ``test_warm.py`` in a process of its own, where Triton's interpreter is off: compiles for a GPU that is not
there. Prints one line of JSON."""

# mypy: allow-untyped-defs

from __future__ import annotations

import contextlib
import io
import json

import torch
import triton
import triton.language as tl

from pronghorn.kernels import glu_triton, ordered_matmul_triton, rms_norm_triton
from pronghorn.kernels.launch import Launcher, Recorded, recording
from pronghorn.kernels.ordered_matmul import DenseMember
from pronghorn.kernels.ordered_matmul_triton import Tile
from pronghorn.kernels.warm import Warming
from tests.models.recorded_walk import H200


@triton.jit
def _broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def walk(tokens: int) -> None:
    x = torch.zeros(tokens, 512, dtype=torch.bfloat16)
    rms_norm_triton.rms_norm_forward(x, torch.ones(512, dtype=torch.bfloat16), 1e-5, x, 0.0, True)
    glu_triton.glu_forward(x, x, "silu", x)
    weight = DenseMember(torch.zeros(64, 512, dtype=torch.bfloat16))
    ordered_matmul_triton.ordered_matmul(x, [weight], None, x[:, :64], Tile(64, 128, 64, 4, 3, mapped=True))


def missing(recorded: Recorded) -> list[str]:
    """What Triton would compile now."""
    found: list[str] = []

    def seen(*, repr: str, **_: object) -> bool:
        found.append(repr)
        return True

    triton.knobs.runtime.jit_cache_hook = seen
    for kernel, args, options in recorded.launches:
        kernel.warmup(*args, grid=(1,), **options)
    triton.knobs.runtime.jit_cache_hook = None
    return found


def real_tensors_missing(tokens: int) -> list[str]:
    """The same of a launch's own arguments: the launching functions are replaced by Triton's search alone."""
    found: list[str] = []

    def search(self: Launcher, grid: tuple[int, ...], *args: object, **options: object) -> None:
        self.kernel.warmup(*(self.in_chain(args, options) if self.chains else args), grid=grid, **options)

    def seen(*, repr: str, **_: object) -> bool:
        found.append(repr)
        return True

    triton.knobs.runtime.jit_cache_hook = seen
    launch, Launcher.__call__ = Launcher.__call__, search  # type: ignore[method-assign, assignment]
    walk(tokens)
    Launcher.__call__ = launch  # type: ignore[method-assign]
    triton.knobs.runtime.jit_cache_hook = None
    return found


def main() -> None:
    triton.runtime.driver.set_active(H200())
    with recording() as recorded:
        walk(16)
    before = missing(recorded)
    seconds = Warming(recorded, torch.device("cpu"), "a test").wait()
    with recording() as wrong:
        Launcher(_broken)((1,), torch.zeros(64), 64)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        warming = Warming(wrong, torch.device("cpu"), "a broken kernel")
        try:
            warming.wait()
            raised = ""
        except Exception as error:  # noqa: BLE001 - its name is what is tested
            raised = type(error).__name__
    print(json.dumps({
        "before": len(before), "after": missing(recorded), "real": real_tensors_missing(4099), "seconds": seconds,
        "raised": raised, "said": said.getvalue(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
