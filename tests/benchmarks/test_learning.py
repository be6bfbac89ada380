"""The learning study's numbers on made-up runs, its plot, and the page's table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning_table
from benchmarks.learning_plots import draw
from benchmarks.learning_summary import interval, of_run, summarize, write_results


def records(seconds: float, shift: float) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [{"step": 0, "accuracy": 0.4}]
    for step in range(1, 11):
        made.append({"step": step, "seconds": seconds, "reward": step / 10 + shift})
    made[5]["accuracy"], made[10]["accuracy"] = 0.6, 0.8 + shift
    return made


RUNS = [
    {"seed": seed, "sides": {"pronghorn": records(1.0, 0.01 * seed), "trl": records(3.0, 0.0)}} for seed in range(3)
]


def test_interval_is_students() -> None:
    """Quantiles in closed form: tan(pi (p - 1/2)) for one degree of freedom, (2p - 1) / sqrt(2p (1 - p)) for two."""
    for values, quantile in (([1.0, 4.0], math.tan(math.pi * 0.475)), ([1.0, 2.0, 4.0], 0.95 / math.sqrt(0.04875))):
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        wanted = (mean, mean - quantile * error, mean + quantile * error)
        assert interval(values) == pytest.approx(wanted, rel=3e-4)  # quantiles have four digits


def test_numbers_of_a_run_and_of_the_study() -> None:
    run = of_run(records(2.0, 0.0))
    assert run["reward_first"] == pytest.approx(0.15) and run["reward_last"] == pytest.approx(0.95)
    assert (run["accuracy_before"], run["accuracy_after"], run["seconds"]) == (0.4, 0.8, 20.0)
    assert run["accuracy_mean"] == pytest.approx(0.7)
    summary = summarize(RUNS)["summary"]
    assert summary["speedup"] == [3.0, 3.0, 3.0]
    mean, low, high = summary["difference_reward_mean"]
    assert mean == pytest.approx(0.01) and low < 0.01 < high
    assert summarize(RUNS[:1])["summary"]["speedup"] == [3.0, None, None]


def test_what_is_written_and_drawn(tmp_path: Path) -> None:
    study = {"settings": {"model": "made-up"}, "device": "cpu", "runs": RUNS, **summarize(RUNS)}
    write_results(study, tmp_path / "cpu" / "learning.json")
    written = json.loads((tmp_path / "cpu" / "learning.json").read_text())
    rows = {(row["impl"], row["metric"]): row["value"] for row in written["rows"]}
    assert rows["pronghorn/trl", "speedup"] == 3.0 and rows["trl", "seconds"] == 30.0
    draw(study, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    shown = learning_table.table(study)
    assert "| held-out accuracy before | 40.0% (40.0% to 40.0%) |" in shown and "paired: 3.00" in shown


def test_the_page_s_table_comes_from_the_study() -> None:
    assert learning_table.page() == learning_table.PAGE.read_text(), "run: python -m benchmarks.learning_table"
