"""Saving and resuming for the trainer: whole checkpoints, and a position from which the run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState, TrainerState

from ..config.errors import ConfigError
from ..lora.active import adapter_names, live_names
from ..lora.io import WEIGHTS, save_lora
from .checkpoint import rotate, to_resume, writing
from .loss_step import LossStep
from .metrics import History, Metrics
from .run_state import RunState
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
    supply: Supply

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the start or from a whole checkpoint.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint in ``output_dir``, or a folder; None takes
                ``args.resume_from_checkpoint``.

        Raises:
            ConfigError: nothing whole to resume from, a finished run, settings that changed the order of the data, or
                an ``output_dir`` with checkpoints of an earlier run where no resume is asked.
        """
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = to_resume(self.args.output_dir, asked, self.args.overwrite_output_dir)
        step = 0
        self.position, saved = RunState(), {}
        self.supply.reset()
        if checkpoint is not None:
            step = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
            if 0 < self.args.max_steps <= step:
                raise ConfigError(
                    f"{checkpoint} is at step {step} and max_steps={self.args.max_steps}: nothing is left to train; "
                    "raise max_steps or leave resume_from_checkpoint out"
                )
            self.position = RunState.load(checkpoint)
            self._check_cursor(checkpoint)
            saved = self.position.metrics
            if "supply" in self.position.parts:
                self.supply.load_state_dict(self.position.parts["supply"])
        for mode, metrics in self.metrics.items():
            metrics.load(saved if mode == "train" else {})
        self.loss_step.resume(self.position.entropy, checkpoint)
        self.history.start(step)
        if self.args.log_completions:
            self.completions.start(step)
        result = super().train(  # type: ignore[misc]
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs
        )
        self.supply.settle()
        return result

    def _cursor(self) -> dict[str, Any]:
        return {name: getattr(self.args, name) for name in _ARGUMENTS_THAT_PLACE_THE_CURSOR}

    def _check_cursor(self, checkpoint: Path) -> None:
        for name, now in self._cursor().items():
            then = self.position.cursor.get(name, now)
            if then != now:
                raise ConfigError(
                    f"{checkpoint} was written with {name}={then}, now it is {now}: the run would replay or skip data; "
                    f"set {name}={then}"
                )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write ``checkpoint-<step>``: whole, or not there; older ones go only after it stands."""
        self.store_flos()  # type: ignore[attr-defined]
        output_dir, step = Path(self.args.output_dir), self.state.global_step
        final = output_dir / f"checkpoint-{step}"
        if self.state.best_global_step:
            best = output_dir / f"checkpoint-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        with writing(final) as folder:
            self._write(str(folder))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))  # type: ignore[attr-defined]
        rotate(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _write(self, folder: str) -> None:
        trainer: Any = self
        trainer.save_model(folder, _internal_call=True)
        if not self.args.save_only_model:
            trainer._save_optimizer_and_scheduler(folder)
            trainer._save_scaler(folder)
            trainer._save_rng_state(folder)
        reuse = self.args.steps_per_generation * self.args.num_iterations
        used_up = self.position.micro_steps % reuse == 0
        RunState(
            micro_steps=self.position.micro_steps,
            buffer=[] if used_up else self.position.buffer,
            metrics=self.metrics["train"].state(),
            cursor=self._cursor(),
            entropy=self.loss_step.bonus.state(),
            parts={"supply": self.supply.state_dict()},
        ).save(folder)
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
