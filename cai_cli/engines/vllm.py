"""The vLLM engine, `--model vllm:NAME` (extra `vllm`): offline batches on GPUs in this process, with prefix caching.

It is tested with vLLM's CPU build (tests/integration/test_vllm.py); no test ran it on a GPU. `--engine-arg` reaches
vLLM's own settings, such as `tensor_parallel_size`. For many nodes use `vllm serve` and `openai:` (docs/scale.md).

`tokenization` encodes the rows, as for the local engine, so control tokens that a row spells stay text.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.common.library_errors import library_failures
from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.engines.base import (
    ChatOptions,
    Completion,
    Engine,
    GenerationRequest,
    LogprobRequest,
    RequestFailure,
    Sampling,
    Text,
    drop_broken_end,
)
from cai_cli.engines.local.prefix_cache import common_prefix_length
from cai_cli.engines.thoughts import without_thoughts
from cai_cli.engines.tokenization import PromptEncoder, decode_reply, end_of_turn_ids
from cai_cli.models.chat_template import recorded_template, use_chat_template
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.loading import load_generation_config, load_tokenizer
from cai_cli.models.names import resolve
from cai_cli.models.template_date import recorded_date

TOP_LOGPROBS = 20  # vLLM's default limit of log-probabilities per token
# Settings of vLLM that have an option or a fixed value here.
RESERVED = frozenset({"model", "dtype", "tokenizer", "trust_remote_code", "enable_prefix_caching", "seed"})
# Settings of vLLM that decide where and how fast it computes, as opposed to what. A resumed run may change them.
PLACEMENT = frozenset(
    {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "gpu_memory_utilization", "enforce_eager",
     "max_num_seqs", "max_num_batched_tokens", "swap_space", "cpu_offload_gb", "distributed_executor_backend"}
)  # fmt: skip


class VllmEngine(Engine):
    """Implements `Engine`. Each request's seed decides its noise; the rounding of kernels may depend on the batch."""

    def __init__(
        self,
        model: str,
        *,
        batch_size: int | None,
        device: str,
        dtype: str,
        engine_args: Mapping[str, Any],
        chat: ChatOptions | None = None,
    ) -> None:
        """Check the options; nothing is loaded.

        Args:
            engine_args: More arguments of vLLM's `LLM`, by name.
            chat: How chats are rendered.

        Raises:
            UsageError: `device` is not "auto", or an engine argument has an option of its own.
        """
        if reserved := sorted(RESERVED & engine_args.keys()):
            raise UsageError(f"--engine-arg {reserved[0]} cannot be set", code="option-conflict")
        if device != "auto":
            raise UsageError("vllm: models take no --device", hint="set CUDA_VISIBLE_DEVICES", code="option-conflict")
        self._name, self._dtype, self._engine_args = model, dtype, dict(engine_args)
        self.chat = chat or ChatOptions()
        self.batch_size = batch_size or 1024

    @cached_property
    def path(self) -> Path:
        """The directory of the model, which is fetched first if necessary."""
        return use_chat_template(resolve(self._name), self.chat.template)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.path)

    @cached_property
    def llm(self) -> Any:
        """vLLM's LLM object, created at first use. Raises CaiError without vLLM, or when it does not start."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise CaiError(
                "vLLM is not installed", hint="pip install '.[vllm]' (needs a GPU)", code="missing-dependency"
            ) from error
        with library_failures("vllm"):
            return LLM(
                model=str(self.path),
                dtype=self._dtype,
                enable_prefix_caching=True,
                trust_remote_code=False,
                **self._engine_args,
            )

    @cached_property
    def window(self) -> int:
        """The context window in tokens, prompt and answer together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer, as in the local engine."""
        return end_of_turn_ids(self.tokenizer, load_generation_config(self.path))

    def identity(self) -> dict[str, Any]:
        decisive = {name: value for name, value in self._engine_args.items() if name not in PLACEMENT}
        more = recorded_date(self.path) | recorded_template(self.path) | self.chat.recorded()
        more |= {"engine_args": decisive} if decisive else {}
        return {"engine": "vllm", "fingerprint": fingerprint(self.path), "dtype": self._dtype, **more}

    def supports_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Encodes the requests."""
        return PromptEncoder(self.tokenizer, self.chat)

    def _encode(self, text: Text, continuation: str, new: int, *, thinks: bool = False) -> list[int]:
        """The token ids of `text` followed by `continuation`, if they fit the window with `new` more tokens.

        Raises RowError, and CaiError as `PromptEncoder.encode`.
        """
        ids = self.encoder.encode(text, continuation, thinks=thinks)
        if not ids or len(ids) + new > self.window:
            raise RowError(
                f"does not fit 1 to {self.window} tokens: {len(ids)} tokens + {new} new ones", code="too-long"
            )
        return ids

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        token_prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        llm = self.llm
        with library_failures("vllm"):
            outputs: list[Any] = llm.generate(token_prompts, [SamplingParams(**p) for p in params], use_tqdm=False)
        return outputs

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """As `Engine.generate`.

        Raises:
            CaiError: vLLM is not installed, or the model has no chat template for a chat.
        """
        results: dict[int, Completion | RequestFailure] = {}
        prompts: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            try:
                thinks = self.encoder.may_think(request)
                prompts[index] = self._encode(request.text, request.prefill, sampling.max_new_tokens, thinks=thinks)
            except RowError as error:
                results[index] = RequestFailure(error.message)
        params = [
            {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": requests[index].seed,
                "stop": list(requests[index].stop),
                "stop_token_ids": sorted(self.end_ids),
            }
            for index in prompts
        ]
        for (index, ids), output in zip(prompts.items(), self._run(list(prompts.values()), params), strict=True):
            best = output.outputs[0]
            if best.finish_reason in ("stop", "length"):
                whole = Completion(*self._reply(best), len(ids), len(best.token_ids))
                results[index] = without_thoughts(whole, self.encoder.opened_in(requests[index]))
            else:
                results[index] = RequestFailure(f"vLLM ended the reply with {best.finish_reason!r}")
        return [results[index] for index in range(len(requests))]

    def _reply(self, best: Any) -> tuple[str, str]:
        """The text of vLLM's answer and its finish reason. Its own text is taken only where it ends at a stop string,
        which vLLM has cut off: it keeps an end of turn that is not a special token, and drops the tags of thoughts that
        are."""
        ids = list(best.token_ids)
        if ids and (ids[-1] in self.end_ids or best.finish_reason == CUT_OFF):
            return decode_reply(self.tokenizer, ids, self.end_ids)
        return drop_broken_end(best.text, best.finish_reason)

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """As `Engine.option_logprobs`.

        Options of one token are looked up among the most likely next tokens, behind cached prefixes. If one is not
        among them, or is longer, each option is run as the end of its prompt.

        Raises:
            CaiError: As `generate`.
        """
        results: dict[int, list[float] | RequestFailure] = {}
        starts: dict[int, list[int]] = {}
        ends: dict[int, list[list[int]]] = {}
        for index, request in enumerate(requests):
            try:
                prompt = self._encode(request.text, request.prefill, 1)
                wholes = [self._encode(request.text, request.prefill + option, 1) for option in request.options]
                if (start := min(common_prefix_length(prompt, whole) for whole in wholes)) == 0:
                    raise RowError("an option changes the first token of its prompt", code="request-failed")
            except RowError as error:
                results[index] = RequestFailure(error.message)
                continue
            starts[index], ends[index] = prompt[:start], [whole[start:] for whole in wholes]
        short = [index for index, options in ends.items() if all(len(option) == 1 for option in options)]
        params = {"max_tokens": 1, "temperature": 0.0, "logprobs": TOP_LOGPROBS}
        for index, output in zip(short, self._run([starts[i] for i in short], [params] * len(short)), strict=True):
            top_logprobs = output.outputs[0].logprobs[0]
            if all(option[0] in top_logprobs for option in ends[index]):
                results[index] = [float(top_logprobs[option[0]].logprob) for option in ends[index]]
        remaining = [index for index in ends if index not in results]
        whole_prompts = [starts[i] + option for i in remaining for option in ends[i]]
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        outputs = iter(self._run(whole_prompts, [params] * len(whole_prompts)))
        for index in remaining:
            results[index] = [_summed(next(outputs).prompt_logprobs, option) for option in ends[index]]
        return [results[index] for index in range(len(requests))]


def _summed(positions: Sequence[Mapping[int, Any] | None], option: Sequence[int]) -> float:
    """The summed log-probability of `option`, the last tokens of a prompt, from vLLM's prompt log-probabilities."""
    last = positions[len(positions) - len(option) :]
    return math.fsum(at[token].logprob for at, token in zip(last, option, strict=True) if at is not None)
