"""The engine that generates with the trainer's own modules and weights."""
