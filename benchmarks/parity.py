"""How equal sampler and trainer are: log-probs that decode steps produced against the trainer's on the same tokens.

    python -m benchmarks.parity --model FOLDER

NF4 base, LoRA rank 32 with every B nonzero, bf16. Cases ``parity/nf4-lora/<model>/<what>``, ``<model>`` being ``8b``
(the folder given) and ``shipped`` (the small trained model that comes with the package, quantized to NF4), ``<what>``
the sampling: metrics ``mean_abs_logp``, ``max``, ``kl`` (nats a token; k3 estimate of KL(sampler || trainer) over the
vocabulary) and ``unequal`` (share of tokens whose two log-probs differ in any bit), under ``softmax(logits /
temperature)``; ``mean_abs_drawn`` and ``kl_drawn`` the same under the distribution that was drawn from, top-k and top-p
renormalised over what they keep, which the trainer's logits are put through anew; ``tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.decode import load
from benchmarks.results import Results, arguments, start

SAMPLINGS: dict[str, dict[str, Any]] = {
    "plain": {"n": 6, "max_tokens": 200},
    "top-p": {"n": 4, "max_tokens": 100, "temperature": 0.8, "top_p": 0.95},
    "top-k": {"n": 4, "max_tokens": 100, "temperature": 1.2, "top_k": 50},
    "many": {"n": 24, "max_tokens": 64},
}
LENGTHS = (17, 64, 130, 256)


def encoded(model: Any) -> list[list[int]]:
    """Random prompts of :data:`LENGTHS` tokens."""
    import torch

    vocab = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, min(vocab, 16000), (n,), generator=generator).tolist() for n in LENGTHS]


def device_of(model: Any) -> Any:
    return next(model.parameters()).device


def trainers(model: Any, rollouts: list[Any], temperature: float) -> Any:
    """Log-probs of the trainer's scoring forward, float32 on the host."""
    import torch

    from pronghorn.grpo.batch import pack
    from pronghorn.grpo.logprobs import score

    model.eval()
    with torch.no_grad():
        return score(model, pack(rollouts, device_of(model)), temperature)[0].float().cpu()


def drawn_logps(model: Any, rollouts: list[Any], settings: dict[str, Any]) -> Iterator[Any]:
    """The trainer's logits through the same temperature, top-k and top-p, one completion at a time: ``[tokens]``."""
    import torch

    from pronghorn.models.attention import PackedAttention
    from pronghorn.models.forward import hidden_states, logits

    for r in rollouts:
        ids = torch.tensor([*r.prompt_ids, *r.completion_ids], device=device_of(model))
        positions = torch.arange(len(ids), device=ids.device)
        with torch.no_grad():
            attention = PackedAttention([len(ids)], ids.device, ordered=True)
            hidden = hidden_states(model, ids, positions, attention)[len(r.prompt_ids) - 1 : -1]
            x_NV = logits(model, hidden) / settings.get("temperature", 1.0)
        kept_NV = keep(x_NV, settings.get("top_k", 0), settings.get("top_p", 1.0))
        targets_N1 = ids[len(r.prompt_ids) :, None]
        kept_NV.scatter_(1, targets_N1, True)  # at the very edge of a cut, rounding may put a drawn token outside
        yield x_NV.masked_fill(~kept_NV, -torch.inf).log_softmax(-1).gather(1, targets_N1)[:, 0].cpu()


def keep(x_NV: Any, top_k: int, top_p: float) -> Any:
    """Which logits top-k, then top-p keep, as vLLM and TRL define them."""
    import torch

    order_NV = x_NV.sort(dim=-1, descending=True)
    values_NV = order_NV.values
    if top_k > 0:
        values_NV = values_NV.masked_fill(torch.arange(values_NV.shape[1], device=x_NV.device) >= top_k, -torch.inf)
    p_NV = values_NV.softmax(-1)
    before_NV = p_NV.cumsum(-1) - p_NV
    kept_NV = (before_NV < top_p) & (values_NV > -torch.inf)
    return torch.zeros_like(kept_NV).scatter_(1, order_NV.indices, kept_NV)


def gap(sampler: Any, trainer: Any) -> tuple[Any, float]:
    """Absolute differences, and the k3 estimate of KL(sampler || trainer)."""
    import torch

    difference = (trainer - sampler).double()
    return difference.abs(), float((torch.expm1(difference) - difference).mean())


def measure(results: Results, name: str, model: Any, tokenizer: Any) -> None:
    import torch

    from pronghorn.config.sampling import SamplingParams
    from pronghorn.grpo.rollouts import Rollout
    from pronghorn.rollout import base as rollout

    engine = rollout.engine_of(model, tokenizer)
    prompts = encoded(model)
    for what, settings in SAMPLINGS.items():
        outputs = engine.generate(prompts, SamplingParams(seed=1, ignore_eos=True, **settings))
        each = [(o, c) for o in outputs for c in o.outputs]
        rollouts = [Rollout(o.prompt_token_ids, c.token_ids, c.policy_logprobs) for o, c in each]
        own = torch.tensor([x for _, c in each for x in c.policy_logprobs])
        theirs = trainers(model, rollouts, settings.get("temperature", 1.0))
        differences, kl = gap(own, theirs)
        drawn = torch.tensor([x for _, c in each for x in c.token_logprobs])
        drawn_differences, drawn_kl = gap(drawn, torch.cat(list(drawn_logps(model, rollouts, settings))))
        results.add(
            f"parity/nf4-lora/{name}/{what}", "pronghorn", mean_abs_logp=float(differences.mean()),
            max=float(differences.max()), kl=kl, unequal=float((own != theirs).double().mean()),
            mean_abs_drawn=float(drawn_differences.mean()), kl_drawn=drawn_kl, tokens=len(own),
        )  # fmt: skip
    engine.release()


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=None, help="folder of the 8B model; left out, the shipped one alone")
    args = parser.parse_args()
    from pronghorn.recipes.quickstart import shipped_model

    results = start("parity", (), args)
    folders = {"8b": args.model, "shipped": str(shipped_model())}
    for name, folder in folders.items():
        if folder is not None:
            measure(results, name, *load(folder, "nf4-lora"))
    results.write(args.out)


if __name__ == "__main__":
    main()
