"""From nothing to the first step: load, first step and what was compiled, in fresh processes with empty kernel caches.

    python -m benchmarks.cold_start --model FOLDER --dataset FOLDER [--what sft,grpo] [--compare]

Each measurement is a process of its own, whose Triton and Pronghorn caches are new empty folders; model files may lie
in the system's page cache, as they do after a download. Cases ``cold/sft/2x2048`` and ``cold/grpo/blog``: ``import_s``,
``load_s`` (reading 16-bit files and quantizing), ``adapt_s``, ``first_step_s``, ``second_step_s``, ``start_s`` (from
the first line to the end of the first step), ``compiled`` (kernels) and ``compile_s`` (their compilers' seconds, all
threads together); with ``--compare`` the same as ``.../one-by-one``, where kernels compile at their first launch. The
ten slowest compilations are rows of the metric ``compile_s`` of ``<case>/kernel/<name>``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.results import arguments, start

CASES = {"sft": "cold/sft/2x2048", "grpo": "cold/grpo/blog"}


class Compilations:
    """Seconds of every compilation in this process, by kernel; loads from the cache are left out."""

    def __init__(self) -> None:
        import triton

        self.seconds: list[tuple[str, float]] = []
        triton.knobs.compilation.listener = self._heard

    def _heard(self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if not cache_hit:
            lowering = sum(took for _, took in times.lowering_stages)
            self.seconds.append((src.name, (times.ir_initialization + lowering) / 1e6))

    def slowest(self, count: int) -> list[tuple[str, float]]:
        """Names are numbered where a kernel was compiled more than once."""
        found = sorted(self.seconds, key=lambda one: -one[1])[:count]
        return [(f"{i}-{name.strip('_')}", seconds) for i, (name, seconds) in enumerate(found)]


def measure(what: str, folder: str, dataset: str | None, one_by_one: bool) -> dict[str, Any]:
    """In the fresh process: seconds of each part."""
    begun = last = time.perf_counter()
    parts: dict[str, Any] = {}

    def lap(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        parts[name], last = now - last, now

    import torch

    from benchmarks import grpo, sft
    from pronghorn import FastLanguageModel
    from pronghorn.models import state_of
    from pronghorn.optim import PagedAdamW8bit

    torch.cuda.synchronize()
    compilations = Compilations()
    lap("import_s")
    if what == "grpo":
        model, tokenizer = grpo.load(folder)
    else:
        model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=2048, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    lap("load_s")
    state_of(model).compile_ahead = not one_by_one
    model = grpo.adapt(model)
    lap("adapt_s")
    if what == "grpo":
        assert dataset is not None
        clock = grpo.Clock()
        grpo.trainer_of(model, tokenizer, dataset, 2, clock).train()
        steps = clock.seconds
        parts["to_train_s"] = time.perf_counter() - last - sum(steps)
    else:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = PagedAdamW8bit(trained, lr=5e-6)
        ids = torch.randint(5, 16000, (2, 2048), device="cuda")
        steps = [sft.step(model, optimizer, trained, ids) for _ in range(2)]
    parts["first_step_s"], parts["second_step_s"] = steps
    parts["start_s"] = time.perf_counter() - begun - steps[1]
    parts["compiled"] = len(compilations.seconds)
    parts["compile_s"] = sum(seconds for _, seconds in compilations.seconds)
    return {"parts": parts, "slowest": compilations.slowest(10)}


def in_a_fresh_process(args: argparse.Namespace, what: str, one_by_one: bool) -> dict[str, Any]:
    """Run :func:`measure` with empty caches and a limit on its time.

    Raises:
        SystemExit: it failed, with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.cold_start", "--child", what, "--model", args.model]
    command += ["--dataset", args.dataset] if args.dataset else []
    command += ["--one-by-one"] if one_by_one else []
    with tempfile.TemporaryDirectory() as caches:
        environment = {**os.environ, "TRITON_CACHE_DIR": f"{caches}/triton", "XDG_CACHE_HOME": f"{caches}/xdg"}
        environment.setdefault("HF_HUB_OFFLINE", "1")
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=args.timeout)
    print("".join(f"  {line}\n" for line in run.stdout.splitlines() if line.startswith("Pronghorn")), end="")
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if run.returncode or not lines:
        raise SystemExit(
            f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
        )
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", default=None, help="GSM8K, for grpo")
    parser.add_argument("--what", default="sft,grpo")
    parser.add_argument("--compare", action="store_true", help="also with kernels compiled one by one, at first use")
    parser.add_argument("--timeout", type=float, default=240, help="seconds of one process")
    parser.add_argument("--child", choices=tuple(CASES), default=None, help=argparse.SUPPRESS)
    parser.add_argument("--one-by-one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        found = measure(args.child, args.model, args.dataset, args.one_by_one)
        print("RESULT " + json.dumps(found), flush=True)
        return
    results = start("cold_start", (), args)
    for what in args.what.split(","):
        for one_by_one in (False, True) if args.compare else (False,):
            found = in_a_fresh_process(args, what, one_by_one)
            case = CASES[what] + ("/one-by-one" if one_by_one else "")
            results.add(case, "pronghorn", **found["parts"])
            for name, seconds in found["slowest"]:
                results.add(f"{case}/kernel/{name}", "pronghorn", compile_s=seconds)
    results.write(args.out)


if __name__ == "__main__":
    main()
