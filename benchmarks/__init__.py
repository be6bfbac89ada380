"""Measurements on a GPU, one file a kernel and one for each end-to-end case; results lie in ``benchmarks/results``."""
