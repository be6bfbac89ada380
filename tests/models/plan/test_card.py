"""Cards by name, by what torch says of them, and by estimate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pronghorn import ConfigError
from pronghorn.models.plan import card_named, card_of, known_cards


def properties(name: str, **more: object) -> SimpleNamespace:
    return SimpleNamespace(**{"name": name, "total_memory": 80 << 30, "major": 9, "minor": 0, **more})


def test_the_table_has_the_cards_and_only_the_h200_is_measured() -> None:
    for name in ("H200", "H100", "A100", "L4", "4090", "3090", "T4"):
        card = card_named(name)
        assert card.measured == (name == "H200")
        assert card.link < card.copy and card.matrix > 1e13 and card.total_bytes > 10 << 30
    assert set(known_cards()) >= {"H200", "T4"}


@pytest.mark.parametrize(
    "torch_name, name",
    [
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-SXM4-40GB", "A100-40GB"), ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", "4090"), ("NVIDIA GeForce RTX 3090", "3090"),
        ("Tesla T4", "T4"),
    ],
)  # fmt: skip
def test_torchs_names_find_their_card_with_the_memory_that_is_there(torch_name: str, name: str) -> None:
    card = card_of(properties(torch_name))
    assert card.matrix == card_named(name).matrix and card.copy == card_named(name).copy
    assert card.name == torch_name and card.total_bytes == 80 << 30


def test_an_unknown_card_is_estimated_near_what_the_datasheet_of_a_known_one_says() -> None:
    twin = card_of(properties(
        "NVIDIA Unheard", multi_processor_count=132, clock_rate=1_830_000, memory_bus_width=5120,
        memory_clock_rate=2_619_000,
    ))  # fmt: skip
    assert not twin.measured
    assert twin.matrix == pytest.approx(card_named("H100").matrix, rel=0.02)
    assert twin.copy == pytest.approx(card_named("H100").copy, rel=0.02)
    bare = card_of(properties("NVIDIA Unheard", multi_processor_count=132))
    assert 0.5 < bare.copy / card_named("H200").copy < 2


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"gpu='H201'.*did you mean 'H200'"):
        card_named("H201")
    with pytest.raises(ConfigError, match=r"gpu='abacus'.*4090.*H200"):
        card_named("abacus")


def test_attention_speeds_up_with_length_and_stays_within_the_curve() -> None:
    card = card_named("H200")
    rates = [card.attention_rate(n) for n in (1, 100, 512, 2048, 5000, 32768, 10**6)]
    assert rates == sorted(rates) and rates[0] > 0
    assert rates[-1] == rates[-2] == card.attention_forward[-1][1]
    assert card.attention_rate(2048, backward=True) < card.attention_rate(2048)
