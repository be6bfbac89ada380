"""Saving and resuming for the trainer: whole checkpoints, and a position from which the run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState, TrainerState

from ..config.errors import ConfigError
from ..lora.active import adapter_names, live_names
from ..lora.io import WEIGHTS, save_lora
from .checkpoint import rotate, to_resume, whole_checkpoints, writing
from .disk import room_on_disk
from .generators import Generators
from .loss_step import LossStep
from .metrics import History, Metrics
from .run_state import FILE as STATE
from .run_state import RunState, StepStart
from .stateful import StatefulParts
from .stop_signal import StopRequested, StopSignal
from .supply import Supply

_ARGUMENTS_THAT_PLACE_THE_CURSOR = (
    "seed", "num_generations", "steps_per_generation", "num_iterations", "gradient_accumulation_steps",
    "generation_batch_size", "shuffle_dataset", "dynamic_sampling", "curriculum", "rollout_staleness",
)  # fmt: skip


class SavingMixin:
    """Overrides of transformers' Trainer; ``GRPOTrainer`` brings the attributes."""

    args: Any
    model: Any
    state: Any
    position: RunState
    metrics: dict[str, Metrics]
    history: History
    completions: History
    loss_step: LossStep
    stateful: StatefulParts
    stop: StopSignal
    control: Any
    _epoch_ends_at: int
    _saved_at: int
    _step_start: StepStart | None
    supply: Supply

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the start or from a whole checkpoint.

        SIGTERM saves a checkpoint and raises ``SystemExit(0)``: within a step, the checkpoint is of the step's start.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint in ``output_dir``, or a folder; None takes
                ``args.resume_from_checkpoint``.

        Raises:
            ConfigError: nothing whole to resume from, a finished run, settings that changed the order of the data, or
                an ``output_dir`` with checkpoints of an earlier run where no resume is asked.
            NonFiniteGradients: ``max_consecutive_skipped_steps`` steps in a row were skipped.
            OSError: the disk is full, or another write failed; the last whole checkpoint stands.
        """
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = to_resume(self.args.output_dir, asked, self.args.overwrite_output_dir)
        self.position, self._step_start = RunState(), None
        self.supply.reset()
        self._epoch_ends_at = self._saved_at = -1
        step = None if checkpoint is None else self._take_up(checkpoint)
        for mode, metrics in self.metrics.items():
            metrics.load(self.position.metrics if mode == "train" else {})
        self.loss_step.resume(self.position.entropy, checkpoint)
        self.history.start(step)
        if self.args.log_completions:
            self.completions.start(step)
        evaluates = self.args.eval_on_start
        self.args.eval_on_start = evaluates and checkpoint is None  # a resumed run has done it, and its log holds it
        with self.stop.listening():
            try:
                result = super().train(  # type: ignore[misc]
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs
                )
            except StopRequested:
                self._rewind()
            finally:
                self.args.eval_on_start = evaluates
            if self.stop.requested:
                self._save_and_exit()
        return result

    def _take_up(self, checkpoint: Path) -> int:
        """Read the run's position from ``checkpoint``; returns its step."""
        step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
        *_, last = self.set_initial_training_values(self.args, self.get_train_dataloader())  # type: ignore[attr-defined]
        if step >= last:
            wanted = f"max_steps={last}"
            if self.args.max_steps <= 0:
                wanted = f"num_train_epochs={self.args.num_train_epochs} ends at step {last}"
            raise ConfigError(
                f"{checkpoint} is at step {step} and {wanted}: nothing is left to train; raise "
                f"{wanted.split('=')[0]} or leave resume_from_checkpoint out"
            )
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth", STATE):
            if not (checkpoint / name).is_file():
                raise ConfigError(
                    f"{checkpoint} has no {name} (save_only_model=True writes none): the run cannot go on from it; "
                    "load its adapter and start anew, with save_only_model=False"
                )
        self.position = RunState.load(checkpoint)
        self._check_cursor(checkpoint)
        self.stateful.check(self.position.parts, str(checkpoint))
        self.stateful.load_state_dict(self.position.parts)
        self.position.parts = {}  # there may be a whole adapter in it, which a part lets go of once it is used
        if checkpoint.resolve().parent == Path(self.args.output_dir).resolve():
            self._saved_at = int(step)
        return int(step)

    def _cursor(self) -> dict[str, Any]:
        cursor = {name: getattr(self.args, name) for name in _ARGUMENTS_THAT_PLACE_THE_CURSOR}
        return {**cursor, "len(train_dataset)": len(self.train_dataset)}  # type: ignore[attr-defined]

    def _check_cursor(self, checkpoint: Path) -> None:
        for name, now in self._cursor().items():
            then = self.position.cursor.get(name, now)
            if then != now:
                raise ConfigError(
                    f"{checkpoint} was written with {name}={then}, now it is {now}: the run would replay or skip data; "
                    f"set {name}={then}"
                )

    def _run_state(self, parts: dict[str, Any]) -> RunState:
        """The position now, at the edge of an optimizer step."""
        reuse = self.args.steps_per_generation * self.args.num_iterations
        used_up = self.position.micro_steps % reuse == 0
        return RunState(
            micro_steps=self.position.micro_steps,
            buffer=[] if used_up else list(self.position.buffer),
            metrics=self.metrics["train"].state(),
            cursor=self._cursor(),
            entropy=self.loss_step.bonus.state(),
            parts=parts,
        )

    def _begin_step(self) -> None:
        """Note what the step that begins will change, for a stop within it."""
        self._step_start = StepStart(
            self._run_state({}), self.stateful.noted(), self.state.num_input_tokens_seen, Generators.now()
        )

    def _rewind(self) -> None:
        """Back to the start of the step that was stopped."""
        start = self._step_start
        if start is None:
            raise RuntimeError("a step was stopped that had not begun")
        self.position = start.position
        self.metrics["train"].load(start.position.metrics)
        self.stateful.load_state_dict(start.parts())
        self.loss_step.bonus.load(start.position.entropy)
        self.state.num_input_tokens_seen = start.tokens_seen
        start.generators.restore()

    def _save_and_exit(self) -> None:
        final = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._saved_at != self.state.global_step or self.args.save_only_model:
            self._save_checkpoint(self.model, None)
        print(f"Pronghorn: stopped by SIGTERM; {final} is whole, train(resume_from_checkpoint=True) goes on from it")
        raise SystemExit(0)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but a save that is due at an epoch's last step waits for what the epoch's end brings.

        That follows at once: logs and evaluations of ``"epoch"`` strategies. Saved before them, a checkpoint would lose
        them for a run that is killed in between.
        """
        step = self.state.global_step
        last_of_epoch = self.state.epoch == int(self.state.epoch) and self._epoch_ends_at != step
        self._epoch_ends_at = step if last_of_epoch else self._epoch_ends_at
        waits = last_of_epoch and self.control.should_save
        self.control.should_save = self.control.should_save and not waits
        super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        self.control.should_save = self.control.should_save or waits

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-<step>``: whole, or not there; older ones go only after it stands."""
        self.store_flos()  # type: ignore[attr-defined]
        output_dir, step = Path(self.args.output_dir), self.state.global_step
        final = output_dir / f"checkpoint-{step}"
        if self.state.best_global_step:
            best = output_dir / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        whole = whole_checkpoints(output_dir)
        remedy = f"{whole[-1].name} is whole: " if whole else "no earlier one stands: "
        remedy += "free space (save_total_limit keeps fewer), then train(resume_from_checkpoint=True)"
        with room_on_disk(output_dir, final.name, remedy), writing(final) as folder:
            self.history.sync()
            self.completions.sync()
            with room_on_disk(output_dir, final.name, remedy):  # looked at before the unfinished folder goes
                self._write(str(folder))
        self._saved_at = step
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))  # type: ignore[attr-defined]
        rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write(self, folder: str) -> None:
        trainer: Any = self
        trainer.save_model(folder, _internal_call=True)
        if not self.args.save_only_model or self.stop.requested:  # a stopped run is to go on
            trainer._save_optimizer_and_scheduler(folder)
            trainer._save_scaler(folder)
            trainer._save_rng_state(folder)
        self._run_state(self.stateful.state_dict()).save(folder)
        if self.loss_step.reference is not None:
            self.loss_step.reference.save(folder)
        callbacks = [*trainer.callback_handler.callbacks, trainer.control]
        exported: dict[str, Any] = {}
        for callback in [cb for cb in callbacks if isinstance(cb, ExportableState)]:
            name, known = type(callback).__name__, exported.get(type(callback).__name__)
            exported[name] = callback.state() if known is None else [*_listed(known), callback.state()]
        self.state.stateful_callbacks.update(exported)
        self.state.save_to_json(f"{folder}/{TRAINER_STATE_NAME}")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The live adapter alone as plain PEFT (not those loaded beside it), or the whole model without one."""
        folder = Path(output_dir or self.args.output_dir)
        if not adapter_names(self.model):
            super()._save(str(folder), state_dict)  # type: ignore[misc]
            return
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / "adapter.new"
        save_lora(self.model, own)
        for path in own.iterdir():
            path.replace(folder / path.name)
        own.rmdir()
        trainer: Any = self
        trainer.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Put the checkpoint's weights into the live adapter, in place, every tensor accounted for."""
        model = self.model if model is None else model
        if not adapter_names(model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        path = Path(resume_from_checkpoint) / WEIGHTS
        if not path.is_file():
            raise ConfigError(f"{resume_from_checkpoint} has no {WEIGHTS}; it was written by a run without LoRA")
        name = live_names(model)[0]
        result = set_peft_model_state_dict(model, load_file(str(path)), adapter_name=name)
        absent = [key for key in result.missing_keys if f".{name}." in key]
        if absent or result.unexpected_keys:
            raise ConfigError(
                f"{path} does not fit this model's adapter: missing {absent[:3]}, unexpected "
                f"{list(result.unexpected_keys)[:3]}; use the LoRA settings of the run that wrote it"
            )


def _listed(state: Any) -> list[Any]:
    return state if isinstance(state, list) else [state]
