"""Reward models in `reward_funcs`: the scores of TRL's own trainer, by name and as a model, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, Qwen2Config
from transformers import Qwen2ForSequenceClassification as Qwen2
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from pronghorn import FastLanguageModel
from pronghorn.config.errors import ConfigError
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.rewards.reward_model import RewardModel, with_reward_models
from pronghorn.rewards.runner import RewardRunner
from tests.grpo.support import config, letters, llama, prompts, pronghorn_model, trainer
from tests.helpers import tiny_config, tiny_llama, tiny_tokenizer

TEXTS = (["What is 1 plus 2?", "Say", "The quick brown fox"], [" 3", " a much longer answer than the others", ""])
CHATS = tuple(
    [[{"role": role, "content": text}] for text in texts]
    for role, texts in zip(("user", "assistant"), (TEXTS[0], ["3", "a much longer answer than the others", "no"]))
)
TOLERANCE = 1e-5
"""Float32 sums of 64 products in another order; scores are of size 0.1 to 1."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a score head, saved with its tokenizer; the tokenizer has no padding token, as Llama 3's."""
    where = tmp_path_factory.mktemp("models") / "tiny-scorer"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that Pronghorn does not train."""
    where = tmp_path_factory.mktemp("models") / "tiny-qwen"
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        Qwen2(Qwen2Config(**shape, num_attention_heads=2, num_key_value_heads=1, num_labels=1)).save_pretrained(where)
    tiny_tokenizer().save_pretrained(where)
    return where


def classifier(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)


def trls(tmp_path: Path, reward: Any, tokenizer: Any, texts: tuple[Any, Any], **settings: Any) -> tuple[list, list]:
    """What TRL's trainer calls the reward function, and the scores that it gives."""
    policy_tokenizer = tiny_tokenizer()
    policy_tokenizer.pad_token = "<|end_of_text|>"
    args = TRLConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=2, num_generations=2, report_to="none",
        bf16=False, **settings,
    )  # fmt: skip
    made = TRLTrainer(
        llama(), reward, args, Dataset.from_dict({"prompt": ["a", "b"]}), processing_class=policy_tokenizer,
        reward_processing_classes=tokenizer,
    )  # fmt: skip
    rows = [{"prompt": prompt} for prompt in texts[0]]
    scores = made._calculate_rewards(rows, *texts, [[7]] * len(rows))
    return made.reward_func_names, scores[:, 0].tolist()


@pytest.mark.parametrize("texts", [TEXTS, CHATS], ids=["text", "chats"])
@pytest.mark.parametrize("which", ["folder", "stranger"])
@pytest.mark.parametrize("given", ["name", "model", "model and tokenizer"])
def test_scores_and_name_are_trls(
    tmp_path: Path, request: pytest.FixtureRequest, which: str, given: str, texts: tuple[Any, Any]
) -> None:
    where: Path = request.getfixturevalue(which)

    def reward() -> Any:
        return str(where) if given == "name" else classifier(where)

    def tokenizer() -> Any:
        if given != "model and tokenizer":
            return None
        other = tiny_tokenizer()  # padded on the left by itself, and with another token
        other.padding_side, other.pad_token = "left", "<|end_of_text|>"
        return other

    names, scores = trls(tmp_path, reward(), tokenizer(), texts)
    (ours,) = with_reward_models(reward(), tokenizer())
    assert [ours.__name__] == names == [where.name]
    assert ours(*texts) == scores  # the same forward of the same rows
    assert len(set(scores)) == 3
    for row in range(3):  # a row's score is its own, whatever it is padded with
        alone = ours([texts[0][row]], [texts[1][row]])
        assert alone == pytest.approx([scores[row]], abs=TOLERANCE)


def test_the_template_gets_the_configs_variables(tmp_path: Path, folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template + "{{ mood }}"
    given = {"chat_template_kwargs": {"mood": "happy"}}
    _, scores = trls(tmp_path, classifier(folder), tokenizer, CHATS, **given)
    (ours,) = with_reward_models(classifier(folder), tokenizer, template_kwargs=given["chat_template_kwargs"])
    (bare,) = with_reward_models(classifier(folder), tokenizer)
    assert ours(*CHATS) == scores != bare(*CHATS)


def test_a_classifier_that_pronghorn_loaded_scores_by_its_packed_forward(tmp_path: Path, folder: Path) -> None:
    _, scores = trls(tmp_path, classifier(folder), None, CHATS)
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), load_in_4bit=False, num_labels=1)
    for passed in (None, tokenizer):
        (ours,) = with_reward_models([model], [passed])
        if passed is None:  # else its padding token is one of Pronghorn's choice, and the end of the turn counts
            assert ours(*CHATS) == pytest.approx(scores, abs=TOLERANCE)
        assert all(isinstance(score, float) for score in ours(*CHATS))


def test_mixed_precision_is_that_of_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL has accelerate prepare the model, which runs it under autocast where training does."""
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # a process has one precision otherwise
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(classifier(folder), evaluation_mode=True)
    ours = RewardModel(classifier(folder), autocast=torch.bfloat16)
    prepared.config.pad_token_id = ours.tokenizer.pad_token_id
    texts = [p + c for p, c in zip(*TEXTS)]
    inputs = ours.tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    with torch.inference_mode():
        expected = prepared(**inputs).logits[:, 0].tolist()
    assert ours(*TEXTS) == expected != RewardModel(classifier(folder))(*TEXTS)


def test_it_takes_no_gradient_and_draws_no_dropout(folder: Path) -> None:
    model = classifier(folder)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ours = RewardModel(model.train())
    assert not model.training and ours(*TEXTS) == ours(*TEXTS)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_with_a_reward_model_and_a_function(tmp_path: Path, folder: Path, workers: int) -> None:
    """Logged under both names; the model stays here where functions get workers, and does not move."""
    model = classifier(folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = trainer(
        tmp_path, rewards=[model, letters], reward_weights=[0.5, 2.0], reward_workers=workers, max_steps=1,
    )  # fmt: skip
    made.train()
    log = made.state.log_history[0]
    assert {f"rewards/{name}/{what}" for name in ("tiny-scorer", "letters") for what in ("mean", "std")} <= set(log)
    expected = 0.5 * log["rewards/tiny-scorer/mean"] + 2 * log["rewards/letters/mean"]
    assert log["reward"] == pytest.approx(expected, abs=1e-6) and log["rewards/tiny-scorer/std"] > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_run_on_chats_with_a_tokenizer_of_its_own(tmp_path: Path, stranger: Path) -> None:
    """Another template and another padding token than the policy's; the logged mean is that of the model's scores."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<|end_of_text|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    data = Dataset.from_list([{"prompt": chat} for chat in CHATS[0] for _ in range(3)])
    made = trainer(tmp_path, rewards=classifier(stranger), data=data, max_steps=1, reward_processing_classes=tokenizer)
    (scorer,) = made.sampling.runner.funcs
    seen: list[float] = []
    forward = scorer.model.forward

    def watched(**inputs: Any) -> Any:
        assert (inputs["attention_mask"].diff(dim=1) <= 0).all()  # padded on the right
        assert tokenizer.decode(inputs["input_ids"][0]).startswith("user: ")
        result = forward(**inputs)
        seen.extend(result.logits[:, 0].tolist())
        return result

    scorer.model.forward = watched
    made.train()
    assert len(seen) == 4 and made.state.log_history[0]["reward"] == pytest.approx(sum(seen) / 4, abs=1e-6)


def test_prompts_of_token_ids_have_no_text(folder: Path) -> None:
    with pytest.raises(ValueError, match="neither text nor a chat, .* give prompts as text or chats"):
        with_reward_models(str(folder))[0]([[0, 9, 11]], ["yes"])


def test_a_name_and_its_tokenizer_through_the_trainer(tmp_path: Path, folder: Path) -> None:
    made = GRPOTrainer(
        pronghorn_model(), [str(folder), letters], config(tmp_path), prompts(), processing_class=tiny_tokenizer(),
        reward_processing_classes=[tiny_tokenizer(), None],
    )  # fmt: skip
    assert made.sampling.runner.names == ["tiny-scorer", "letters"]
    assert isinstance(made.sampling.runner.funcs[0], RewardModel)


def test_what_is_no_reward_model_is_refused_by_name(tmp_path: Path, folder: Path) -> None:
    language_model = tiny_llama(tmp_path)
    two = LlamaForSequenceClassification(tiny_config(num_labels=2))
    homeless = LlamaForSequenceClassification(tiny_config(num_labels=1))
    endless = tiny_tokenizer()
    endless.eos_token = None
    for given, tokenizers, message in (
        ("no/such-model", None, "'no/such-model' does not load as a sequence classifier"),
        (str(language_model), None, "holds no 'score.weight', which would be drawn at random"),
        (two, None, "LlamaForSequenceClassification with num_labels=2.*load it with num_labels=1"),
        (homeless, None, "no tokenizer of 'LlamaForSequenceClassification'.*pass reward_processing_classes="),
        (homeless, endless, "has neither pad_token nor eos_token; set its pad_token"),
        (torch.nn.Linear(2, 1), None, "a Linear, a module without a config"),
        ([str(folder), letters], tiny_tokenizer(), "1 entries for 2 reward functions: give one for each"),
        ([letters], [tiny_tokenizer()], "for 'letters', which is no model and reads no tokens; give None"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_reward_models(given, tokenizers)
    shutil.rmtree(language_model)
    with pytest.raises(ConfigError, match="reward_workers=2 has no effect on reward models"):
        RewardRunner(with_reward_models(str(folder)), workers=2)
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        RewardRunner(with_reward_models(None))
