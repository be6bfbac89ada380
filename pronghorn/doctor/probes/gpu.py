"""Print what torch is built for, and each GPU that it sees with its memory and the error of a bf16 product on it."""

from __future__ import annotations

import json
from typing import Any


def main() -> None:
    import torch

    answer: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "hip_build": torch.version.hip,
        "available": torch.cuda.is_available(),
        "error": None,
        "architectures": [],
        "gpus": [],
    }
    if answer["available"]:
        answer["architectures"] = torch.cuda.get_arch_list()
        answer["gpus"] = [_gpu(index) for index in range(torch.cuda.device_count())]
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            answer["error"] = str(error).splitlines()[0]
    print(json.dumps(answer))


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    properties = torch.cuda.get_device_properties(index)
    major, minor = torch.cuda.get_device_capability(index)
    found: dict[str, Any] = {
        "index": index,
        "name": properties.name,
        "capability": [major, minor],
        "free": free,
        "total": total,
        "uuid": str(properties.uuid),
        "bf16_error": None,
    }
    if major >= 8:
        a = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
        product = a.to(f"cuda:{index}", torch.bfloat16) @ a.T.to(f"cuda:{index}", torch.bfloat16)
        exact = a.to(torch.bfloat16).double() @ a.T.to(torch.bfloat16).double()
        found["bf16_error"] = ((product.cpu().double() - exact).norm() / exact.norm()).item()
    return found


if __name__ == "__main__":
    main()
