"""Set the Triton mode before anything imports the package, and keep every test off the network."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when @triton.jit decorates, so before any import of pronghorn
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TRL_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests under tests/gpu need a GPU and are skipped, by name, without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Every ``Trainer.train`` collects garbage: what the imports have made, half a second's worth, is left out."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _bitsandbytes_as_on_any_cpu() -> Iterator[None]:
    """On a CPU with AVX512-BF16 one forward without gradients makes bitsandbytes 0.50 repack its weights, which raises
    for the small shapes of our tests and leaves later gradients wrong: as an oracle it runs as on other CPUs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
        yield
