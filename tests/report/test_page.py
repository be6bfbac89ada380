"""The page: everything recorded is in it, nothing outside it is asked for, and gaps are said."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.report import build
from pronghorn.report.record import record
from pronghorn.report.run import load
from pronghorn.report.words import duration, paragraphs

from .made_up import HOSTILE, write_run


class Reader(HTMLParser):
    """Tags, attributes that fetch, ids, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset", "data") and not (value or "").startswith("#"):
                self.fetched.append(f"{tag} {name}={value}")
            if name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(write_run(tmp_path_factory.mktemp("runs") / "made-up")).read_text()


def test_everything_recorded_is_shown(page: str) -> None:
    reader = Reader(page)
    assert reader.tags.count("figure") == reader.tags.count("svg") == 8
    for wanted in (
        "Held-out accuracy before and after", "Reward per step", "Each reward function", "Completion length",
        "KL to the reference", "tokens", "nats per token", "seconds", "optimizer step", "share of 500 problems",
        "strict_format", "Ana buys 3 bags", "Step 40", "loss_type", "dapo", "AMD EPYC", "21.2%", "43.8%", "3 min 21 s",
    ):  # fmt: skip
        assert wanted in reader.text, wanted
    assert "Missing from this run" not in reader.text


def test_the_page_asks_for_nothing_and_runs_nothing(page: str) -> None:
    reader = Reader(page)
    assert reader.fetched == []
    assert not {"script", "img", "link", "iframe", "object", "image"} & set(reader.tags)
    style = "".join(re.findall(r"<style.*?</style>", page, re.DOTALL))
    assert "@import" not in style and not re.search(r"url\((?!#)", page)
    assert "Content-Security-Policy" in page and "default-src 'none'" in page
    assert HOSTILE not in page and HOSTILE in reader.text, "a model's text is shown, never run"


def test_plots_keep_their_ids_apart_and_follow_the_theme(page: str) -> None:
    ids = Reader(page).ids
    assert len(ids) == len(set(ids))
    for target in re.findall(r'(?:url\(|xlink:href=")#([^")]+)', page):
        assert target in ids, f"#{target} points nowhere"
    svg = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--ink)" in svg and "var(--series-1)" in svg
    assert not re.search(r"(?:fill|stroke): #[0-9a-f]{6}", svg), "a fixed colour would vanish in one of the themes"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    assert build(folder).read_bytes() == build(folder).read_bytes()
    assert not list(folder.glob(".report*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl", "summary.json", "config.json"])
def test_a_missing_file_is_said_in_the_page(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", steps=2)
    (folder / name).unlink()
    assert f"{name} is missing" in Reader(build(folder).read_text()).text


def test_a_folder_without_a_run_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds none of metrics.jsonl, completions.jsonl and summary.json"):
        build(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        build(tmp_path / "absent")


def test_half_a_line_nan_and_repeated_steps(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "reward": 1.0}',
        '{"step": 2, "reward": NaN, "kl": "0.1"}',
        '{"step": 3, "reward": 2.0}',
        '{"step": 3, "reward": 3.0}',  # a resumed run logs a step again
        '{"train_runtime": 5.0}',
        '{"step": 4, "rew',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    run = load(tmp_path)
    assert run.series("reward") == ([1.0, 3.0], [1.0, 3.0])
    assert run.series("kl") == ([], [])
    text = Reader(build(tmp_path).read_text()).text
    assert "metrics.jsonl: 1 line could not be read" in text and "Not recorded, so not drawn" in text


def test_files_in_the_checkpoint_folder_are_found(tmp_path: Path) -> None:
    made = write_run(tmp_path / "made", steps=3)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "completions.jsonl"):
        (made / name).rename(folder / "checkpoints" / name)
    (made / "summary.json").rename(folder / "summary.json")
    run = load(folder)
    assert len(run.metrics) == 3 and run.completions and run.summary


def test_chats_and_missing_rewards(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 1?"}]
    sample = {
        "step": 1,
        "prompt": chat,
        "completion": [{"role": "assistant", "content": "2 & <b>"}],
        "rewards": {"a": None, "b": 0.5},
        "advantage": 0.25,
    }
    (tmp_path / "completions.jsonl").write_text(json.dumps(sample))
    page = build(tmp_path).read_text()
    text = Reader(page).text
    assert "What is 1 + 1?" in text and "2 & <b>" in text and "Be brief." not in text
    assert "<dt>a</dt><dd>none</dd><dt>b</dt><dd>+0.50</dd>" in page and '<dt class="total">' not in page


def test_words_follow_the_numbers() -> None:
    base = {"problems": 500, "number_before": 0.40, "accuracy_before": 0.20, "steps": 40, "seconds": 200}
    formatted = " ".join(paragraphs({**base, "accuracy_after": 0.38, "number_after": 0.40}))
    assert "rose from 20.0%" in formatted and "+18.0 points" in formatted and "mostly learned to present" in formatted
    arithmetic = " ".join(paragraphs({**base, "accuracy_after": 0.40, "number_after": 0.80}))
    assert "+20.0 points are arithmetic" in arithmetic and "mostly learned to work out" in arithmetic
    paid = " ".join(paragraphs({**base, "accuracy_after": 0.30, "number_after": 0.32}))
    assert "paid for with arithmetic" in paid
    noise = " ".join(paragraphs({**base, "accuracy_after": 0.22, "number_after": 0.41}))
    assert "intervals overlap" in noise and "intervals overlap" not in formatted
    fell = " ".join(paragraphs({**base, "accuracy_after": 0.10, "number_after": 0.20, "merged_matches": False}))
    assert "fell from" in fell and "DOES NOT" in fell
    assert paragraphs({"steps": 3}) == []
    assert [duration(s) for s in (45.2, 200, 7500)] == ["45 s", "3 min 20 s", "2 h 5 min"]


def test_record_writes_settings_and_machine(tmp_path: Path) -> None:
    record(tmp_path / "run", {"learning_rate": 4e-4, "path": tmp_path})
    (tmp_path / "run" / "summary.json").write_text("{}")
    run = load(tmp_path / "run")
    assert run.config == {"learning_rate": 4e-4, "path": str(tmp_path)}
    assert {"device", "python", "torch", "trl"} <= set(run.environment)
