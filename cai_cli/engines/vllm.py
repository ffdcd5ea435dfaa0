"""The vLLM engine, `--model vllm:NAME` (extra `vllm`): offline batches on GPUs in this process, with prefix caching.

It has not been run on a GPU. Its calls are tested against a stand-in with the same signatures
(tests/engines/test_vllm.py), written from vLLM's documentation. For many GPUs use `vllm serve` and `openai:`
(docs/scale.md).

`tokenization` encodes the rows, as for the local engine, so control tokens that a row spells stay text.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.engines.base import (
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
from cai_cli.engines.tokenization import decode_reply, encode_chat, encode_text, end_of_turn_ids
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.loading import load_generation_config, load_tokenizer
from cai_cli.models.names import resolve
from cai_cli.models.template_date import recorded_date

TOP_LOGPROBS = 20  # vLLM's default limit of log-probabilities per token


class VllmEngine(Engine):
    """Implements `Engine`. Each request's seed decides its noise; the rounding of kernels may depend on the batch."""

    def __init__(self, model: str, *, batch_size: int | None, device: str, dtype: str) -> None:
        """Check the options; nothing is loaded.

        Raises:
            UsageError: `device` is not "auto".
        """
        if device != "auto":
            raise UsageError("vllm: models take no --device", hint="set CUDA_VISIBLE_DEVICES", code="option-conflict")
        self._name, self._dtype = model, dtype
        self.batch_size = batch_size or 1024

    @cached_property
    def path(self) -> Path:
        """The directory of the model, which is fetched first if necessary."""
        return resolve(self._name)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.path)

    @cached_property
    def llm(self) -> Any:
        """vLLM's LLM object, created at first use. Raises CaiError without vLLM."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise CaiError(
                "vLLM is not installed", hint="pip install 'cai[vllm]' (needs a GPU)", code="missing-dependency"
            ) from error
        return LLM(model=str(self.path), dtype=self._dtype, enable_prefix_caching=True, trust_remote_code=False)

    @cached_property
    def window(self) -> int:
        """The context window in tokens, prompt and answer together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer, as in the local engine."""
        return end_of_turn_ids(self.tokenizer, load_generation_config(self.path))

    def identity(self) -> dict[str, Any]:
        recorded = recorded_date(self.path)
        return {"engine": "vllm", "fingerprint": fingerprint(self.path), "dtype": self._dtype, **recorded}

    def supports_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _encode(self, text: Text, continuation: str, new: int) -> list[int]:
        """The token ids of `text` followed by `continuation`, if they fit the window with `new` more tokens.

        Raises RowError, and CaiError as `encode_chat`.
        """
        if isinstance(text, str):
            ids = encode_text(self.tokenizer, text + continuation)
        else:
            ids = encode_chat(self.tokenizer, text, add_generation_prompt=True)
            ids += encode_text(self.tokenizer, continuation, start=False)
        if not ids or len(ids) + new > self.window:
            raise RowError(
                f"does not fit 1 to {self.window} tokens: {len(ids)} tokens + {new} new ones", code="too-long"
            )
        return ids

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        token_prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs: list[Any] = self.llm.generate(token_prompts, [SamplingParams(**p) for p in params], use_tqdm=False)
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
                prompts[index] = self._encode(request.text, request.prefill, sampling.max_new_tokens)
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
                results[index] = Completion(*self._reply(best), len(ids), len(best.token_ids))
            else:
                results[index] = RequestFailure(f"vLLM ended the reply with {best.finish_reason!r}")
        return [results[index] for index in range(len(requests))]

    def _reply(self, best: Any) -> tuple[str, str]:
        """The text of vLLM's answer and its finish reason. vLLM keeps an end of turn that is not a special token in the
        text; a stop string is cut off already."""
        if best.token_ids and best.token_ids[-1] in self.end_ids:
            return decode_reply(self.tokenizer, list(best.token_ids), self.end_ids)
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
