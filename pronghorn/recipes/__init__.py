"""Whole runs made of the public parts: what ``pronghorn quickstart`` does, and held-out evaluation."""
