"""The learning study: its numbers on made-up runs, plot and tables; turns, what is cut off, and a run in small."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import learning, learning_table
from benchmarks.learning_plots import draw
from benchmarks.learning_study import TINY, Study
from benchmarks.learning_summary import interval, of_run, summarize, write_results
from pronghorn.config.errors import ConfigError


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


def kinds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs, with a held-out kind at each evaluation: a tenth less than all of it."""
    made = json.loads(json.dumps(runs))
    for run in made:
        for side in run["sides"].values():
            for record in side:
                if "accuracy" in record:
                    record["heldout/chains"] = record["accuracy"] - 0.1
    return made


def test_kinds_of_problems_and_one_side_alone() -> None:
    summary = summarize(kinds(RUNS))["summary"]
    assert summary["trl"]["heldout/chains/before"][0] == pytest.approx(0.3)
    assert summary["trl"]["heldout/chains/after"][0] == pytest.approx(0.7)
    assert summary["difference_heldout/chains/after"][0] == pytest.approx(0.01)
    assert summary["speedup_median"] == [3.0, 3.0, 3.0]
    alone = summarize([{"seed": 0, "sides": {"pronghorn": records(1.0, 0.0)}}])["summary"]
    assert set(alone) == {"pronghorn"}


def options(folder: Path, *given: str) -> dict[str, Any]:
    made = vars(learning.arguments(["--output", str(folder), "--results", str(folder / "results"), *given]))
    del made["commit"]
    return made


def test_presets_give_way_to_what_is_given() -> None:
    larger = learning.arguments(["--preset", "larger", "--steps", "7"])
    assert (larger.data, larger.device, larger.prompts, larger.steps) == ("mixed", "cuda", 16, 7)
    plain = learning.arguments([])
    assert (plain.model, plain.device, plain.steps, plain.learning_rate) == (str(TINY), "cpu", 50, 3e-4)
    assert Path(learning.arguments(["--preset", "shipped-gpu"]).model) == TINY


class MadeUp:
    """Two sides without processes: ten steps a seed, no time at all."""

    names = ("pronghorn", "trl")

    def __init__(self) -> None:
        self.left: dict[str, list[Any]] = {}
        self.said: list[tuple[str, Any]] = []

    def say(self, name: str, what: Any) -> None:
        self.said.append((name, what))
        if what != "go":
            seed, _ = what
            self.left[name] = ["loaded", *kinds(RUNS)[seed]["sides"][name], None]

    def hear(self, name: str) -> Any:
        return self.left[name].pop(0)


def test_turns_are_taken_step_by_step_and_every_seed_is_written(tmp_path: Path) -> None:
    study = Study(options(tmp_path, "--seeds", "0,1,2"), "cpu", "a processor", "abc")
    sides = MadeUp()
    learning.run_seeds(sides, [0, 1, 2], study, tmp_path, None)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "learning-cpu.json").read_text())
    assert [run["seed"] for run in written["runs"]] == [0, 1, 2] and "unfinished" not in written
    assert written["runs"] == kinds(RUNS) and written["summary"] == summarize(kinds(RUNS))["summary"]
    assert (tmp_path / "learning-cpu.png").is_file() and (tmp_path / "results" / "cpu" / "learning.json").is_file()
    turns = [name for name, what in sides.said if what == "go"]
    assert turns == ["pronghorn", "trl"] * 36  # steps 0 to 10, and the end, of three seeds


def test_a_study_that_is_cut_off_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(learning.time, "monotonic", lambda: float(next(clock)))
    study = Study(options(tmp_path, "--model", str(tmp_path / "other")), "cpu", "a processor", "abc")
    learning.run_seeds(MadeUp(), [0, 1, 2], study, tmp_path, 16.0)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "learning-other-cpu.json").read_text())
    assert [run["seed"] for run in written["runs"]] == [0], "13 ticks for the first seed, no 0.9 of them left after it"
    learning.run_seeds(MadeUp(), [1], study, tmp_path, 5.0)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "learning-other-cpu.json").read_text())
    assert [run["seed"] for run in written["runs"]] == [0] and written["summary"]["speedup"] == [3.0, None, None]
    unfinished = written["unfinished"]
    assert unfinished["seed"] == 1 and 1 < len(unfinished["sides"]["trl"]) < 11


def test_seeds_are_added_only_to_a_study_of_the_same_settings(tmp_path: Path) -> None:
    def add(*given: str) -> None:
        study = Study(options(tmp_path, *given), "cpu", "a processor", "abc")
        learning.run_seeds(MadeUp(), [int(given[1])], study, tmp_path, None)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"--add: there is no .*learning-cpu.json"):
        add("--seeds", "0", "--add")
    add("--seeds", "0")
    add("--seeds", "2", "--add")
    written = json.loads((tmp_path / "learning-cpu.json").read_text())
    assert [run["seed"] for run in written["runs"]] == [0, 2] and written["settings"]["seeds"] == "0,2"
    with pytest.raises(ConfigError, match=r"--add: learning-cpu.json has steps=50 in its settings and this study 9"):
        add("--seeds", "1", "--add", "--steps", "9")


def test_a_study_on_a_gpu_gets_a_section_of_its_own(tmp_path: Path) -> None:
    study = Study(options(tmp_path, "--model", str(tmp_path / "other")), "nvidia-x", "NVIDIA X", "abc")
    study.found["pretraining"] = {
        "parameters": 55e6, "tokens": 5e7, "seconds": 80.0, "steps": 800, "tokens_per_s": 625000,
        "sampled_accuracy": [[700, 0.31], [800, 0.44]],
    }  # fmt: skip
    learning.run_seeds(MadeUp(), [0, 1], study, tmp_path, None)  # type: ignore[arg-type]
    text = learning_table.page("# Page\n", studies=tmp_path)
    assert text.startswith("# Page\n\n<!-- learning-other-nvidia-x:begin -->\n## other, on one NVIDIA X\n")
    assert "55M parameters, trained from random weights on 50M tokens in 80 s" in text and "44%" in text
    assert "| held-out, three to six steps, after |" in text and "under load" not in text
    assert "| seconds of all steps | 10 (10 to 10) | 30 (30 to 30) |" in text
    assert learning_table.page(text + "\nWords below.\n", studies=tmp_path) == text + "\nWords below.\n"


def test_a_study_in_small(tmp_path: Path) -> None:
    """Both sides, two seeds in the same processes, on the CPU."""
    for split, count in (("train", 60), ("test", 8)):
        rows = [{"question": f"{split}: what is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}
                for i in range(count)]  # fmt: skip
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = "--data mixed --steps 2 --prompts 2 --generations 2 --max-completion-length 8 --problems 8 --eval-every 1"
    where = ["--gsm8k", str(tmp_path), "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    learning.main([*where, *f"{sizes} --train-problems 12 --seeds 3,4 --commit abc".split()])
    written = json.loads((tmp_path / "out" / "learning-cpu.json").read_text())
    assert [run["seed"] for run in written["runs"]] == [3, 4] and written["commit"] == "abc"
    for run in written["runs"]:
        ours, trl = run["sides"]["pronghorn"], run["sides"]["trl"]
        assert ours[0] == trl[0], "the same model before training"
        assert [record["step"] for record in ours] == [record["step"] for record in trl] == [0, 1, 2]
        assert all(record["seconds"] > 0 for side in (ours, trl) for record in side[1:])
        assert {"heldout/number", "heldout/words", "heldout/chains", "heldout/gsm8k"} <= set(ours[-1])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["learning-cpu.json", "learning-cpu.png"]
