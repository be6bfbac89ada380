"""Supervised fine-tuning: response-only labels, packing without padding, a collator for `transformers.Trainer`."""
