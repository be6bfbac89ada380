"""The report page: one HTML file that asks nothing of the network."""

from __future__ import annotations

import json
import os
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from . import plots, samples, words
from .run import Run, load

_HEADLINE = (
    ("accuracy_before", "accuracy before", "{:.1%}"),
    ("accuracy_after", "accuracy after", "{:.1%}"),
    ("reward_last", "reward at the end", "{:.2f}"),
    ("steps", "steps", "{}"),
)


def build(run_dir: str | Path) -> Path:
    """Write ``<run_dir>/report.html`` from what the folder holds and return its path.

    Read are metrics.jsonl (one JSON object a log line, TRL's metric names), completions.jsonl (one a sample: step,
    prompt, completion, rewards, advantage), summary.json, config.json and environment.json, in the folder or in its
    ``checkpoints``. What is missing is said in the page.

    Raises:
        ConfigError: no such folder, or it holds none of the first three.
    """
    run = load(run_dir)
    path = run.folder / "report.html"
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(render(run), encoding="utf-8")
    partial.replace(path)
    return path


def render(run: Run) -> str:
    """The page as text."""
    drawn, absent = plots.figures(run)
    notes = list(run.notes)
    if run.metrics and absent:
        notes.append(f"Not recorded, so not drawn: {'; '.join(absent)}.")
    title = f"Run {run.folder.resolve().name}"
    told = "".join(f"<p>{escape(text)}</p>" for text in words.paragraphs(run.summary))
    sections = [
        f"<header><h1>{escape(title)}</h1>{_headline(run.summary)}</header>",
        _section("What happened", told or "<p>The run recorded no accuracies, so there is nothing to compare.</p>"),
        _section("Plots", f'<div class="plots">{"".join(drawn)}</div>' if drawn else "<p>Nothing to draw.</p>"),
        _section("Sample completions", samples.table(run.completions) if run.completions else "<p>None recorded.</p>"),
        _section("Configuration", _table(run.config, "config.json")),
        _section("Environment", _table(run.environment, "environment.json")),
        _section("Summary", _table(run.summary, "summary.json")),
    ]
    if run.warnings:
        items = "".join(f"<li>Step {escape(str(step))}: {escape(text)}</li>" for step, text in run.warnings)
        sections.insert(1, f'<section class="notes"><h2>Warnings of this run</h2><ul>{items}</ul></section>')
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        sections.insert(1, f'<section class="notes"><h2>Missing from this run</h2><ul>{items}</ul></section>')
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        # Whatever a model wrote, the page runs no script and fetches nothing.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _headline(summary: dict[str, Any]) -> str:
    tiles = []
    for name, label, form in _HEADLINE:
        value = summary.get(name)
        if isinstance(value, int | float):
            tiles.append(f"<div><dt>{label}</dt><dd>{form.format(value)}</dd></div>")
    if isinstance(summary.get("seconds"), int | float):
        tiles.append(f"<div><dt>time</dt><dd>{words.duration(summary['seconds'])}</dd></div>")
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _table(values: dict[str, Any], source: str) -> str:
    if not values:
        return f"<p>The run has no {source}.</p>"
    rows = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>'
        for name, value in values.items()
    )
    return f'<details><summary>{len(values)} entries of {source}</summary><table class="pairs">{rows}</table></details>'


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
