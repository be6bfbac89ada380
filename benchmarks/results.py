"""What a benchmark writes: ``benchmarks/results/<gpu>/<name>.json``, the source of every number in the README.

``{"gpu", "torch", "triton", "commit", "date", "peers": {name: version}, "rows": [{"case", "impl", "metric",
"value"}]}``, and ``"absent": {name: why}`` where a peer was to be measured and was not. ``impl`` is ``pronghorn`` or
the peer measured in the same run; times are in ms or s as the metric's name says.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured number."""

    case: str
    impl: str
    metric: str
    value: float


@dataclasses.dataclass
class Results:
    """The rows of one run of one benchmark, and where they came from.

    Attributes:
        name: name of the file, and of the benchmark.
        peers: distributions measured beside ours in this run; their versions are looked up when written.
        commit: the commit that was measured.
        absent: peers that were to be measured in this run and were not, and why.
    """

    name: str
    peers: tuple[str, ...]
    commit: str
    rows: list[Row] = dataclasses.field(default_factory=list)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, case: str, impl: str, **metrics: float) -> None:
        """Record the metrics of one implementation in one case, and print them."""
        self.rows += [Row(case, impl, metric, float(f"{value:.6g}")) for metric, value in metrics.items()]
        shown = "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items())
        print(f"{case:44s} {impl:14s} {shown}", flush=True)

    def write(self, folder: Path = RESULTS) -> Path:
        """Write ``<folder>/<gpu>/<name>.json`` (a run before it is replaced) and return its path."""
        import torch

        gpu = torch.cuda.get_device_name()
        path = folder / gpu_folder(gpu) / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "gpu": gpu,
            "torch": str(torch.__version__),
            "triton": importlib.metadata.version("triton"),
            "commit": self.commit,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "peers": {name: importlib.metadata.version(name) for name in self.peers},
            **({"absent": self.absent} if self.absent else {}),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")
        return path


def gpu_folder(gpu: str) -> str:
    """``"NVIDIA H200"`` to ``"h200"``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")


def current_commit() -> str:
    """The checked-out commit, with ``-dirty`` after it where tracked files differ from it.

    Raises:
        SystemExit: this is no git checkout; ``--commit`` must say what is measured.
    """
    root = RESULTS.parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{root} is no git checkout ({error}); name the measured commit with --commit") from error


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: ``--out`` and ``--commit``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder that gets <gpu>/<name>.json")
    parser.add_argument("--commit", default=None, help="what is measured; git is asked where this is left out")
    parser.add_argument("--peer", action="append", default=[], help="name=LOG of a peer measured in the same run")
    parser.add_argument("--absent", action="append", default=[], help="name=WHY of a peer that could not be measured")
    return parser


def peer_results(given: list[str]) -> dict[str, list[dict[str, Any]]]:
    """``name=LOG`` options to what each peer's script printed as ``RESULT {json}``, in the same run as ours.

    Raises:
        SystemExit: a log without a result.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for option in given:
        name, _, log = option.partition("=")
        lines = [line for line in Path(log).read_text().splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"--peer {option}: {log} holds no RESULT line; see what the peer's script said there")
        found.setdefault(name, []).extend(json.loads(line.removeprefix("RESULT ")) for line in lines)
    return found


def distributions(peers: Iterable[str]) -> tuple[str, ...]:
    """What was installed for peers such as ``vllm-bf16`` and ``vllm-nf4``: the name up to the first dash, once."""
    return tuple(dict.fromkeys(name.partition("-")[0] for name in peers))


def start(name: str, peers: tuple[str, ...], args: argparse.Namespace) -> Results:
    """Results to fill, for the commit that ``args`` or git names.

    Raises:
        SystemExit: no CUDA GPU: benchmarks measure nothing on a CPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks/{name}.py needs a CUDA GPU; torch {torch.__version__} sees none")
    absent = dict(option.partition("=")[::2] for option in args.absent)
    return Results(name, peers, args.commit or current_commit(), absent=absent)
