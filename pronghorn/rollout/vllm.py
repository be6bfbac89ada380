"""An engine over an installed vLLM, for machines where a second copy of the weights is no hardship."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from ..config.adapters import LIVE, AdapterChoice, Live, LoraHandle
from ..config.errors import ConfigError
from ..config.sampling import SamplingParams
from ..lora.io import save_lora
from ..models.state import state_of
from .base import CompletionOutput, Drawing, KeptPolicy, Logprob, Progress, RequestOutput

# SamplingParams fields that vLLM takes under the same name.
_SHARED = (
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "max_tokens", "min_tokens", "include_stop_str_in_output", "ignore_eos", "seed", "skip_special_tokens", "detokenize",
)  # fmt: skip


class VLLMEngine:
    """vLLM in the same process, given the live adapter as a LoRA request.

    What it costs, beside the native engine: a second copy of the base weights on the GPU, read from disk again at the
    first use and set up for minutes; a save of the adapter for each new policy; kernels other than the trainer's, so
    its log-probs differ from the trainer's by more. A model without an adapter (full fine-tuning) cannot be kept in
    step with it and is refused after its weights changed. vLLM reports the log-prob of the distribution that it drew
    from, so settings that change the distribution beyond temperature have no ``policy_logprobs`` and are refused.

    Args:
        model: a Pronghorn model loaded from a folder or the hub; vLLM reads the same source.
        tokenizer: for its name only; vLLM loads its own.
        max_seq_length, gpu_memory_utilization: default as the model was loaded.
        llm_options: further keyword arguments of ``vllm.LLM``.

    Raises:
        ConfigError: vLLM is not installed, or the model has no source on disk.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_seq_length: int | None = None,
        gpu_memory_utilization: float | None = None,
        **llm_options: Any,
    ) -> None:
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ConfigError(
                "rollout engine 'vllm' needs the vllm package, which cannot be imported "
                f"({error}); pip install vllm, or use the native engine, which needs nothing more"
            ) from error
        state = state_of(model)
        if state.source is None:
            raise ConfigError("rollout engine 'vllm' reads weights from disk, and this model has none; use 'native'")
        self.model = model
        self.tokenizer = tokenizer
        self._vllm, self._lora_request = vllm, LoRARequest
        self.max_seq_length = max_seq_length or state.max_seq_length
        options: dict[str, Any] = {
            "model": state.source.folder,
            "dtype": str(state.compute_dtype).removeprefix("torch."),
            "max_model_len": self.max_seq_length,
            "gpu_memory_utilization": gpu_memory_utilization or state.gpu_memory_utilization,
            "enable_lora": True,
            "max_lora_rank": _vllm_rank(state.max_lora_rank),
            "logprobs_mode": "processed_logprobs",
            "enable_sleep_mode": True,
        }
        if state.load_in_4bit:
            options["quantization"] = "bitsandbytes"
        self._llm = vllm.LLM(**{**options, **llm_options})
        self._asleep = False
        self._changed = False
        self._version = 0
        self._folder: Path | None = None
        self._live: Any = None

    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams | Seq[SamplingParams],
        adapter: AdapterChoice = LIVE,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """See :class:`pronghorn.rollout.base.Engine`; ``progress`` is called once, at the end."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts with {len(each)} sampling_params; give one, or one for each")
        for row, ids in enumerate(prompts):
            if not 0 < len(ids) < self.max_seq_length:
                raise ConfigError(
                    f"prompts[{row}] has {len(ids)} tokens; give 1 to {self.max_seq_length - 1}, or load the model "
                    f"with a larger max_seq_length (now {self.max_seq_length})"
                )
        theirs = [self._params(settings) for settings in each]
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False
        results = self._llm.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            theirs,
            lora_request=self._request(adapter),
            use_tqdm=False,
        )
        outputs = [_convert(result, settings) for result, settings in zip(results, each)]
        if progress is not None:
            done = [c for o in outputs for c in o.outputs]
            progress(len(done), len(done), sum(len(c.token_ids) for c in done))
        return outputs

    def ready(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams | Seq[SamplingParams],
        keep_share: float,
        policy: KeptPolicy | None = None,
    ) -> Drawing:
        """Raises: vLLM is not asked from a second thread."""
        raise ConfigError("rollout engine 'vllm' cannot draw while the policy trains (rollout_overlap); use 'native'")

    def release(self) -> None:
        """Put vLLM to sleep: its cache is freed and its weights move to the host's memory."""
        if not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = True

    def rest(self, keep_share: float) -> bool:
        """False: vLLM stays awake, as under TRL's defaults: to sleep, it moves its weights to the host's memory."""
        return False

    def check_exact(self) -> None:
        """Raises: other kernels than the trainer's sum in another order."""
        raise ConfigError("rollout engine 'vllm' cannot be exact: its kernels are not the trainer's; use 'native'")

    def policy_changed(self) -> None:
        """The adapter is saved anew before the next live request; vLLM's prefix cache is dropped."""
        self._changed = True
        self._live = None
        if not self._asleep:
            self._llm.reset_prefix_cache()

    def _params(self, ours: SamplingParams) -> Any:
        for name, off in {"top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "repetition_penalty": (1.0,),
                          "presence_penalty": (0,), "frequency_penalty": (0,), "min_tokens": (0,)}.items():  # fmt: skip
            if getattr(ours, name) not in off:
                raise ConfigError(
                    f"SamplingParams: {name}={getattr(ours, name)!r} with the engine 'vllm': vLLM cannot report the "
                    "policy's log-probs beside those it drew from; leave it out, or use the engine 'native'"
                )
        return self._vllm.SamplingParams(
            **{name: getattr(ours, name) for name in _SHARED},
            stop=list(ours.stop),
            stop_token_ids=list(ours.stop_token_ids),
            logprobs=ours.logprobs or 0,
        )

    def _request(self, adapter: AdapterChoice) -> Any:
        """The LoRARequest of an adapter; live ones get odd ids, loaded ones even, so none is ever used twice."""
        if adapter is None:
            return None
        if isinstance(adapter, LoraHandle):
            return self._lora_request(adapter.name, 2 * adapter.id + 2, adapter.path)
        assert isinstance(adapter, Live)
        if not hasattr(self.model, "peft_config"):
            if self._changed:
                raise ConfigError(
                    "rollout engine 'vllm' holds its own copy of the weights and cannot follow full_finetuning=True; "
                    "use LoRA, or the engine 'native'"
                )
            return None
        if self._live is None:
            self._version += 1
            if self._folder is not None:
                shutil.rmtree(self._folder)
            self._folder = Path(tempfile.mkdtemp(prefix="pronghorn-adapter-"))
            save_lora(self.model, str(self._folder / "adapter"))
            self._live = self._lora_request(
                f"live-{self._version}", 2 * self._version + 1, str(self._folder / "adapter")
            )
        return self._live


def _vllm_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` that vLLM accepts and that holds ``rank``."""
    sizes = (8, 16, 32, 64, 128, 256, 320, 512)
    fitting = [size for size in sizes if size >= rank]
    if not fitting:
        raise ConfigError(f"max_lora_rank={rank} is over vLLM's limit of {sizes[-1]}; use the engine 'native'")
    return fitting[0]


def _convert(result: Any, settings: SamplingParams) -> RequestOutput:
    outputs = []
    for completion in result.outputs:
        ids = list(completion.token_ids)
        drawn = [step[token].logprob for step, token in zip(completion.logprobs, ids)]
        table = None
        if settings.logprobs is not None:
            table = [
                {i: Logprob(x.logprob, x.rank, x.decoded_token) for i, x in step.items()}
                for step in completion.logprobs
            ]
        outputs.append(
            CompletionOutput(
                index=completion.index,
                text=completion.text,
                token_ids=ids,
                token_logprobs=drawn,
                policy_logprobs=list(drawn),
                cumulative_logprob=math.fsum(drawn),
                finish_reason=completion.finish_reason,
                stop_reason=completion.stop_reason,
                logprobs=table,
            )
        )
    return RequestOutput(result.request_id, result.prompt, list(result.prompt_token_ids), outputs)
