"""Checkpointing as a plan: what each layer keeps, where, and what a step then takes in memory and time."""

from .card import Card, card_named, card_of, known_cards
from .choose import CannotFit, choose
from .plan import LayerPlan, TrainingPlan
from .shape import ModelShape

__all__ = [
    "CannotFit",
    "Card",
    "LayerPlan",
    "ModelShape",
    "TrainingPlan",
    "card_named",
    "card_of",
    "choose",
    "known_cards",
]
