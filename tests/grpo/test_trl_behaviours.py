"""What TRL's own tests of its GRPOTrainer (text only) ask of one, asked of Pronghorn's, on models made here.

Where Pronghorn refuses what TRL takes (streamed data sets, beam search, a float32 copy of the head), the refusal is the
behaviour. `trl_test_map.py` says where each of TRL's tests is, here or in another file.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.grpo.losses import LOSSES
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.loader import from_pretrained
from pronghorn.models.state import state_of
from tests.grpo import trl_test_map
from tests.grpo.support import FakeEngine, config, letters, prompts, pronghorn_model, trainer
from tests.helpers import tiny_llama

CHATS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"Say {i}"}]} for i in range(12)])


def longer(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(c if isinstance(c, str) else c[0]["content"])) for c in completions]


def variety(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(c))) for c in completions]


async def variety_later(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(set(c))) for c in completions]


def nothing(completions: list[Any], **kwargs: Any) -> list[None]:
    return [None] * len(completions)


def weights(made: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def trains(made: GRPOTrainer, still: bool = False) -> dict[str, Any]:
    """Train; every trainable weight moved (or none, ``still``), no other did, the loss was logged. The first log."""
    before = weights(made)
    result = made.train()
    assert result.training_loss == result.training_loss and "train_loss" in made.state.log_history[-1]
    for name, p in made.model.named_parameters():
        assert torch.equal(p, before[name]) == (still or not p.requires_grad), name
    return made.state.log_history[0]


def test_model_reward_and_data_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without args the output goes to a folder named after the model
    model = pronghorn_model()
    state_of(model).max_seq_length = 1024  # TRL's completions are of up to 512 tokens
    made = GRPOTrainer(model, letters, train_dataset=prompts())
    assert made.args.output_dir.endswith("-GRPO") and made.args.loss_type == "dapo" and made.args.beta == 0.0


@pytest.mark.parametrize("data", [prompts(), CHATS], ids=["standard", "conversational"])
def test_text_and_chats(tmp_path: Path, data: Dataset) -> None:
    trains(trainer(tmp_path, rewards=longer, data=data))


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_each_loss_with_accumulation(tmp_path: Path, loss_type: str) -> None:
    trains(trainer(tmp_path, loss_type=loss_type, gradient_accumulation_steps=2))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"steps_per_generation": 2},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "steps_per_generation": 2},
        {"beta": 0.1},
        {"beta": 0.1, "use_bias_correction_kl": False},
        {"delta": 2.0},
        {"off_policy_mask_threshold": 0.5},
        {"top_entropy_quantile": 0.2},
        {"entropy_coef": 0.01},
        {"use_adaptive_entropy": True, "entropy_target": 9.0},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"per_device_train_batch_size": 2, "num_generations": 4, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"vllm_importance_sampling_correction": False},
        {"shuffle_dataset": False},
        {"dataloader_num_workers": 2},
    ],
    ids=str,
)
def test_each_setting_trains(tmp_path: Path, settings: dict[str, Any]) -> None:
    trains(trainer(tmp_path, rewards=[longer, variety], **settings))


def test_disabled_dropout_is_none_at_all(tmp_path: Path) -> None:
    """To the last bit, and in the adapter's modules alone: its config still says what it was made with."""
    ends = []
    for dropout, settings in ((0.5, {"disable_dropout": True}), (0.0, {}), (0.5, {})):
        made = trainer(tmp_path, pronghorn_model(dropout=dropout), **settings)
        made.train()
        ends.append(weights(made))
    same, dropped = ([torch.equal(p, ends[i][name].view_as(p)) for name, p in ends[1].items()] for i in (0, 2))
    assert all(same) and not all(dropped)
    assert list(ends[0]) == list(ends[1])


def test_remote_code_is_allowed_for_a_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[LoadConfig] = []

    def load(settings: LoadConfig) -> Any:
        seen.append(settings)
        return pronghorn_model(), None

    monkeypatch.setattr("pronghorn.loader.from_pretrained", load)
    for allowed in (False, True):
        GRPOTrainer("some/model", letters, config(tmp_path, trust_remote_code=allowed), prompts())
    assert [settings.trust_remote_code for settings in seen] == [False, True]


@pytest.mark.parametrize("scale_rewards", [False, "group", "batch", True, "none"])
def test_each_scaling_trains(tmp_path: Path, scale_rewards: Any) -> None:
    trains(trainer(tmp_path, scale_rewards=scale_rewards))


def test_entropy_bonus_and_its_controller_are_logged(tmp_path: Path) -> None:
    fixed = trains(trainer(tmp_path / "fixed", entropy_coef=0.5))
    assert fixed["entropy_coef"] == 0.5
    assert fixed["policy_loss"] - 0.5 * fixed["entropy"] == pytest.approx(fixed["loss"], abs=1e-5)
    made = trainer(
        tmp_path / "adaptive", use_adaptive_entropy=True, entropy_target=50.0, entropy_coef_delta=0.1,
        entropy_coef_max=0.25, max_steps=4,
    )  # fmt: skip
    made.train()
    logs = [log for log in made.state.log_history if "entropy_coef" in log]
    assert [log["entropy_coef"] for log in logs] == pytest.approx([0.1, 0.2, 0.25, 0.25])
    applied = [(log["policy_loss"] - log["loss"]) / log["entropy"] for log in logs]
    assert applied == pytest.approx([0.0, 0.1, 0.2, 0.25], abs=1e-5)  # what the step before came to


def test_an_entropy_bonus_raises_the_entropy(tmp_path: Path) -> None:
    """Nothing to learn from the rewards: the bonus alone moves the policy, up for a positive coefficient."""
    ends = {}
    for coef in (-1.0, 1.0):
        made = trainer(tmp_path / str(coef), rewards=lambda completions, **_: [1.0] * len(completions),
                       entropy_coef=coef, max_steps=4, lr_scheduler_type="constant")  # fmt: skip
        made.train()
        ends[coef] = [log["entropy"] for log in made.state.log_history if "entropy" in log]
    assert ends[1.0][-1] > ends[1.0][0] and ends[-1.0][-1] < ends[-1.0][0] - 0.1


def test_evaluation(tmp_path: Path) -> None:
    """At the start, along the way, and with another number of completions; a loss type that averages by step."""
    made = trainer(
        tmp_path, eval_dataset=prompts(3), eval_strategy="steps", eval_steps=2, eval_on_start=True, loss_type="grpo",
        num_generations_eval=1, per_device_eval_batch_size=3, entropy_coef=0.01, top_entropy_quantile=0.5,
    )  # fmt: skip
    made.train()
    evaluations = [log for log in made.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in evaluations] == [0, 2]
    assert all(log["eval_reward"] is not None and log["eval_completions/mean_length"] > 0 for log in evaluations)


def test_evaluation_leaves_the_entropy_controller_alone(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, eval_dataset=prompts(4), use_adaptive_entropy=True, entropy_coef=0.1, entropy_target=9.0, max_steps=1
    )
    made.train()
    state = made.loss_step.bonus.state()
    made.evaluate()
    assert made.loss_step.bonus.state() == state and state["coef"] == pytest.approx(0.105)


def test_several_rewards_with_weights(tmp_path: Path) -> None:
    log = trains(trainer(tmp_path, rewards=[longer, variety], reward_weights=[0.7, 0.3]))
    for name in ("longer", "variety"):
        assert {f"rewards/{name}/mean", f"rewards/{name}/std"} <= set(log)
    assert log["reward"] == pytest.approx(0.7 * log["rewards/longer/mean"] + 0.3 * log["rewards/variety/mean"])


def test_async_and_plain_rewards_together(tmp_path: Path) -> None:
    log = trains(trainer(tmp_path, rewards=[longer, lambda completions, **_: [1] * len(completions), variety_later]))
    assert log["rewards/variety_later/mean"] > 0


def test_a_reward_that_abstains_beside_one_that_does_not(tmp_path: Path) -> None:
    log = trains(trainer(tmp_path, rewards=[longer, nothing]))
    assert log["rewards/nothing/mean"] is None and log["reward"] == log["rewards/longer/mean"]


def test_all_rewards_none_warns_and_teaches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        trains(trainer(tmp_path, rewards=nothing), still=True)
    assert "All reward functions returned None" in caplog.text


def test_rewards_see_columns_and_the_trainers_state(tmp_path: Path) -> None:
    seen = []

    def near(completions: list[str], answer: list[int], trainer_state: Any, **kwargs: Any) -> list[float]:
        seen.append(trainer_state.global_step)
        return [-abs(len(c) - a) for c, a in zip(completions, answer, strict=True)]

    trains(trainer(tmp_path, rewards=near))
    assert seen == [0, 1]


def test_truncated_completions_are_masked(tmp_path: Path) -> None:
    """Some: the others train. All: nothing to learn from, and no weight moves."""

    class Cut(FakeEngine):
        def _one(self, ids: list[int], params: Any) -> Any:
            request = super()._one(ids, params)
            for output in request.outputs:
                output.finish_reason = "length"
            return request

    trains(trainer(tmp_path / "some", mask_truncated_completions=True))
    model = pronghorn_model()
    engine = Cut(model, model.get_base_model().pronghorn_state.tokenizer)
    for loss_type in ("grpo", "dr_grpo", "cispo", "vespo"):
        made = trainer(
            tmp_path / loss_type, model, engine=engine, mask_truncated_completions=True, loss_type=loss_type,
            top_entropy_quantile=0.5, entropy_coef=0.1, gradient_accumulation_steps=2, max_steps=1,
        )  # fmt: skip
        trains(made, still=True)


def test_sync_moves_policy_and_reference(tmp_path: Path) -> None:
    made = trainer(tmp_path, beta=0.1, sync_ref_model=True, ref_model_sync_steps=2)
    with made.loss_step.reference.acting():
        before = weights(made)
    trains(made)
    with made.loss_step.reference.acting():
        assert all(torch.equal(p, before[n]) != p.requires_grad for n, p in made.model.named_parameters())


def test_rows_come_in_trls_order(tmp_path: Path) -> None:
    """6 prompts x 4 completions a generation, 4 micro-batches of it, each used twice: 8 calls see the same rows."""
    data = Dataset.from_dict({"prompt": [f"prompt {i}" for i in range(13)]})
    made = trainer(
        tmp_path, data=data, gradient_accumulation_steps=3, steps_per_generation=4, num_generations=4,
        per_device_train_batch_size=6, num_iterations=2, shuffle_dataset=False, max_steps=-1, num_train_epochs=3,
    )  # fmt: skip
    calls: list[list[str]] = []
    step = made.training_step
    made.training_step = lambda model, rows, *rest: (  # type: ignore[method-assign]
        calls.append([row["prompt"] for row in rows]),
        step(model, rows, *rest),
    )[1]
    made.train()
    batches = [[f"prompt {i}" for i in range(first, first + 6) for _ in range(4)] for first in (0, 6)]
    assert len(calls) == 48  # 3 epochs x 2 generations x 4 micro-batches x 2 iterations
    assert calls[:8] == [batches[0]] * 8 and calls[8:16] == [batches[1]] * 8


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_folder_and_a_peft_config_on_the_native_engine(tmp_path: Path, checkpointing: bool) -> None:
    """Sampling under top-p, top-k, min-p and a repetition penalty; adapters move, the base does not."""
    args = config(
        tmp_path / "run", top_p=0.9, top_k=10, min_p=0.01, repetition_penalty=1.1, max_completion_length=6,
        gradient_checkpointing=checkpointing, model_init_kwargs={"load_in_4bit": False, "max_seq_length": 128},
        generation_kwargs={"top_k": 50},
    )  # fmt: skip
    adapter = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    made = GRPOTrainer(str(tiny_llama(tmp_path)), longer, args, prompts(), peft_config=adapter)
    trains(made)
    assert made.sampling.params(4, 0).top_k == 50


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_full_fine_tuning_moves_every_weight(tmp_path: Path, beta: float) -> None:
    model, tokenizer = from_pretrained(
        LoadConfig.of(model_name=str(tiny_llama(tmp_path)), load_in_4bit=False, full_finetuning=True,
                      max_seq_length=128, dtype=torch.float32)
    )  # fmt: skip
    trains(trainer(tmp_path / "run", model, beta=beta, engine=FakeEngine(model, tokenizer)))


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"rewards": "some/reward-model"}, "reward_funcs: 'some/reward-model' does not load"),
        ({"data": None}, "train_dataset"),
        ({"data": prompts().to_iterable_dataset()}, "IterableDataset.*streaming=False"),
        ({"eval_dataset": prompts().to_iterable_dataset()}, "eval_dataset is an IterableDataset.*streaming=False"),
        ({"eval_dataset": {"a": prompts().to_iterable_dataset()}}, r"eval_dataset\['a'\] is an IterableDataset"),
        (
            {"environment_factory": dict},
            "environment_factory=.* is not served; pass .* as tools=",
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config is not served; .*load_in_4bit="),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef=0.1"),
        ({"use_transformers_paged": True}, "use_transformers_(paged|continuous_batching)=True"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching=True"),
        ({"vllm_structured_outputs_regex": "a+"}, r"vllm_structured_outputs_regex='a\+'"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        ({"rewards": [longer, variety], "reward_weights": [1.0]}, "reward_weights"),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x),  # xdist: the same in every process
)
def test_what_is_not_offered_is_refused_by_name(tmp_path: Path, wrong: dict[str, Any], named: str) -> None:
    settings = dict(wrong)
    rewards, data = settings.pop("rewards", letters), settings.pop("data", prompts())
    names = ("eval_dataset", "environment_factory", "quantization_config")
    arguments = {name: settings.pop(name) for name in names if name in settings}
    with pytest.raises(ConfigError, match=named):
        GRPOTrainer(pronghorn_model(), rewards, config(tmp_path, **settings), data, **arguments)


@pytest.mark.parametrize("part", ["TESTS", "SINCE", "REFUSED"])
def test_the_map_of_trls_tests_names_tests_that_exist(part: str) -> None:
    """And, in brackets, a setting that is among their parameters."""
    for asked, answers in getattr(trl_test_map, part).items():
        assert answers, asked
        for answer in answers:
            file, _, rest = answer.partition("::")
            name, _, word = rest.rstrip("]").partition("[")
            test = getattr(importlib.import_module(f"tests.grpo.{file}"), name, None)
            assert callable(test), f"{asked}: {answer} does not exist"
            given = [mark.args[1] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            assert word in str(given), f"{asked}: no parameter of {answer}"
