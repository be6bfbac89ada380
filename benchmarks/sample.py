"""A decode step's sampling: batches of 1 to 256 rows of a vocabulary of 128,256, beside what torch does on the host.

Run ``python -m benchmarks.sample``. ``floor_ms`` is the time in which this GPU's measured copy bandwidth reads the
logits once. Our calls are captured in a CUDA graph, as a decode step is; ``torch`` is the softmax, sort and multinomial
draw of generation loops, its kernels' times alone (it cannot be captured: it waits for the device). Logits are like a
model's (few likely tokens), or flat: a standard normal, of which top-p keeps tens of thousands.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.elementwise import graphed
from benchmarks.nf4 import copy_bytes_per_ms, measure
from benchmarks.results import arguments, start
from pronghorn.kernels.logits import logit_stats_
from pronghorn.kernels.sample import sample_step
from pronghorn.kernels.sample_state import RowSettings, SampleState, Variant

V = 128256
BATCHES = (1, 6, 64, 256)
CASES = {
    "plain": RowSettings(temperature=0.8),
    "top_p": RowSettings(temperature=0.8, top_p=0.95),
    "top_k": RowSettings(temperature=0.8, top_k=50),
    "top_k_top_p": RowSettings(temperature=0.8, top_k=50, top_p=0.95),
    "penalty": RowSettings(temperature=0.8, repetition_penalty=1.1, seen=range(500)),
}


def logits(B: int, flat: bool) -> torch.Tensor:
    """A standard normal; or one twice as wide in which 20 tokens stand out, as in a trained model's."""
    x = torch.randn(B, V, device="cuda")
    if not flat:
        x = x.mul_(2).scatter_add_(1, torch.randint(V, (B, 20), device="cuda"), torch.rand(B, 20, device="cuda") * 14)
    return x


def ours(x: torch.Tensor, row: RowSettings) -> Callable[[], object]:
    """Steps of rows that never end: each is the first, by one more small write."""
    state = SampleState(len(x), V, 2, device="cuda")
    state.load(range(len(x)), [row] * len(x))
    variant = Variant.of([row], V)

    def step() -> None:
        state.counts_B.zero_()
        sample_step(x, state, variant)

    return step


def torchs(x: torch.Tensor, row: RowSettings) -> Callable[[], object]:
    """Top-k, top-p by sorting, softmax, a multinomial draw, and the log-probability."""

    def step() -> torch.Tensor:
        y = x / row.temperature
        if row.top_k > 0:
            y = y.masked_fill(y < y.topk(row.top_k).values[:, -1:], float("-inf"))
        if row.top_p < 1:
            values, order = y.sort(descending=True)
            probs = values.softmax(-1)
            values = values.masked_fill(probs.cumsum(-1) - probs >= row.top_p, float("-inf"))
            y = torch.empty_like(y).scatter_(1, order, values)
        logps = y.log_softmax(-1)
        token = torch.multinomial(logps.exp(), 1)
        return logps.gather(1, token)

    return step


def main() -> None:
    args = arguments("Sampling of a decode step").parse_args()
    results = start("sample", (), args)
    bandwidth = copy_bytes_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    stream = torch.cuda.Stream()
    for B in BATCHES:
        for kind in ("likely", "flat"):
            x = logits(B, kind == "flat")
            for name, row in CASES.items():
                case = f"kernel/sample/{name}/{kind}/{B}x{V}"
                results.add(case, "pronghorn", ms=graphed(ours(x, row), stream), floor_ms=4 * B * V / bandwidth)
                if row.repetition_penalty == 1:
                    results.add(case, "torch", ms=measure(torchs(x, row)))
    x, targets = logits(512, False), torch.randint(V, (512,), device="cuda")
    results.add(
        f"kernel/logit_stats/512x{V}", "pronghorn",
        ms=graphed(lambda: logit_stats_(x, targets), stream), floor_ms=4 * x.numel() / bandwidth,
    )  # fmt: skip
    results.write(args.out)


if __name__ == "__main__":
    main()
