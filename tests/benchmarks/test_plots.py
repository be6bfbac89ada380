"""The plots are of the numbers that lie under ``benchmarks/results``."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path

import pytest

from benchmarks import plots
from benchmarks.readme import load


@pytest.mark.parametrize("name", plots.PLOTS)
def test_a_plot_says_which_results_it_shows(name: str) -> None:
    """Its description is the source of the newest record; without a record there is no plot."""
    record, path = load(plots.PLOTS[name][0]), plots.OUT / f"{name}.svg"
    assert path.exists() == (record is not None)
    if record is not None:
        assert plots.source(record) in unescape(path.read_text()), "run: python -m benchmarks.plots"


def test_every_measured_bar_is_drawn(tmp_path: Path) -> None:
    rows = [
        {"case": f"sft/nf4/{shape}/{memory}", "impl": impl, "metric": metric, "value": value}
        for shape, memory, impl, value in (
            ("2x2048", "same-memory", "hf", 5800.0),
            ("2x2048", "same-memory", "pronghorn", 13000.0),
            ("2x2048", "free-memory", "pronghorn", 16000.0),
            ("8x2048", "same-memory", "unsloth", 11000.0),
        )
        for metric in ("tokens_per_s", "peak_gb")
    ]
    record = {"gpu": "G", "commit": "c" * 12, "date": "2026-01-01", "peers": {"peft": "1"}, "rows": rows}
    groups = plots.training_bars(record)
    assert [[bar[0] for bar in bars] for bars in groups.values()] == [
        ["transformers + PEFT + bitsandbytes", "Pronghorn, least memory", "Pronghorn, memory free"],
        ["Unsloth"],
    ]
    figure = plots.training(record, plots.style())
    heights = sorted(round(bar.get_height()) for bar in figure.axes[0].patches)
    assert heights == [5800, 11000, 13000, 16000]
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "sft.json").write_text(json.dumps(record))
    assert load("sft", tmp_path) == record
