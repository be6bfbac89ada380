"""What is compiled ahead is begun once, and anew under other adapters."""

from __future__ import annotations

from typing import Any

from pronghorn.models.state import state_of
from pronghorn.rollout.warmup import begun
from tests.rollout.conftest import with_lora


def walk(model: Any) -> None:
    raise AssertionError("only begun, not walked")


def test_each_walk_is_begun_once_under_the_same_adapters(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    rollouts, both = {"rollouts": walk}, {"rollouts": walk, "a training step": walk}
    assert begun(model, rollouts) == rollouts
    assert begun(model, rollouts) == {}
    adapted = with_lora(model)  # generated from before it had adapters: their kernels are other ones
    assert state_of(adapted) is state_of(model)
    assert begun(adapted, both) == both
    assert begun(adapted, both) == {}
    assert begun(model, rollouts) == {}
