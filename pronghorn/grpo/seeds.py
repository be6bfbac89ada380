"""Seeds of requests, derived from the run's seed and the request's place."""

from __future__ import annotations


def request_seed(seed: int, *path: int) -> int:
    """A 31-bit seed for one request of a run (SplitMix64's finaliser over ``seed`` and ``path``).

    Every request has its own, so samples depend neither on the global generators nor on what ran before, and a resumed
    run draws what the uninterrupted one would have drawn.
    """
    x = seed & 0xFFFFFFFFFFFFFFFF
    for part in path:
        x = (x ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ x >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 31
    return x & 0x7FFFFFFF
