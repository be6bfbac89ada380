"""Names set and given back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trl
import trl.trainer
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLGRPOTrainer

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.config import GRPOConfig
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.grpo.trl_adapter import is_patched, patch, unpatch


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    unpatch()


def test_names_are_ours_after_patch_and_trls_after_unpatch() -> None:
    assert not is_patched()
    patch()
    patch()
    from trl import GRPOConfig as config_name
    from trl import GRPOTrainer as trainer_name
    from trl.trainer import GRPOTrainer as inner_name

    assert is_patched()
    assert config_name is GRPOConfig and trainer_name is GRPOTrainer and inner_name is GRPOTrainer
    assert issubclass(GRPOConfig, TRLGRPOConfig)
    assert trl.trainer.grpo_trainer.GRPOTrainer is TRLGRPOTrainer is not GRPOTrainer  # its home is left alone
    unpatch()
    assert trl.GRPOTrainer is TRLGRPOTrainer and trl.trainer.GRPOConfig is TRLGRPOConfig and not is_patched()


def test_other_modes_are_refused() -> None:
    with pytest.raises(ConfigError, match="mode='vllm'.*'native' or 'stock'"):
        patch("vllm")
    assert not is_patched()
