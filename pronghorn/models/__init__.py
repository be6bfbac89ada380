"""Model families, and the fast path that attaches to a transformers model without owning any of its weights."""

from .attach import attach, detach, is_attached
from .classifier import is_classifier
from .registry import known_families, spec_for
from .spec import ModelSpec
from .state import ModelState, Source, state_of
from .tree import unwrap

__all__ = [
    "ModelSpec",
    "ModelState",
    "Source",
    "attach",
    "detach",
    "is_attached",
    "is_classifier",
    "known_families",
    "spec_for",
    "state_of",
    "unwrap",
]
