"""The choice: of all ways to spread levels over the layers, the fastest that fits, or the smallest that costs little.

Layers are alike, so a plan is a count of layers for each (level, place), and all counts are scored at once. Layers lie
in the order of :data:`OPTIONS`: what is offloaded first, as it has the whole forward pass to leave and the whole
backward pass to come back; what stays last, as its backward begins first. The last layer is never offloaded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..keep import Keep
from . import constants as c
from .card import Card
from .cost import Seconds, layer_seconds
from .plan import LayerPlan, TrainingPlan
from .shape import ModelShape
from .sizes import Sizes, layer_sizes

OPTIONS = tuple(LayerPlan(keep, host) for host in (True, False) for keep in Keep)
"""What a layer may do, in the order in which the layers of a plan lie."""

Floats = NDArray[np.float64]

_TRIPLE_GRID = 16


class CannotFit(Exception):
    """No plan fits; ``smallest`` is the plan with the least peak."""

    def __init__(self, smallest: TrainingPlan) -> None:
        super().__init__(f"the smallest plan takes {smallest.peak_bytes} bytes")
        self.smallest = smallest


class _Scored(NamedTuple):
    """Plans of one tile and cache, a row each: counts, peak bytes, that with its uncertainty, seconds, bytes kept on
    the host and on the GPU."""

    mlp_rows: int | None
    cached: bool
    counts: Floats
    peak: Floats
    needed: Floats
    seconds: Floats
    host: Floats
    resident: Floats


def choose(
    shape: ModelShape,
    card: Card,
    tokens: int,
    length: float,
    budget_bytes: int,
    host_budget_bytes: int,
    mode: str,
    held_bytes: int | None = None,
    limit_bytes: int | None = None,
) -> TrainingPlan:
    """The plan of a training step.

    Args:
        tokens: packed tokens.
        length: sum of squared row lengths over their sum (the row length, where rows are equal).
        budget_bytes: the peak must not be over this; it counts ``held_bytes`` too.
        host_budget_bytes: pinned memory that offloading may take.
        mode: "auto" takes the fastest that fits (of equals the smallest); "memory" the smallest that costs at most
            :data:`constants.MEMORY_SLACK` over the fastest that keeps next to nothing on the GPU; "off" keeps
            everything, whether or not it fits.
        held_bytes: what lies on the GPU before the step; by default what the shape says.
        limit_bytes: the memory that the plan's line names as what there is; by default the card's.

    Raises:
        CannotFit: "auto" or "memory", and no plan fits.
    """
    held = shape.fixed_bytes if held_bytes is None else held_bytes
    made = _Maker(shape, card, tokens, limit_bytes or card.total_bytes, mode)
    off = _off(made, length, budget_bytes, held)
    if mode == "off" or (mode == "auto" and off.fits and off.cached_weights is bool(shape.cached_bytes)):
        return off  # nothing is faster than nothing recomputed
    matrix = _counts(shape.layers, shape.fused and host_budget_bytes > 0, shape.fused)
    tiles = [None, *(rows for rows in c.TILE_ROWS if rows < tokens)] if shape.fused else [None]
    caches = [False, True] if mode == "auto" and shape.cached_bytes else [False]
    runs = [_score(shape, card, tokens, length, rows, cached, matrix, held) for rows in tiles for cached in caches]
    runs = [_only(run, run.host <= host_budget_bytes) for run in runs]
    fitting = [_only(run, run.needed <= budget_bytes) for run in runs]
    if not any(len(run.peak) for run in fitting):
        raise CannotFit(made.plan(*_best(runs, first="peak"), fits=False))
    if mode == "auto":
        return made.plan(*_best(fitting, first="seconds"))
    little = min(float(run.resident.min()) for run in runs) + layer_sizes(shape, tokens, None, False).kept[Keep.ALL]
    reference = min(float(run.seconds[run.resident <= little].min()) for run in runs)
    cheap = [_only(run, run.seconds <= (1 + c.MEMORY_SLACK) * reference) for run in fitting]
    if any(len(run.peak) for run in cheap):
        lowest = min(float(run.peak.min()) for run in cheap if len(run.peak))
        equal = [_only(run, run.peak <= (1 + c.PEAK_EQUAL) * lowest) for run in cheap]
        return made.plan(*_best(equal, first="seconds"))
    return made.plan(*_best(fitting, first="seconds"))


def _off(made: _Maker, length: float, budget: int, held: int) -> TrainingPlan:
    """Everything kept on the GPU; the base in 16 bits too, where that fits."""
    shape = made.shape
    counts = np.zeros((1, len(OPTIONS)))
    counts[0, OPTIONS.index(LayerPlan(Keep.ALL))] = shape.layers
    run = _score(shape, made.card, made.tokens, length, None, False, counts, held)
    if shape.cached_bytes:
        cached = _score(shape, made.card, made.tokens, length, None, True, counts, held)
        run = cached if float(cached.needed[0]) <= budget else run
    return made.plan(run, 0, fits=float(run.needed[0]) <= budget)


def _best(runs: list[_Scored], first: str) -> tuple[_Scored, int]:
    """The row with the least (``first``, the other of peak and seconds); the earliest of equals."""
    best: tuple[tuple[float, float], _Scored, int] | None = None
    for run in runs:
        if not len(run.peak):
            continue
        main, other = (run.seconds, run.peak) if first == "seconds" else (run.peak, run.seconds)
        lowest = main.min()
        row = int(np.where(main == lowest, other, np.inf).argmin())
        score = (float(main[row]), float(other[row]))
        if best is None or score < best[0]:
            best = (score, run, row)
    assert best is not None
    return best[1], best[2]


def _only(run: _Scored, rows: NDArray[np.bool_]) -> _Scored:
    return run._replace(**{name: getattr(run, name)[rows] for name in _Scored._fields[2:]})


class _Maker:
    """From a row of counts to a :class:`TrainingPlan`."""

    def __init__(self, shape: ModelShape, card: Card, tokens: int, limit: int, mode: str) -> None:
        self.shape, self.card, self.tokens, self.limit, self.mode = shape, card, tokens, limit, mode

    def plan(self, run: _Scored, row: int, fits: bool = True) -> TrainingPlan:
        counts = [int(n) for n in run.counts[row].tolist()]
        return TrainingPlan(
            tuple(option for option, n in zip(OPTIONS, counts) for _ in range(n)),
            run.mlp_rows,
            run.cached,
            self.tokens,
            int(run.peak[row]),
            float(run.seconds[row]),
            self.mode,
            host_bytes=int(run.host[row]),
            card=self.card.name,
            total_bytes=self.limit,
            estimated=not self.card.measured,
            fits=fits,
        )


@lru_cache(maxsize=16)
def _counts(layers: int, host: bool, fused: bool) -> Floats:
    """Ways to spread ``layers`` over at most three options, the last layer on the GPU, ``[M, options]`` float64.

    Two options take every split; three take a grid of about :data:`_TRIPLE_GRID` and the single last layer.
    """
    usable = [
        i for i, option in enumerate(OPTIONS)
        if (host or not option.host) and (fused or option.keep in (Keep.INPUT, Keep.ALL))
    ]  # fmt: skip
    step = max(1, -(-layers // _TRIPLE_GRID))
    grid = sorted({1, *range(step, layers, step)})
    rows: list[dict[int, int]] = []
    for at, last in enumerate(usable):
        if OPTIONS[last].host:
            continue
        rows.append({last: layers})
        for first in usable[:at]:
            rows += [{first: layers - n, last: n} for n in range(1, layers)]
        for high, middle in enumerate(usable[:at]):
            for first in usable[:high]:
                rows += [{first: layers - m - n, middle: m, last: n} for n in grid for m in grid if m + n < layers]
    counts = np.zeros((len(rows), len(OPTIONS)))
    for at, row in enumerate(rows):
        for option, n in row.items():
            counts[at, option] = n
    return counts


def _score(
    shape: ModelShape,
    card: Card,
    tokens: int,
    length: float,
    mlp_rows: int | None,
    cached: bool,
    counts: Floats,
    held: int,
) -> _Scored:
    """Peak, seconds and host bytes of every row of ``counts``."""
    sizes = layer_sizes(shape, tokens, mlp_rows, cached)
    times = layer_seconds(shape, card, tokens, length, mlp_rows, cached)
    usable = [option.keep in sizes.kept for option in OPTIONS]
    kept = _column([sizes.kept.get(option.keep, 0) for option in OPTIONS])
    away = _column([float(option.host) for option in OPTIONS])
    assert all(ok or not counts[:, i].any() for i, ok in enumerate(usable))
    base = held + sizes.step + (shape.cached_bytes if cached else 0)
    resident = counts @ (kept * (1 - away))
    peak = base + _peak(shape, sizes, counts, kept, away, resident)
    seconds = times.head + times.rest + counts @ _layer_seconds(card, times, kept, away)
    needed = peak + c.PEAK_UNCERTAINTY * (peak - base)
    return _Scored(mlp_rows, cached, counts, peak, needed, seconds, counts @ (kept * away), resident)


def _layer_seconds(card: Card, times: Seconds, kept: Floats, away: Floats) -> Floats:
    """Seconds of a layer in each option: computing or copying, whichever is longer, in forward and in backward."""
    again = _column([times.again.get(option.keep, 0.0) for option in OPTIONS])
    copying = away * kept / card.link
    contended = away * kept / card.copy  # the copy takes memory bandwidth from what is computing
    return np.maximum(times.forward + contended, copying) + np.maximum(times.backward + again + contended, copying)


def _peak(
    shape: ModelShape,
    sizes: Sizes,
    counts: Floats,
    kept: Floats,
    away: Floats,
    resident: Floats,
) -> Floats:
    """Bytes over what is held: the widest moment of forward, head and backward.

    Within one option the bytes change evenly from layer to layer (fewer layers kept, more gradients made), so the
    widest layer is the first or the last of its option.
    """
    here = kept * (1 - away)
    gradient = shape.layer_gradient_bytes
    behind = counts.cumsum(axis=1)  # layers up to and with this option
    before = behind - counts
    bytes_behind = (counts * here).cumsum(axis=1)
    bytes_before = bytes_behind - counts * here
    offloaded = ((counts > 0) * (kept * away)).max(axis=1)
    leaving, coming = c.OFFLOADS_LEAVING * offloaded, c.OFFLOADS_COMING * offloaded
    flight = np.where(away > 0, coming[:, None], leaving[:, None])  # before the first comes back, some still leave
    widest = resident + sizes.head + leaving
    present = counts > 0
    backward = _column([sizes.backward.get(option.keep, 0) for option in OPTIONS])
    for layers_below, bytes_below in ((behind - 1, bytes_behind - here), (before, bytes_before)):
        made = (shape.layers - layers_below) * gradient
        moment = bytes_below + backward + made + flight
        widest = np.maximum(widest, np.where(present, moment, 0.0).max(axis=1))
    forward_widest = _column([sizes.forward.get(option.keep, 0) for option in OPTIONS])
    forward = np.where(present, bytes_behind - here + forward_widest, 0.0).max(axis=1) + leaving
    return np.maximum(widest, forward)


def _column(values: list[float] | list[int]) -> Floats:
    return np.array(values, dtype=np.float64)
