"""The plots of a report: which metrics, on which axes, in which units."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator, PercentFormatter

from .figure import MUTED, PAPER, SERIES, inline_svg
from .run import Run
from .stats import wilson_interval

_SMOOTHED_FROM = 60  # with more steps than this the line is a moving average and the values lie behind it
_MOST_SERIES = len(SERIES)

# name, caption, y label, {metric: label}
_OVER_STEPS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("length", "Completion length", "tokens", {"completions/mean_length": "mean length"}),
    (
        "drift",
        "Distance between policies: KL to the reference, and trainer against sampler",
        "nats per token",
        {
            "kl": "KL to the reference",
            "sampling/sampling_logp_difference/mean": "|log-prob difference|, mean",
            "sampling/sampling_logp_difference/max": "|log-prob difference|, max",
        },
    ),
    ("entropy", "Entropy of the policy", "nats per token", {"entropy": "entropy"}),
    ("loss", "Loss", "loss", {"loss": "loss"}),
    ("time", "Time of a step", "seconds", {"step_time": "step time"}),
)


def figures(run: Run) -> tuple[list[str], list[str]]:
    """(``<figure>`` elements, captions of the plots that the run recorded nothing for)."""
    drawn: list[str] = []
    absent: list[str] = []
    measured = [accuracy_over_steps(run)] if run.names("eval_accuracy") else []  # not every run is asked for it
    candidates = [accuracy(run), *measured, reward(run), reward_functions(run)]
    for name, caption, unit, metrics in _OVER_STEPS:
        candidates.append((caption, _over_steps(run, name, caption, unit, metrics)))
    for caption, svg in candidates:
        if svg is None:
            absent.append(caption)
        else:
            drawn.append(f"<figure><figcaption>{html.escape(caption)}</figcaption>{svg}</figure>")
    return drawn, absent


def accuracy(run: Run) -> tuple[str, str | None]:
    """Held-out accuracy before and after, with 95% Wilson intervals."""
    caption = "Held-out accuracy before and after, with 95% intervals"
    rows = [
        (label, share, share_interval(run.summary, name))
        for name, label in (
            ("accuracy_before", "in the answer tags, before"),
            ("accuracy_after", "in the answer tags, after"),
            ("number_before", "in any format, before"),
            ("number_after", "in any format, after"),
        )
        if isinstance(share := run.summary.get(name), int | float)
    ]
    if not rows:
        return caption, None

    def draw(axes: Any) -> None:
        for place, (label, share, interval) in enumerate(reversed(rows)):
            color = SERIES[0] if "tags" in label else SERIES[1]
            if interval is not None:
                axes.plot(interval, [place, place], color=color, linewidth=2.5, solid_capstyle="round")
            fill = PAPER if label.endswith("before") else color
            axes.plot(share, place, "o", markersize=8, color=color, markerfacecolor=fill, markeredgewidth=2)
            axes.annotate(f"{share:.1%}", (share, place), (0, 8), textcoords="offset points", ha="center", fontsize=10)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(rows) - 0.3)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        problems = run.summary.get("problems")
        axes.set_xlabel(f"share of {problems} problems" if problems else "share of the problems")

    return caption, inline_svg("accuracy", caption, draw)


def accuracy_over_steps(run: Run) -> tuple[str, str | None]:
    """Held-out accuracy where it was measured during training, with its 95% interval, and pass@k and maj@k."""
    caption = "Held-out accuracy during training (band: 95% interval)"
    steps, shares = run.series("eval_accuracy")
    if not steps:
        return caption, None
    low, high = (dict(zip(*run.series(f"eval_accuracy_{end}"), strict=True)) for end in ("low", "high"))
    others = [*run.names("eval_pass@"), *run.names("eval_maj@")][: _MOST_SERIES - 1]

    def draw(axes: Any) -> None:
        known = [step for step in steps if step in low and step in high]
        if known:
            band = [low[step] for step in known], [high[step] for step in known]
            axes.fill_between(known, *band, color=SERIES[0], alpha=0.15, linewidth=0)
        _line(axes, steps, shares, SERIES[0], "accuracy")
        for color, name in zip(SERIES[1:], others, strict=False):
            _line(axes, *run.series(name), color, name.removeprefix("eval_"))
        _step_axes(axes, "share of the problems")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if others:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9.5, borderaxespad=0.2)

    return caption, inline_svg("accuracy-steps", caption, draw)


def share_interval(summary: dict[str, Any], name: str) -> tuple[float, float] | None:
    """The 95% interval of the share ``name``: the one recorded, else Wilson's from the number of problems."""
    given = summary.get(f"{name}_ci")
    if isinstance(given, Sequence) and len(given) == 2:
        return float(given[0]), float(given[1])
    problems = summary.get("problems")
    if not isinstance(problems, int) or problems < 1:
        return None
    return wilson_interval(round(summary[name] * problems), problems)


def reward(run: Run) -> tuple[str, str | None]:
    """Mean reward with a band of one standard deviation."""
    caption = "Reward per step (band: one standard deviation)"
    steps, means = run.series("reward")
    if not steps:
        return caption, None
    spread = dict(zip(*run.series("reward_std"), strict=True))

    def draw(axes: Any) -> None:
        known = [(step, mean, spread[step]) for step, mean in zip(steps, means, strict=True) if step in spread]
        if known:
            low, high = [mean - std for _, mean, std in known], [mean + std for _, mean, std in known]
            axes.fill_between([step for step, _, _ in known], low, high, color=SERIES[0], alpha=0.15, linewidth=0)
        _line(axes, steps, means, SERIES[0], "mean reward")
        _step_axes(axes, "reward (points)")

    return caption, inline_svg("reward", caption, draw)


def reward_functions(run: Run) -> tuple[str, str | None]:
    """The mean of each reward function."""
    caption = "Each reward function"
    names = run.names("rewards/", "/mean")
    shown = {name: short_name(name) for name in names[:_MOST_SERIES]}
    if len(names) > _MOST_SERIES:
        caption += f" (the first {_MOST_SERIES} of {len(names)})"
    return caption, _over_steps(run, "functions", caption, "reward (points)", shown)


def short_name(reward: str) -> str:
    """``rewards/int_reward_func/mean`` and ``int_reward_func`` as ``int``."""
    bare = reward.removeprefix("rewards/").removesuffix("/mean")
    return bare.removesuffix("_reward_func") or bare


def _over_steps(run: Run, name: str, caption: str, unit: str, metrics: dict[str, str]) -> str | None:
    series = [(label, *run.series(metric)) for metric, label in metrics.items()]
    series = [(label, steps, values) for label, steps, values in series if steps]
    if not series:
        return None

    def draw(axes: Any) -> None:
        for index, (label, steps, values) in enumerate(series):
            _line(axes, steps, values, SERIES[index], label)
        _step_axes(axes, unit)
        if len(series) > 1:
            columns = 2 if len(series) > 2 else len(series)
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9.5, borderaxespad=0.2)

    rows = (len(series) + 1) // 2 if len(series) > 1 else 0
    return inline_svg(name, caption, draw, (6.2, 3.1 + 0.2 * rows))


def _line(axes: Any, steps: list[float], values: list[float], color: str, label: str) -> None:
    if len(steps) <= _SMOOTHED_FROM:
        marker = {"marker": "o", "markersize": 3} if len(steps) <= 30 else {}
        axes.plot(steps, values, color=color, label=label, **marker)
        return
    half = max(1, len(steps) // 40)
    means = []
    for index in range(len(values)):
        window = values[max(0, index - half) : index + half + 1]
        means.append(sum(window) / len(window))
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, means, color=color, label=label)


def _step_axes(axes: Any, unit: str) -> None:
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.tick_params(color=MUTED)
