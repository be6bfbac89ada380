"""GPU kernels, one file an operation, each with a plain PyTorch twin of the same name in ``kernels/reference``."""
