"""Write the README's measured tables from ``benchmarks/results``: ``python -m benchmarks.readme`` (``--check`` only
compares, for the tests)."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS

README = RESULTS.parent.parent / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"

# (title, results file, case, metrics with their headings)
TABLES = [
    (
        "The flow above at its own settings: 8B in 4 bits, rank 32, 6 completions of 200 tokens a step",
        "grpo",
        "grpo/blog",
        [
            ("s_per_step", "s a step"),
            ("load_s", "load, s"),
            ("first_step_s", "first step, s"),
            ("cold_s", "load + first step, s"),
            ("used_gb", "GPU GB"),
        ],  # fmt: skip
    ),
]
# (case, heading): training steps, every implementation of the run a column.
STEPS = [
    ("sft/nf4/2x2048/same-memory", "NF4, 2 x 2,048, `memory`"),
    ("sft/nf4/2x2048/free-memory", "NF4, 2 x 2,048, `off`"),
    ("sft/nf4/8x2048/same-memory", "NF4, 8 x 2,048, `memory`"),
    ("sft/nf4/8x2048/free-memory", "NF4, 8 x 2,048, `off`"),
    ("sft/nf4/1x32768/same-memory", "NF4, 1 x 32,768, `memory`"),
    ("sft/nf4/1x65536/same-memory", "NF4, 1 x 65,536, `memory`"),
    ("sft/bf16/2x2048/same-memory", "bf16, 2 x 2,048, `memory`"),
    ("sft/bf16/2x2048/free-memory", "bf16, 2 x 2,048, `off`"),
]
# (base of `benchmarks/decode.py`, heading)
DECODE_BASES = [("nf4-lora", "NF4 under a live adapter of rank 32"), ("bf16", "bf16"), ("fp16", "fp16")]
HEADER = 4  # lines of a table before its rows, the title and what stands behind it included
# How the peers' short names read.
NAMES = {
    "trl": "TRL + PEFT + bitsandbytes",
    "hf": "transformers + PEFT + bitsandbytes",
    "unsloth": "Unsloth",
    "unsloth-vllm": "Unsloth + vLLM",
    "vllm-bf16": "vLLM, bf16",
    "vllm-nf4": "vLLM, NF4",
    "vllm": "vLLM",
    "transformers": "transformers' continuous batching",
    "pronghorn": "**Pronghorn**",
}
# (results file, case prefix, heading): one line a case, ours against each peer.
KERNELS = [
    ("nf4", "kernel/nf4_dequantize/", "NF4 dequantize"),
    ("elementwise", "kernel/", "element-wise kernels"),
    ("linear_cross_entropy", "kernel/linear_cross_entropy", "the head's loss"),
    ("adamw8bit", "kernel/paged_adamw8bit/", "8-bit AdamW over 448 LoRA tensors"),
]


def load(name: str, results: Path | None = None) -> dict[str, Any] | None:
    """The newest record of that name under ``results`` (ours by default), whatever the GPU."""
    found = sorted((results or RESULTS).glob(f"*/{name}.json"), key=lambda path: json.loads(path.read_text())["date"])
    record: dict[str, Any] | None = json.loads(found[-1].read_text()) if found else None
    return record


def values(record: dict[str, Any], case: str) -> dict[str, dict[str, float]]:
    """``{impl: {metric: value}}`` of one case."""
    rows: dict[str, dict[str, float]] = {}
    for row in record["rows"]:
        if row["case"] == case:
            rows.setdefault(row["impl"], {})[row["metric"]] = row["value"]
    for found in rows.values():
        if "load_s" in found and "first_step_s" in found:
            found["cold_s"] = found["load_s"] + found["first_step_s"]
    return rows


def _cell(metric: str, found: dict[str, float]) -> str:
    if metric not in found:
        return ""
    digits = {"tokens_per_s": 0, "s_per_step": 2}.get(metric, 1)
    return f"{found[metric]:,.{digits}f}"


def flow_table(title: str, name: str, case: str, metrics: list[tuple[str, str]]) -> list[str]:
    record = load(name)
    if record is None:
        return []
    peers = ", ".join(f"{peer} {version}" for peer, version in record["peers"].items())
    lines = [f"**{title}** ({record['gpu']}, commit {record['commit']}, {record['date']}; {peers or 'no peer'})", ""]
    lines += ["| | " + " | ".join(heading for _, heading in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for impl, found in values(record, case).items():
        cells = [_cell(metric, found) for metric, _ in metrics]
        lines.append(f"| {NAMES.get(impl, impl)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def steps_table() -> list[str]:
    """A training step of the 8B shape: tokens/s at peak GB."""
    record = load("sft")
    if record is None:
        return []
    impls = [impl for impl in NAMES if any(row["impl"] == impl for row in record["rows"])]
    peers = ", ".join(f"{peer} {version}" for peer, version in record["peers"].items())
    lines = [
        "**A training step, 8B, rank 32 on all projections, 8-bit AdamW and clipping included: tokens/s at peak GB, "
        "by `use_gradient_checkpointing`** "
        f"({record['gpu']}, commit {record['commit']}, {record['date']}; {peers})",
        "",
        "| | " + " | ".join(NAMES[impl] for impl in impls) + " |",
        "|---" * (len(impls) + 1) + "|",
    ]
    for case, heading in STEPS:
        rows = values(record, case)
        cells = [
            f"{rows[impl]['tokens_per_s']:,.0f} at {rows[impl]['peak_gb']:.2f}" if impl in rows else ""
            for impl in impls
        ]
        if any(cells):
            lines.append(f"| {heading} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _source(record: dict[str, Any]) -> str:
    peers = ", ".join(f"{peer} {version}" for peer, version in record["peers"].items())
    return f"({record['gpu']}, commit {record['commit']}, {record['date']}{'; ' + peers if peers else ''})"


def decode_table() -> list[str]:
    """Milliseconds of a decode step: the base that each row ran, a column a batch size. Bases that the newest run does
    not have are those of the run that had them all.
    """
    lines: list[str] = []
    shown: set[str] = set()
    for name, title in (
        ("decode", "Decoding, 8B, prompt 256 + 256 new"),
        ("decode_16bit", "The same, bases in 16 bits"),
    ):
        record = load(name)
        if record is not None:
            bases = [base for base, _ in DECODE_BASES if base not in shown]
            lines += _decode_lines(record, f"**{title}: ms a step (tokens/s)** {_source(record)}", bases)
            shown |= {row["case"].split("/")[1] for row in record["rows"] if row["impl"] == "pronghorn"}
    return lines


def _decode_lines(record: dict[str, Any], title: str, bases: list[str]) -> list[str]:
    cases = [re.fullmatch(r"decode/[^/]+/b(\d+)", row["case"]) for row in record["rows"]]
    sizes = sorted({int(case[1]) for case in cases if case})
    lines = [title, "", "| | " + " | ".join(f"batch {size}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for base in bases:
        found = {size: values(record, f"decode/{base}/b{size}") for size in sizes}
        for impl in [name for name in NAMES if any(name in rows for rows in found.values())]:
            cells = [
                f"{rows[impl]['ms_per_step']:.2f} ({rows[impl]['tokens_per_s']:,.0f})" if impl in rows else ""
                for rows in found.values()
            ]
            shown = f"{NAMES[impl]}, {dict(DECODE_BASES)[base]}" if impl == "pronghorn" else NAMES[impl]
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return [*lines, ""] if len(lines) > HEADER else []


def throughput_table() -> list[str]:
    """Tokens/s of the mixed workload."""
    records = [found for name in ("throughput", "throughput_transformers") if (found := load(name)) is not None]
    if not records:
        return []
    lines = ["**Completions of 16 to 2,048 tokens, ends mixed** " + ", then ".join(map(_source, records)), ""]
    lines += ["| prompts x samples | | base | tokens/s |", "|---|---|---|---|"]
    for record in records:
        for case in dict.fromkeys(row["case"] for row in record["rows"]):
            found_of = values(record, case)
            if list(found_of) == ["pronghorn"]:  # nobody beside it
                continue
            for impl, found in found_of.items():
                rank = f", LoRA rank {found['lora_rank']:.0f}" if found["lora_rank"] else ""
                speed = f"{found['tokens_per_s']:,.0f}" if "tokens_per_s" in found else "cut off"
                cells = (case.rsplit("/", 1)[1], NAMES.get(impl, impl), f"{found['bits']:.0f} bits{rank}", speed)
                lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def parity_table() -> list[str]:
    """How far sampler and trainer are apart."""
    record = load("parity")
    if record is None:
        return []
    lines = [
        f"**Log-probs of the sampler against the trainer's, NF4 + LoRA, nats a token** {_source(record)}",
        "",
        "| model, sampling | mean difference | largest | KL | tokens that differ in any bit |",
        "|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in record["rows"]):
        found = values(record, case)["pronghorn"]
        numbers = [f"{found[name]:.2g}" for name in ("mean_abs_logp", "max", "kl")]
        share = f"{found['unequal']:.2%} of {found['tokens']:,.0f}"
        lines.append(f"| {case.removeprefix('parity/nf4-lora/')} | " + " | ".join([*numbers, share]) + " |")
    return [*lines, ""]


def kernel_table() -> list[str]:
    lines = ["| kernel (median ms) | Pronghorn | peer in the same run | floor |", "|---|---|---|---|"]
    heads = []
    for name, prefix, _ in KERNELS:
        record = load(name)
        if record is None:
            continue
        heads.append(f"{name}: {record['gpu']}, commit {record['commit']}, {record['date']}")
        for case in dict.fromkeys(row["case"] for row in record["rows"] if row["case"].startswith(prefix)):
            rows = values(record, case)
            ours = rows.pop("pronghorn", None)
            if ours is None or not rows or "ms" not in ours:
                continue
            peers = ", ".join(f"{impl} {found['ms']:.3f}" for impl, found in rows.items())
            floor = f"{ours['floor_ms']:.3f}" if "floor_ms" in ours else ""
            lines.append(f"| {case.removeprefix('kernel/')} | {ours['ms']:.3f} | {peers} | {floor} |")
    return [f"**Kernels** ({'; '.join(heads)})", "", *lines, ""] if heads else []


def plot(name: str, words: str) -> list[str]:
    """The plot, where ``benchmarks/plots.py`` drew it."""
    path = f"docs/plots/{name}.svg"
    return [f"![{words}]({path})", ""] if (README.parent / path).exists() else []


def render() -> str:
    lines = plot("grpo", "The GRPO flow: seconds a step, seconds to the end of the first step, memory")
    lines += plot("decode", "Decoding: milliseconds a step")
    lines += plot("training", "Training: tokens a second and peak memory")
    for table in TABLES:
        lines += flow_table(*table)
    for part in (decode_table, throughput_table, parity_table, steps_table):
        lines += part()
    return "\n".join([*lines, *kernel_table()]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit with 1 where the README does not say the same")
    text = README.read_text()
    before, rest = text.split(BEGIN)
    wanted = f"{before}{BEGIN}\n{render()}\n{END}{rest.split(END)[1]}"
    if parser.parse_args().check:
        sys.exit(0 if wanted == text else "README.md is stale: run python -m benchmarks.readme")
    Path(README).write_text(wanted)


if __name__ == "__main__":
    main()
