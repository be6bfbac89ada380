"""Load bitsandbytes, step its 8-bit AdamW (paged on a GPU), and print how far the weights are from torch's AdamW."""

from __future__ import annotations

import json

_STEPS, _RATE = 3, 1e-3
_ELEMENTS = 128 * 128  # bitsandbytes keeps the states of tensors under 4,096 elements in 32 bits


def main() -> None:
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(_ELEMENTS, generator=generator)
    gradients = [torch.randn(_ELEMENTS, generator=generator) for _ in range(_STEPS)]
    kind = bitsandbytes.optim.PagedAdamW8bit if device == "cuda" else bitsandbytes.optim.AdamW8bit
    moved = _train(kind, start, gradients, device)
    exact = _train(torch.optim.AdamW, start, gradients, "cpu")
    error = ((moved - exact).norm() / (exact - start).norm()).item()
    print(
        json.dumps(
            {"bitsandbytes": bitsandbytes.__version__, "device": device, "optimizer": kind.__name__, "error": error}
        )
    )


def _train(kind, start, gradients, device):  # type: ignore[no-untyped-def]
    """The weights [_ELEMENTS] float32 on the CPU after one step for each gradient."""
    weight = start.clone().to(device).requires_grad_()
    optimizer = kind([weight], lr=_RATE, betas=(0.9, 0.99), weight_decay=0.1)
    for gradient in gradients:
        weight.grad = gradient.clone().to(device)
        optimizer.step()
    return weight.detach().cpu()


if __name__ == "__main__":
    main()
