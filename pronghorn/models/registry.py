"""Family look-up: ``config.model_type`` to the module that serves it, imported when first asked for."""

from __future__ import annotations

import importlib
from typing import Any

from ..config.errors import ConfigError, nearest
from .spec import ModelSpec

# model_type -> module in this package. A new family is one short file and one line here.
_FAMILIES = {"llama": "llama"}


def known_families() -> list[str]:
    """The ``model_type`` values that load."""
    return sorted(_FAMILIES)


def spec_for(config: Any) -> ModelSpec:
    """The spec that serves a transformers config.

    Raises:
        ConfigError: the family is unknown; the message lists the known ones.
    """
    model_type = getattr(config, "model_type", None) or str(config)
    if model_type not in _FAMILIES:
        close = nearest(model_type, _FAMILIES)
        hint = f" (did you mean {close!r}?)" if close else ""
        raise ConfigError(
            f"model_type={model_type!r} is not a family that Pronghorn knows{hint}; "
            f"known: {', '.join(known_families())}"
        )
    module = importlib.import_module(f".{_FAMILIES[model_type]}", __package__)
    spec: ModelSpec = module.SPEC
    architectures = getattr(config, "architectures", None) or []
    if architectures and not set(architectures) & {*spec.architectures, *spec.classifiers}:
        raise ConfigError(
            f"architectures={architectures!r} of model_type={model_type!r} is not a causal language model, nor a "
            f"sequence classifier; expected one of {', '.join((*spec.architectures, *spec.classifiers))}"
        )
    return spec
