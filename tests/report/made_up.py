"""A made-up run folder with the files that a training run leaves."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

REWARDS = ("correctness", "int", "strict_format", "soft_format", "xmlcount")
HOSTILE = "<script>fetch('https://example.com')</script><img src=https://example.com/x.png>"


def write_run(folder: Path, steps: int = 40) -> Path:
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines, samples = [], []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        means = [2 * (0.2 + 0.3 * done), 0.3 + 0.1 * done, 0.1 + 0.35 * done, 0.2 + 0.25 * done, 0.2 + 0.25 * done]
        means = [mean + draw.gauss(0, 0.03) for mean in means]
        line = {f"rewards/{name}_reward_func/mean": mean for name, mean in zip(REWARDS, means)}
        line |= {
            "step": step,
            "reward": sum(means),
            "reward_std": 0.9 - 0.3 * done,
            "completions/mean_length": 52 - 9 * done + draw.gauss(0, 1),
            "loss": draw.gauss(0, 0.02),
            "kl": 0.02 * done,
            "entropy": 0.6 - 0.3 * done,
            "sampling/sampling_logp_difference/mean": 2e-3 + draw.random() * 1e-3,
            "sampling/sampling_logp_difference/max": 2e-2 + draw.random() * 1e-2,
            "step_time": 1.4 + draw.random() * 0.2,
        }
        lines.append(line)
        if step == 1 or step % 10 == 0:
            for index in range(3):
                samples.append(
                    {
                        "step": step,
                        "prompt": "Ana buys 3 bags of 12 apples and gives away 7. How many apples does she have?",
                        "completion": "<reasoning>\n3 bags of 12 are 36. 36 - 7 = 29.\n</reasoning>\n<answer>\n29\n"
                        "</answer>\n" + (HOSTILE if index == 2 else ""),
                        "rewards": {f"{name}_reward_func": draw.choice([0.0, 0.5]) for name in REWARDS},
                        "advantage": draw.gauss(0, 1),
                    }
                )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "completions.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    summary = {
        "accuracy_before": 0.212, "accuracy_after": 0.438, "accuracy_before_ci": [0.1783, 0.2500],
        "accuracy_after_ci": [0.3952, 0.4818], "number_before": 0.402, "number_after": 0.446, "problems": 500,
        "reward_first": 1.21, "reward_last": 2.31, "steps": steps, "seconds": 201.3, "seed": 0, "merged_matches": True,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps({"learning_rate": 4e-4, "num_generations": 8, "loss_type": "dapo"}))
    (folder / "environment.json").write_text(json.dumps({"device": "AMD EPYC, 2 cores", "torch": "2.13.0+cpu"}))
    return folder
