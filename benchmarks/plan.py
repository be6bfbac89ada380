"""What ``pronghorn.plan`` foresees beside what ``benchmarks/sft.py`` measured: peak and time of every case.

    python -m benchmarks.plan --model FOLDER [--results benchmarks/results/h200/sft.json]

FOLDER is the model that was measured; its config.json is all that is read, and no GPU is needed. Ends with status 1
where a figure is off by more than ``--within`` (0.1).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pronghorn
from benchmarks.readme import values
from benchmarks.results import RESULTS
from benchmarks.sft import MEMORY

MODES = {name: mode for mode, name in MEMORY.items()}


class Compared(NamedTuple):
    """One figure of one case, in GB of 2^30 bytes or seconds."""

    case: str
    figure: str
    measured: float
    foreseen: float

    @property
    def off(self) -> float:
        return self.foreseen / self.measured - 1


def compare(record: dict[str, Any], model: Any) -> Iterator[Compared]:
    """Every case of a results record of ``sft`` against its plan (rank 32, paged 8-bit AdamW, as it measures)."""
    steps = (row["case"] for row in record["rows"] if row["case"].startswith("sft/"))  # and not the times of loading
    for case in dict.fromkeys(steps):
        found = values(record, case).get("pronghorn")
        _, quant, size, memory = case.split("/")
        if found is None or memory not in MODES:
            continue
        batch, length = map(int, size.split("x"))
        plan = pronghorn.plan(
            model,
            batch_size=batch,
            seq_length=length,
            gpu=record["gpu"],
            r=32,
            load_in_4bit=quant == "nf4",
            use_gradient_checkpointing=MODES[memory],
        )
        yield Compared(case, "peak_gb", found["peak_gb"], plan.peak_bytes / 2**30)
        yield Compared(case, "step_s", found["step_s"], plan.step_seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--results", type=Path, default=RESULTS / "h200" / "sft.json")
    parser.add_argument("--within", type=float, default=0.1)
    args = parser.parse_args()
    worst = 0.0
    for row in compare(json.loads(args.results.read_text()), args.model):
        worst = max(worst, abs(row.off))
        print(
            f"{row.case:36s} {row.figure:8s} measured {row.measured:9.3f}  foreseen {row.foreseen:9.3f}  {row.off:+.1%}"
        )
    sys.exit(f"off by up to {worst:.1%}" if worst > args.within else 0)


if __name__ == "__main__":
    main()
