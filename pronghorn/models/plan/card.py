"""What a GPU does in a second: a table of cards, and an estimate for one that is not in it.

Rates are the datasheet's times the share of its own datasheet that the H200 reaches (``constants.py``): measured for
the H200, an estimate for every other card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...config.errors import ConfigError, nearest
from .constants import ATTENTION_BACKWARD_SHARE, ATTENTION_FORWARD_SHARE, COPY_SHARE, GIB, LINK_SHARE, MATRIX_SHARE

Curve = tuple[tuple[int, float], ...]
"""(row length, FLOP/s), in rising order."""


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: as in the table, or as torch calls it.
        total_bytes: its memory, as torch reports it.
        matrix: FLOP/s of a large 16-bit matrix product.
        attention_forward, attention_backward: FLOP/s of causal attention over rows of a length.
        copy: bytes/s read plus written by a device copy.
        link: bytes/s between pinned host memory and the GPU, each way.
        measured: the rates were measured on this card, not scaled.
    """

    name: str
    total_bytes: int
    matrix: float
    attention_forward: Curve
    attention_backward: Curve
    copy: float
    link: float
    measured: bool = False

    def attention_rate(self, length: float, backward: bool = False) -> float:
        """FLOP/s of attention over rows of ``length``, between the curve's points linear in the logarithm."""
        curve = self.attention_backward if backward else self.attention_forward
        (low, at_low), (_, at_high) = curve[0], curve[-1]
        if length <= low:
            return at_low * max(length, 1) / low  # short rows do not fill the card
        for (a, ya), (b, yb) in zip(curve, curve[1:]):
            if length <= b:
                return ya + (yb - ya) * math.log(length / a) / math.log(b / a)
        return at_high


def _card(name: str, gib: float, tflops: float, tb_s: float, link_gb_s: float, measured: bool = False) -> Card:
    """From datasheet numbers: memory as torch shows it, dense bf16 FLOP with float32 sums, the link one way."""
    flops = tflops * 1e12
    return Card(
        name,
        int(gib * GIB),
        flops * MATRIX_SHARE,
        tuple((n, flops * share) for n, share in ATTENTION_FORWARD_SHARE),
        tuple((n, flops * share) for n, share in ATTENTION_BACKWARD_SHARE),
        tb_s * 1e12 * COPY_SHARE,
        link_gb_s * 1e9 * LINK_SHARE,
        measured,
    )


# Datasheets: NVIDIA's data sheets of each card; GeForce: float32 sums, which halve the rate (Ada and Ampere white
# papers). PCIe 5, 4, 3 with 16 lanes: 63, 31.5, 15.75 GB/s. First match in torch's device name wins.
_TABLE: tuple[tuple[str, Card], ...] = (
    ("H200", _card("H200", 139.8, 989, 4.8, 63, measured=True)),
    ("H100 PCIe", _card("H100 PCIe", 79.1, 756, 2.0, 63)),
    ("H100 NVL", _card("H100 NVL", 93.1, 835, 3.9, 63)),
    ("H100", _card("H100", 79.1, 989, 3.35, 63)),
    ("A100-SXM4-40GB", _card("A100-40GB", 39.4, 312, 1.555, 31.5)),
    ("A100-PCIE-40GB", _card("A100-40GB", 39.4, 312, 1.555, 31.5)),
    ("A100-40GB", _card("A100-40GB", 39.4, 312, 1.555, 31.5)),
    ("A100", _card("A100", 79.1, 312, 2.039, 31.5)),
    ("L40S", _card("L40S", 44.4, 362, 0.864, 31.5)),
    ("RTX 4090", _card("4090", 23.6, 165, 1.008, 31.5)),
    ("RTX 3090", _card("3090", 23.6, 71, 0.936, 31.5)),
    ("NVIDIA L4", _card("L4", 22.0, 121, 0.3, 31.5)),
    ("Tesla T4", _card("T4", 14.6, 65, 0.32, 15.75)),
)

# Dense FLOP in a cycle of one multiprocessor, 16-bit with float32 sums, by compute capability.
_PER_CYCLE = {(7, 0): 1024, (7, 5): 1024, (8, 0): 2048, (8, 6): 1024, (8, 9): 1024, (9, 0): 4096, (10, 0): 8192,
              (10, 3): 8192, (12, 0): 1024}  # fmt: skip
_LINK_GB_S = {7: 15.75, 8: 31.5}  # PCIe 3 and 4; later ones have PCIe 5


def known_cards() -> list[str]:
    """The names that :func:`card_named` takes."""
    return sorted({card.name for _, card in _TABLE})


def card_named(name: str) -> Card:
    """The card that ``name`` means: "H200", or torch's own "NVIDIA H200".

    Raises:
        ConfigError: it is not in the table; the message lists what is.
    """
    found = _look_up(name) or {card.name.lower(): card for _, card in _TABLE}.get(str(name).lower())
    if found is None:
        close = nearest(str(name), known_cards())
        hint = f"did you mean {close!r}?" if close else f"give one of {', '.join(known_cards())}, or None for this GPU"
        raise ConfigError(f"plan: gpu={name!r} is not in the table; {hint}")
    return found


def _look_up(name: str) -> Card | None:
    return next((card for part, card in _TABLE if part.lower() in str(name).lower()), None)


def card_of(properties: Any) -> Card:
    """The card with these ``torch.cuda.get_device_properties``; one that is not in the table is estimated.

    The estimate is multiprocessors x FLOP a cycle x clock, and bus width x memory clock, where torch exposes them.
    """
    found = _look_up(properties.name)
    if found is not None:
        return Card(**{**vars(found), "name": properties.name, "total_bytes": int(properties.total_memory)})
    capability = (properties.major, properties.minor)
    per_cycle = _PER_CYCLE.get(capability, 4096 if properties.major >= 9 else 1024)
    if "GeForce" in properties.name and capability in ((8, 6), (8, 9), (12, 0)):
        per_cycle //= 2  # float32 sums at half rate
    clock = 1e3 * (getattr(properties, "clock_rate", 0) or 1_600_000)  # torch has kHz
    bus = getattr(properties, "memory_bus_width", 0) / 8
    memory_clock = 1e3 * getattr(properties, "memory_clock_rate", 0)
    tflops = properties.multi_processor_count * per_cycle * clock / 1e12
    # Without a memory clock: the H200's ratio of bytes to FLOP.
    tb_s = 2 * bus * memory_clock / 1e12 if bus and memory_clock else tflops * 4.8 / 989
    gib = properties.total_memory / GIB
    return _card(properties.name, gib, tflops, tb_s, _LINK_GB_S.get(properties.major, 63))
