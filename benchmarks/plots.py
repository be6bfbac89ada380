"""The README's plots from ``benchmarks/results``: ``python -m benchmarks.plots [--out docs/plots] [--results DIR]``.

``training``: tokens/s of a training step and its peak memory, by case; ``decode``: ms of a decode step, by batch;
``grpo``: seconds of a step of the GRPO flow, and from the start to the end of its first step. Each has every
implementation of its JSON file; a file that is not there leaves its plot out, and one line says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.readme import NAMES, load, values
from benchmarks.results import RESULTS

OUT = RESULTS.parent.parent / "docs" / "plots"

OWN, OWN_FREE = "#c8501e", "#edab86"
COLOURS = {"hf": "#b9bec6", "trl": "#b9bec6", "liger": "#8b95a3", "unsloth": "#3f6fa3", "unsloth-vllm": "#86a9cf"}
COLOURS |= {"vllm-bf16": "#3f6fa3", "vllm-nf4": "#86a9cf", "transformers-nf4": "#b9bec6", "unsloth-nf4": "#6c5b8e"}
LABELS = {
    "liger": "Liger", "unsloth-vllm": "Unsloth + vLLM", "vllm-bf16": "vLLM, 16 bits", "vllm-nf4": "vLLM, 4 bits",
    "transformers-nf4": "transformers, 4 bits", "unsloth-nf4": "Unsloth, 4 bits",
}  # fmt: skip

# (case without its memory, heading): one group of bars each.
SHAPES = [
    ("sft/nf4/2x2048", "4-bit base\n2 x 2,048"),
    ("sft/nf4/8x2048", "4-bit base\n8 x 2,048"),
    ("sft/nf4/1x32768", "4-bit base\n1 x 32,768"),
    ("sft/nf4/1x65536", "4-bit base\n1 x 65,536"),
    ("sft/bf16/2x2048", "16-bit base\n2 x 2,048"),
]


def label(impl: str) -> str:
    return LABELS.get(impl) or NAMES.get(impl, impl).strip("*")


def source(record: dict[str, Any]) -> str:
    """Where the numbers come from, in a line."""
    peers = ", ".join(f"{name} {version}" for name, version in record["peers"].items())
    return f"{record['gpu']}, commit {record['commit'][:12]}, {record['date']}" + (f"; {peers}" if peers else "")


def style() -> Any:
    """matplotlib's pyplot, set up: text as text, the same bytes for the same numbers."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": "#7a7f87", "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "xtick.major.size": 0, "ytick.major.size": 0, "ytick.color": "#555a62", "svg.hashsalt": "pronghorn",
        "savefig.facecolor": "white",
    })  # fmt: skip
    import matplotlib.pyplot as plt

    return plt


def training_bars(record: dict[str, Any]) -> dict[str, list[tuple[str, str, dict[str, float]]]]:
    """For each shape that was measured: (label, colour, metrics) of every implementation, ours last."""
    found: dict[str, list[tuple[str, str, dict[str, float]]]] = {}
    for case, heading in SHAPES:
        same, free = values(record, f"{case}/same-memory"), values(record, f"{case}/free-memory")
        ours = same.pop("pronghorn", None)
        bars = [(label(impl), COLOURS.get(impl, "#999999"), same[impl]) for impl in COLOURS if impl in same]
        if ours:
            bars.append(("Pronghorn, least memory", OWN, ours))
        if "pronghorn" in free:
            bars.append(("Pronghorn, memory free", OWN_FREE, free["pronghorn"]))
        if bars:
            found[heading] = bars
    return found


def grouped(axis: Any, groups: dict[str, list[tuple[str, str, dict[str, float]]]], metric: str, form: str) -> None:
    """A group of bars each; the bars of a group stand in the middle of its place, their values above them."""
    widest = max(len(bars) for bars in groups.values())
    width = 0.86 / widest
    for place, bars in enumerate(groups.values()):
        for i, (_, colour, metrics) in enumerate(bars):
            at = place + (i - (len(bars) - 1) / 2) * width
            axis.bar(at, metrics[metric], width * 0.92, color=colour, zorder=2)
            axis.annotate(
                form.format(metrics[metric]), (at, metrics[metric]), xytext=(0, 2), textcoords="offset points",
                ha="center", va="bottom", fontsize=6.5, color="#33373d",
            )  # fmt: skip
    axis.set_xticks(range(len(groups)), list(groups))
    axis.margins(x=0.02, y=0.12)
    axis.grid(axis="y", color="#e6e8eb", linewidth=0.8, zorder=0)


def legend(figure: Any, groups: dict[str, list[tuple[str, str, dict[str, float]]]], plt: Any) -> None:
    """Along the top: the peers, then ours."""
    entries = {name: colour for bars in groups.values() for name, colour, _ in bars}
    entries = dict(sorted(entries.items(), key=lambda entry: entry[0].startswith("Pronghorn")))
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in entries.values()]
    figure.legend(
        handles, list(entries), loc="upper left", bbox_to_anchor=(0.01, 0.985), ncols=min(len(entries), 5),
        frameon=False, fontsize=8.5, handlelength=1.0, handleheight=0.9, columnspacing=1.4,
    )  # fmt: skip


def training(record: dict[str, Any], plt: Any) -> Any:
    groups = training_bars(record)
    figure, (speed, memory) = plt.subplots(2, 1, figsize=(9.2, 6.4), height_ratios=(3, 2))
    grouped(speed, groups, "tokens_per_s", "{:,.0f}")
    speed.set_title("Training step, 8B, LoRA rank 32 on all projections: tokens a second (higher is better)")
    speed.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    grouped(memory, groups, "peak_gb", "{:.1f}")
    memory.set_title("Peak memory of the GPU, GB of 2³⁰ bytes (lower is better)")
    legend(figure, groups, plt)
    figure.subplots_adjust(left=0.07, right=0.99, top=0.89, bottom=0.11, hspace=0.48)
    return figure


def decode_groups(record: dict[str, Any]) -> dict[str, list[tuple[str, str, dict[str, float]]]]:
    found: dict[str, list[tuple[str, str, dict[str, float]]]] = {}
    for rows in (1, 6, 64, 256):
        bf16, nf4 = values(record, f"decode/bf16/b{rows}"), values(record, f"decode/nf4-lora/b{rows}")
        peers = bf16 | nf4
        bars = [(label(impl), COLOURS.get(impl, "#999999"), peers[impl]) for impl in COLOURS if impl in peers]
        if "pronghorn" in bf16:
            bars.append(("Pronghorn, 16 bits", OWN_FREE, bf16["pronghorn"]))
        if "pronghorn" in nf4:
            bars.append(("Pronghorn, 4 bits + LoRA", OWN, nf4["pronghorn"]))
        if bars:
            found[f"batch {rows}"] = bars
    return found


def decode(record: dict[str, Any], plt: Any) -> Any:
    groups = decode_groups(record)
    figure, axis = plt.subplots(figsize=(9.2, 3.6))
    grouped(axis, groups, "ms_per_step", "{:.1f}")
    axis.set_title("Decoding, 8B, prompt 256 and 256 new tokens: ms a step, all told (lower is better)")
    legend(figure, groups, plt)
    figure.subplots_adjust(left=0.07, right=0.99, top=0.8, bottom=0.14)
    return figure


def grpo(record: dict[str, Any], plt: Any) -> Any:
    rows = values(record, "grpo/blog")
    impls = [impl for impl in COLOURS if impl in rows] + ["pronghorn"]
    figure, axes = plt.subplots(1, 3, figsize=(9.2, 0.9 + 0.42 * len(impls)), sharey=True)
    panels = [
        ("seconds a step", [("s_per_step", 1.0)]),
        ("load and first step, seconds", [("load_s", 0.55), ("first_step_s", 1.0)]),
        ("GPU memory in use, GB", [("used_gb", 1.0)]),
    ]
    for axis, (title, parts) in zip(axes, panels):
        for place, impl in enumerate(impls):
            left = 0.0
            colour = OWN if impl == "pronghorn" else COLOURS[impl]
            for metric, alpha in parts:
                axis.barh(place, rows[impl][metric], 0.66, left=left, color=colour, alpha=alpha, zorder=2)
                left += rows[impl][metric]
            axis.annotate(
                f"{left:.1f}", (left, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8,
                color="#33373d",
            )  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", color="#e6e8eb", linewidth=0.8, zorder=0)
        axis.margins(x=0.16)
    axes[0].invert_yaxis()
    axes[0].set_yticks(range(len(impls)), [label(impl) for impl in impls])
    axes[1].text(
        0.0, -0.26, "light: load; dark: first step", transform=axes[1].transAxes, fontsize=7.5, color="#555a62"
    )
    figure.subplots_adjust(left=0.25, right=0.985, top=0.84, bottom=0.24, wspace=0.12)
    return figure


PLOTS = {"training": ("sft", training), "decode": ("decode", decode), "grpo": ("grpo", grpo)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--png", action="store_true", help="bitmaps too, to look at")
    args = parser.parse_args()
    plt = style()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (file, draw) in PLOTS.items():
        record = load(file, args.results)
        if record is None:
            print(f"no {file}.json under {args.results}: no plot {name}")
            continue
        figure = draw(record, plt)
        figure.text(0.01, 0.012, source(record), fontsize=7, color="#7a7f87")
        figure.savefig(args.out / f"{name}.svg", metadata={"Date": None, "Description": source(record)})
        if args.png:
            figure.savefig(args.out / f"{name}.png", dpi=130)
        plt.close(figure)
        print(f"wrote {args.out / name}.svg")


if __name__ == "__main__":
    main()
