"""Plain PyTorch versions of the kernels: what the CPU runs, and the oracle the kernels are tested against."""
