"""``step`` of bitsandbytes' two-state optimizers, with all tensors that one kernel can take in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from bitsandbytes.functional import create_dynamic_map
from bitsandbytes.optim.optimizer import Optimizer2State
from bitsandbytes.utils import sync_gpu

from ..kernels.adamw8bit import Rule, Slot, rule
from .members import STATES, Bucket, Member, fits, takes

Place = tuple[dict[str, Any], torch.Tensor, int, int]
"""Group, parameter, group index, index in the group: what bitsandbytes' methods take."""


class OneLaunch(Optimizer2State):
    """Mixed in before one of bitsandbytes' AdamW classes.

    ``step`` neither waits for the GPU nor asks for pages. bitsandbytes synchronizes after every paged tensor; but a
    kernel on the same stream sees what earlier ones wrote, in managed memory too, and pages come to the GPU when they
    are first touched and stay. Only the processor must wait before it reads managed memory: ``state_dict`` does.
    """

    initialized: bool
    _members: dict[torch.Tensor, Member | None] | None = None
    _buckets: tuple[Bucket, ...] = ()
    _maps: ClassVar[dict[torch.device, list[torch.Tensor]]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        if self._stale():
            self._prepare()
        members: Any = self._members
        rules: list[Rule] = []
        numbers: dict[tuple[int, ...], int] = {}
        others = []
        for place in self._places():
            group, param, gindex, pindex = place
            member, gradient = members[param], param.grad
            if member is None or gradient is None or not fits(gradient, param):
                others.append(place)
                continue
            step = member.state["step"] = member.state["step"] + 1
            key = (gindex, step, pindex) if self._overridden(place) else (gindex, step)
            number = numbers.get(key)
            if number is None:
                config = self.get_config(gindex, pindex, group)
                number = numbers[key] = len(rules)
                rules.append(rule(config["lr"], config["betas"], config["eps"], config["weight_decay"], step))
            member.bucket.gradients[member.number] = gradient
            member.bucket.which[member.number] = number
        for bucket in self._buckets:
            bucket.launch(rules)
        for place in others:
            self._step_alone(place)
        return loss

    def _places(self) -> Iterator[Place]:
        for gindex, group in enumerate(self.param_groups):
            for pindex, param in enumerate(group["params"]):
                if param.grad is not None:
                    yield group, param, gindex, pindex

    def _overridden(self, place: Place) -> bool:
        _, param, gindex, pindex = place
        return id(param) in self.mng.pid2config or (gindex, pindex) in self.mng.index2config

    def _stale(self) -> bool:
        """Whether a parameter is new, or it or its state has moved since the tables were made."""
        members = self._members
        if members is None:
            return True
        for _, param, _, _ in self._places():
            if param not in members:
                return True
            member = members[param]
            if member is not None and not (member.state is self.state.get(param) and member.holds()):
                return True
        return False

    def _prepare(self) -> None:
        """Initialise the states that are missing, as bitsandbytes does, and sort all tensors into buckets."""
        for group, param, gindex, pindex in self._places():
            if len(self.state[param]) == 0:
                self.init_state(group, param, gindex, pindex)
        buckets: dict[tuple[torch.device, torch.dtype], Bucket] = {}
        members: dict[torch.Tensor, Member | None] = {}
        for gindex, group in enumerate(self.param_groups):
            for pindex, param in enumerate(group["params"]):
                state = self.state.get(param) or {}
                config = self.get_config(gindex, pindex, group)
                plain = not (config["max_unorm"] > 0.0 or config["skip_zeros"])
                if plain and takes(param, state) and self._share_maps(param, state):
                    key = (param.device, param.dtype)
                    bucket = buckets.setdefault(key, Bucket((state["qmap1"], state["qmap2"])))
                    number = bucket.add(Slot(param, *(state[name] for name in STATES)))
                    members[param] = Member(param, state, bucket, number, param.data_ptr())
                elif state:
                    members[param] = None
        self._members, self._buckets = members, tuple(buckets.values())

    def _share_maps(self, param: torch.Tensor, state: dict[str, Any]) -> bool:
        """Whether the state is in the dynamic maps, which the kernel knows; copies of one give way to one for all."""
        maps = self._maps.get(param.device)
        if maps is None:
            maps = self._maps[param.device] = [create_dynamic_map(signed).to(param.device) for signed in (True, False)]
        for name, ours in zip(("qmap1", "qmap2"), maps):
            theirs = state[name]
            if theirs is not ours:
                if theirs.device != ours.device or not torch.equal(theirs, ours):
                    return False
                state[name] = ours
        return True

    def _step_alone(self, place: Place) -> None:
        """bitsandbytes' own step of one tensor. Its kernels run on the default stream, whichever is current."""
        group, param, gindex, pindex = place
        self.prefetch_state(param)
        if not param.is_cuda:
            self.update_step(group, param, gindex, pindex)
            sync_gpu(param)
            return
        current, default = torch.cuda.current_stream(param.device), torch.cuda.default_stream(param.device)
        default.wait_stream(current)
        self.update_step(group, param, gindex, pindex)
        current.wait_stream(default)

    def state_dict(self) -> dict[str, Any]:
        """As bitsandbytes', after the GPU is done: managed memory is about to be read by the processor."""
        self._wait()
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """As bitsandbytes'; takes what bitsandbytes' classes saved."""
        self._wait()  # the dict may be another optimizer's live state
        super().load_state_dict(state_dict, move_to_device=move_to_device)
        self._members = None

    def _wait(self) -> None:
        if self.is_paged and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
