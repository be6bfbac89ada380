"""What a run did, in plain words: how far accuracy moved, and how much of that is format and how much arithmetic."""

from __future__ import annotations

from typing import Any

from .plots import share_interval
from .stats import Gain, decompose_rates

_MAIN_SHARE = 2 / 3  # a part this large is called the main one
_NOISE = 0.005  # half a point is called no change


def paragraphs(summary: dict[str, Any]) -> list[str]:
    """Plain-text paragraphs for ``summary``; empty where it has no accuracies."""
    if not all(isinstance(summary.get(name), int | float) for name in ("accuracy_before", "accuracy_after")):
        return []
    texts = [_accuracy(summary)]
    gain = recorded_gain(summary)
    if gain is not None:
        texts.append(_split(summary, gain))
    if (rest := _rest(summary)) is not None:
        texts.append(rest)
    return texts


def recorded_gain(summary: dict[str, Any]) -> Gain | None:
    """The split that the run recorded, else that of its shares; None where the shares are not known."""
    known = {name: summary.get(name) for name in ("accuracy_before", "number_before", "accuracy_after", "number_after")}
    if not all(isinstance(value, int | float) for value in known.values()):
        return None
    total = float(summary["accuracy_after"]) - float(summary["accuracy_before"])
    if isinstance(summary.get("gain_format"), int | float) and isinstance(summary.get("gain_arithmetic"), int | float):
        return Gain(total, float(summary["gain_format"]), float(summary["gain_arithmetic"]))
    before, after = float(summary["accuracy_before"]), float(summary["accuracy_after"])
    # What is right in the tags is a right number, even where a looser grader did not find it.
    return decompose_rates(
        before, max(before, float(summary["number_before"])), after, max(after, float(summary["number_after"]))
    )


def _accuracy(summary: dict[str, Any]) -> str:
    before, after = float(summary["accuracy_before"]), float(summary["accuracy_after"])
    intervals = [share_interval(summary, name) for name in ("accuracy_before", "accuracy_after")]
    shown = [_with_interval(share, interval) for share, interval in zip((before, after), intervals, strict=True)]
    verb = "rose" if after - before > _NOISE else "fell" if before - after > _NOISE else "stayed"
    problems = f" on {summary['problems']} held-out problems" if summary.get("problems") else ""
    text = (
        f"Accuracy{problems}, the right number inside the answer tags, {verb} from {shown[0]} to {shown[1]}: "
        f"{_points(after - before)}."
    )
    if intervals[0] and intervals[1] and intervals[0][1] >= intervals[1][0] and intervals[1][1] >= intervals[0][0]:
        text += " The intervals overlap, so this difference alone does not show that the model changed."
    return text


def _split(summary: dict[str, Any], gain: Gain) -> str:
    text = (
        f"Of these, {_points(gain.format)} are format (right numbers put inside the tags more often) and "
        f"{_points(gain.arithmetic)} are arithmetic (more numbers right). "
        f"The right number in whatever format went from {summary['number_before']:.1%} to "
        f"{summary['number_after']:.1%}."
    )
    if abs(gain.total) <= _NOISE:
        return text
    if gain.arithmetic < -_NOISE < _NOISE < gain.total:
        return f"{text} All of the gain is format, and part of it was paid for with arithmetic."
    if gain.format / gain.total >= _MAIN_SHARE:
        return f"{text} So the model mostly learned to present answers that it could already work out."
    if gain.arithmetic / gain.total >= _MAIN_SHARE:
        return f"{text} So the model mostly learned to work out more of the answers."
    return f"{text} Both matter."


def _rest(summary: dict[str, Any]) -> str | None:
    parts = []
    if all(isinstance(summary.get(name), int | float) for name in ("reward_first", "reward_last")):
        parts.append(f"The mean reward went from {summary['reward_first']:.2f} to {summary['reward_last']:.2f}")
    if isinstance(summary.get("steps"), int) and isinstance(summary.get("seconds"), int | float):
        ending = (
            f" over {summary['steps']} optimizer steps" if parts else f"The run took {summary['steps']} optimizer steps"
        )
        parts.append(f"{ending}; the whole run took {duration(float(summary['seconds']))}")
    text = "".join(parts) + "." if parts else ""
    if "merged_matches" in summary:
        verdict = "answers as" if summary["merged_matches"] else "DOES NOT answer as"
        text += f" The merged model, reloaded, {verdict} the original with the saved adapter does."
    return text.strip() or None


def duration(seconds: float) -> str:
    """Seconds as text: ``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _with_interval(share: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return f"{share:.1%}"
    return f"{share:.1%} (95% interval {interval[0] * 100:.1f} to {interval[1] * 100:.1f})"


def _points(share: float) -> str:
    return f"{share * 100:+.1f} points"
