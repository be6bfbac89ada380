"""LoRA projections of an 8B Llama on 4-bit weights, forward and backward, beside PEFT's on bitsandbytes' layers.

    python -m benchmarks.lora [--tokens 4096]

Groups of projections that read one input (q, k and v; o; gate and up; down), rank 32, bf16. A case is
``kernel/lora/<group>/<tokens>`` with ``ms`` of forward and backward together (the input's gradient and every A's and
B's), measured as a training step runs them, Python included, and ``floor_ms``: the products of the base alone, forward
and backward, at this GPU's measured bf16 matmul rate. ``pronghorn-held`` is the same with the weights kept in 16 bits,
as ``use_gradient_checkpointing="off"`` keeps them. The peer's adapters are float32 and run under autocast, as
transformers' Trainer runs ``bf16=True``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.nf4 import matmul_flops_per_ms, measure
from benchmarks.results import Results, arguments, start
from pronghorn.lora.config import register
from pronghorn.lora.fused import Input, adapter_gradients, input_gradient, project
from pronghorn.lora.held import HeldWeights
from pronghorn.lora.projection import Group, read_projection, table
from pronghorn.lora.rounded import Rounded
from pronghorn.quant.linear4bit import Linear4bit

RANK = 32
GROUPS = {
    "qkv": (4096, {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}),
    "o": (4096, {"o_proj": 4096}),
    "gate_up": (4096, {"gate_proj": 14336, "up_proj": 14336}),
    "down": (14336, {"down_proj": 4096}),
}


class Projections(nn.Module):
    """Linear layers by name; what they give side by side."""

    def __init__(self, inputs: int, outputs: dict[str, int], device: str, dtype: torch.dtype) -> None:
        super().__init__()
        for name, size in outputs.items():
            setattr(self, name, nn.Linear(inputs, size, bias=False, device=device, dtype=dtype))
        self.names = list(outputs)

    def forward(self, x_TI: torch.Tensor) -> list[torch.Tensor]:
        return [getattr(self, name)(x_TI) for name in self.names]


def adapted(module: Projections, own: bool) -> Any:
    """``module`` under PEFT with B unlike zero; with ``own`` as Pronghorn's get_peft_model makes it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=module.names)
    model = get_peft_model(module, register(config) if own else config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def group_of(model: Any) -> Group:
    """The projections as the fused path reads them, adapters rounded to bf16."""
    base = model.get_base_model()
    found = [read_projection(getattr(base, name)) for name in base.names]
    members = tuple(p for p in found if not isinstance(p, str))
    if len(members) < len(found):
        raise SystemExit(f"a projection cannot be fused: {[p for p in found if isinstance(p, str)][0]}")
    return Rounded([members], torch.bfloat16).groups[0]


@torch.no_grad()
def fused(group: Group, held: HeldWeights | None, x_TI: torch.Tensor, dy_TO: torch.Tensor) -> None:
    """Forward and backward as a fused layer calls them; ``dy_TO`` has R columns to spare."""
    given = Input(group, held, rows=x_TI.shape[0], like=x_TI)
    given.x_TI.copy_(x_TI)
    low_TR = given.lower(group, x_TI.new_empty(x_TI.shape[0], group.rank))
    project(given, group, low_TR, held)
    _, g_TR = input_gradient(dy_TO, group, held)
    adapter_gradients(dy_TO, g_TR, given.x_TI, low_TR, group)


def by_autograd(model: Any, x_TI: torch.Tensor, dys: list[torch.Tensor]) -> None:
    """Forward under autocast, and the gradients of the input and of every adapter."""
    with torch.autocast("cuda", torch.bfloat16):
        ys = model(x_TI)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(ys, [x_TI, *trained], dys)


def bench(results: Results, name: str, tokens: int, flops: float) -> None:
    from bitsandbytes.nn import Linear4bit as BnbLinear4bit
    from bitsandbytes.nn import Params4bit

    inputs, outputs = GROUPS[name]
    total = sum(outputs.values())
    ours = Projections(inputs, outputs, "cuda", torch.bfloat16).requires_grad_(False)
    theirs = Projections(inputs, outputs, "cuda", torch.bfloat16).requires_grad_(False)
    for projection, size in outputs.items():
        weight = getattr(ours, projection).weight
        other = BnbLinear4bit(inputs, size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        other.weight = Params4bit(weight.detach().cpu(), requires_grad=False, quant_type="nf4", module=other)
        setattr(theirs, projection, other.cuda())
        setattr(ours, projection, Linear4bit.from_linear(getattr(ours, projection)))
    group, peer = group_of(adapted(ours, own=True)), adapted(theirs, own=False)
    x_TI = torch.randn(tokens, inputs, dtype=torch.bfloat16, device="cuda")
    dy_TO = table(tokens, total + group.rank, torch.bfloat16, torch.device("cuda"))
    dy_TO.normal_()
    dys = [dy.contiguous() for dy in dy_TO[:, :total].split(list(outputs.values()), dim=1)]
    case, floor = f"kernel/lora/{name}/{tokens}", 4 * tokens * inputs * total / flops
    held = HeldWeights(group, torch.bfloat16)
    results.add(case, "pronghorn", ms=measure(partial(fused, group, None, x_TI, dy_TO)), floor_ms=floor)
    results.add(case, "pronghorn-held", ms=measure(partial(fused, group, held, x_TI, dy_TO)))
    leaf = x_TI.clone().requires_grad_()
    results.add(case, "peft+bitsandbytes", ms=measure(partial(by_autograd, peer, leaf, dys)))


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    results = start("lora", ("peft", "bitsandbytes"), args)
    flops = matmul_flops_per_ms()
    results.add("device/matmul-bf16", "torch", tflops=flops / 1e9)
    for name in GROUPS:
        bench(results, name, args.tokens, flops)
    results.write(args.out)


if __name__ == "__main__":
    main()
