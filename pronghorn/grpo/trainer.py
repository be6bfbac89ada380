"""``GRPOTrainer``: GRPO on transformers' Trainer, with Pronghorn's engine, packed batches and whole checkpoints."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed

from ..config.errors import ConfigError
from ..config.watch import WatchConfig
from .accuracy_callback import AccuracyCallback
from .config import GRPOConfig
from .data import as_dataset, as_datasets
from .evaluation import AccuracyEval
from .gradient_guard import GradientGuard
from .guarding import GuardMixin
from .loss_step import LossStep, window_of
from .losses import Window
from .metrics import History, Metrics
from .reference import SyncReference
from .repeat_sampler import RepeatSampler
from .rollout_func import RolloutFunc
from .rollouts import Rollout
from .run_state import RunState
from .samples import print_samples
from .sampling_loop import SamplingLoop
from .saving import SavingMixin
from .seeds import request_seed
from .setup import (
    as_config,
    as_model,
    check_overlap,
    check_precision,
    choose_drawer,
    prompt_encoder,
    refuse_arguments,
    reward_runner,
)
from .stateful import StatefulParts
from .stop_signal import StopSignal
from .supply import Supply
from .tool_calls import Tools
from .watch_callback import WatchCallback

TRAIN, EVAL = "train", "eval"


def identity(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The collator: rows stay rows until they are prompts."""
    return rows


class GRPOTrainer(SavingMixin, GuardMixin, Trainer):
    """Group relative policy optimization (DeepSeekMath, arXiv:2402.03300) with TRL's interface and metric names.

    Args:
        model: a model from ``FastLanguageModel`` with LoRA or fully trainable, or a name or folder to load.
        reward_funcs: one or several functions of TRL's contract: keyword arguments ``prompts``, ``completions``,
            ``completion_ids`` and the data set's columns to one number or None a completion. Also reward models:
            sequence classifiers of one label, or the name or folder of one.
        args: a :class:`GRPOConfig` (TRL's is converted).
        train_dataset, eval_dataset: data sets with a ``prompt`` column (strings or chats).
        processing_class: the tokenizer; by default the one that the model was loaded with.
        reward_processing_classes: the reward models' tokenizers, one for each entry of ``reward_funcs`` and None for
            functions; by default those that the models came with.
        callbacks, optimizers: as in transformers' Trainer.
        peft_config: a ``peft.LoraConfig`` to wrap the model with.
        tools: functions that the model may call in its turns, as in TRL: with type hints and docstrings.
        rollout_func: makes the completions in the engine's place, as in TRL: ``rollout_func(prompts, trainer)``.
        quantization_config, environment_factory: TRL's; refused with what serves in their place.
        accuracy_eval: an :class:`AccuracyEval`: held-out accuracy before, every ``eval_steps``, and after training.

    Where it departs from TRL: gradient accumulation is exact by tokens (denominators, entropy quantile and bonus span
    the optimizer step, for every loss type), the sampler correction always applies, on-policy steps take the trainer's
    log-probabilities from the training forward itself, and checkpoints hold buffered rollouts, so a resumed run repeats
    the uninterrupted one. docs/losses.md has the losses.

    Raises:
        ConfigError: at construction, for anything that is known to fail later.
    """

    args: GRPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: list[Callable[..., Any]] | None = None,
        rollout_func: RolloutFunc | None = None,
        environment_factory: Any = None,
        accuracy_eval: AccuracyEval | None = None,
    ) -> None:
        args = as_config(args, model)
        set_seed(args.seed)
        refuse_arguments(environment_factory, quantization_config)
        runner = reward_runner(reward_funcs, reward_processing_classes, args)
        prompts = args.generation_batch_size // args.num_generations
        train_dataset, eval_dataset = as_datasets(train_dataset, eval_dataset, prompts)
        model, tokenizer = as_model(model, processing_class, args, peft_config)
        check_precision(model, args)
        known = Tools(tools) if tools else None
        encoder = prompt_encoder(args, model, tokenizer, known)
        encoder.check(train_dataset, "train_dataset")
        self.position = RunState()
        self.stop, self.stateful = StopSignal(tell=lambda: self.supply.hold()), StatefulParts()
        self.guard = GradientGuard(args.max_consecutive_skipped_steps, Path(args.output_dir) / "skipped")
        self.stateful.add("skipped_steps", self.guard)
        self.metrics = {TRAIN: Metrics(), EVAL: Metrics()}
        self._step_rows: list[list[dict[str, Any]]] = []
        self._micro_batches: list[list[Rollout]] = []
        self._window: Window | None = None
        self._step_parts: list[list[Rollout]] = []
        self._step_losses: list[torch.Tensor] = []
        self._step_seconds, self._evaluated = 0.0, 0
        super().__init__(
            model=model,
            args=args,
            data_collator=identity,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.sampling = SamplingLoop(args, self.model, tokenizer, encoder, runner)
        self.sampling.drawer = choose_drawer(self.sampling, known, rollout_func, self)
        check_overlap(self.sampling)
        self.supply = Supply(args, self.sampling, self._training_rows())
        self.stateful.add("supply", self.supply)
        self.loss_step = LossStep(args, self.model)
        if self.loss_step.reference is not None:
            print(f"Pronghorn: beta={args.beta}: {self.loss_step.reference}")
        if args.sync_ref_model and self.loss_step.reference is not None:
            self.add_callback(SyncReference(self.loss_step.reference))
        self.history = History(f"{args.output_dir}/metrics.jsonl")
        self.completions = History(f"{args.output_dir}/completions.jsonl")
        if accuracy_eval is not None:
            accuracy_eval.check(self.model)
            self.add_callback(AccuracyCallback(accuracy_eval, self.log_apart, self.supply.hold))
        self.add_callback(WatchCallback(WatchConfig.of(args.watch), self.history.append))

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Rows of one generation a batch: TRL's order, repeats included, at whatever epoch the run is."""
        dataset = self._training_rows()
        size = self.args.generation_batch_size
        sampler = RepeatSampler(
            len(dataset),
            self.args.num_generations,
            prompts=size // self.args.num_generations,
            repeats=self.args.num_iterations * self.args.steps_per_generation,
            shuffle=bool(self.args.shuffle_dataset),
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )
        return self._loader(dataset, size, sampler)

    def _training_rows(self) -> Any:
        return self.train_dataset.select_columns(["prompt"]) if self.args.remove_unused_columns else self.train_dataset

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Whole groups of ``num_generations_eval`` completions."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else as_dataset(eval_dataset, "eval_dataset")
        if dataset is None:
            raise ConfigError("evaluate: eval_dataset is None; pass one here or to the trainer")
        group, size = self.num_generations_eval, self.args.per_device_eval_batch_size
        if size % group:
            raise ConfigError(
                f"per_device_eval_batch_size={size} is not a multiple of num_generations_eval={group}; give a multiple"
            )
        return self._loader(dataset, size, RepeatSampler(len(dataset), group, seed=self.args.seed))

    def _loader(self, dataset: Any, size: int, sampler: RepeatSampler) -> DataLoader:
        # its own generator: making an iterator must not advance the global one
        return DataLoader(
            dataset,
            batch_size=size,
            sampler=sampler,
            collate_fn=identity,
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    @property
    def num_generations(self) -> int:
        """Completions of a prompt in training; in evaluation ``num_generations_eval`` (TRL's names)."""
        return int(self.args.num_generations)

    @property
    def num_generations_eval(self) -> int:
        return int(self.args.num_generations_eval or self.args.num_generations)

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the workers of reward functions end with it, however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.supply.settle()
            self.sampling.runner.close()

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """As transformers' choice; bitsandbytes' 8-bit AdamW in the form that steps all tensors in one launch."""
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if str(getattr(optimizer_cls, "__module__", "")).startswith("bitsandbytes."):
            from ..optim.bitsandbytes import one_launch_class

            optimizer_cls = one_launch_class(optimizer_cls, kwargs)
        return optimizer_cls, kwargs

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, None]:
        """The rows of one optimizer step; nothing is generated yet, as a resumed run restores its RNGs after this."""
        rows, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_rows, self._window = rows, None
        return rows, None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch; the first of an optimizer step generates what the step needs."""
        if self._window is None:
            self._begin_step()
            self._step_losses, self._step_seconds = [], 0.0
        with self.stop.interruptible():
            return self._micro_step(model)

    def _micro_step(self, model: nn.Module) -> torch.Tensor:
        started = time.perf_counter()
        if not all(module.training for module in model.modules()):  # looking is cheaper than setting thousands of flags
            model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers have modes too
            self.optimizer.train()
        if self._window is None:
            self._step_parts = self._open_step()
            self._micro_batches = list(self._step_parts)
            self._window = self.loss_step.open(self._micro_batches)
        batch = self.loss_step.pack(self._micro_batches.pop(0))
        loss = self.loss_step(batch, self._window, self.metrics[TRAIN])
        self.accelerator.backward(loss)
        self._step_losses.append(loss.detach())
        self.position.micro_steps += 1
        last = not self._micro_batches
        self.metrics[TRAIN].add("loss", loss.detach(), 1.0 if last else 0.0)
        self.metrics[TRAIN].settle()  # waits for backward
        self._step_seconds += time.perf_counter() - started
        if last:
            self.loss_step.close(self.metrics[TRAIN])
            self.metrics[TRAIN].mean("step_time", self._step_seconds)
        return loss.detach()

    def _open_step(self) -> list[list[Rollout]]:
        """The micro-batches of the optimizer step that begins, generated where the buffer has run out.

        The policy does not move within a step, so all of it may be generated before its first backward; only then are
        its denominators known.
        """
        per_generation = self.args.steps_per_generation
        reuse, size = per_generation * self.args.num_iterations, self.args.per_device_train_batch_size
        parts = []
        for micro, rows in enumerate(self._step_rows, start=self.position.micro_steps):
            if micro % reuse == 0 or not self.position.buffer:
                self.position.buffer = self._generate(rows, self.args.num_generations, TRAIN, micro // reuse)
            start = micro % per_generation * size
            parts.append(self.position.buffer[start : start + size])
        return parts

    def _generate(self, rows: list[dict[str, Any]], group: int, mode: str, index: int) -> list[Rollout]:
        """Generation number ``index`` of this mode: sampled, scored, and with the log-probabilities the loss needs."""
        seed = request_seed(self.args.seed, mode == EVAL, index)
        training = mode == TRAIN
        size = self.args.per_device_train_batch_size if training else self.args.per_device_eval_batch_size

        def annotate(rollouts: list[Rollout]) -> None:
            with self.stop.deferred():  # the reference may stand in the policy's weights meanwhile
                self.loss_step.annotate(rollouts, size)

        if training:
            rollouts = self.supply.next(rows, index, self.metrics[mode], self.state, annotate)
        else:
            rollouts = self.sampling.make(rows, group, seed, self.metrics[mode], self.state, mode, annotate)
        if self.args.log_completions:
            self.completions.append(*(sample.to_json() for sample in self.sampling.samples))
        if training and self.args.steps_per_generation > self.args.gradient_accumulation_steps:
            # one generation serves several optimizer steps: mix the groups over them, as TRL does
            order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(seed))
            rollouts = [rollouts[i] for i in order.tolist()]
        self.metrics[mode].last("num_tokens", self.state.num_input_tokens_seen)
        return rollouts

    # Evaluation

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Samples, rewards and loss of one evaluation batch; parameters and buffered rollouts stay as they are."""
        rollouts = self._generate(inputs, self.num_generations_eval, EVAL, self._evaluated)
        self._evaluated += 1
        with torch.no_grad():
            loss = self.loss_step(self.loss_step.pack(rollouts), window_of(rollouts), self.metrics[EVAL])
        self.metrics[EVAL].settle()
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; every evaluation draws the same seeds, so that evaluations compare."""
        self._evaluated = 0
        if self.control.should_training_stop and not self.control.should_save:
            self.supply.hold()  # no step and no save is to come that would need what is being drawn
        return super().evaluation_loop(*args, **kwargs)

    # Logs

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add what was gathered since the last log, under TRL's names; keep it in ``metrics.jsonl``."""
        mode = TRAIN if self.model.training else EVAL
        prefix = "eval_" if mode == EVAL else ""
        # interned: every log stays in the state's history, and its keys would be strings of its own
        gathered = {sys.intern(f"{prefix}{name}"): value for name, value in self.metrics[mode].flush().items()}
        gathered.pop("eval_loss", None)
        logs.update(gathered)
        super().log(logs, start_time)
        self.history.append({"step": self.state.global_step, **logs})
        self._show_samples()

    def log_apart(self, logs: dict[str, Any]) -> None:
        """Log numbers that were not gathered between two logs, which stay gathered."""
        super().log(logs)
        self.history.append({"step": self.state.global_step, **logs})

    def _show_samples(self) -> None:
        """The table of the last generation, at the first step and every ``log_completions_steps``."""
        step = self.state.global_step
        if self.args.log_completions and (step == 1 or step % self.args.log_completions_steps == 0):
            print_samples(self.sampling.samples, step, self.args.num_completions_to_print, self.args.log_unique_prompts)
            self.sampling.samples = []

    def floating_point_ops(self, inputs: Any) -> int:
        """0: rows of a data set say nothing of the tokens that they become."""
        return 0
