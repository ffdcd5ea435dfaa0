"""The vLLM engine, `--model vllm:NAME` (extra `vllm`): offline batches on GPUs in this process, with prefix caching.

Not run on a GPU so far: its calls are tested against a stand-in of the same signatures (tests/test_engine_vllm.py),
written from vLLM's documentation. Many GPUs are better used through `vllm serve` and `openai:` (docs/scale.md).

Rows are encoded by `chat`, as for the local engine, so control tokens that a row spells stay text.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.engines.base import Completion, Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling, Text
from cai_cli.engines.local.prefix_cache import common_start
from cai_cli.engines.tokenization import encode_chat, encode_text
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.loading import load_tokenizer
from cai_cli.models.names import resolve

LIKELIEST = 20  # vLLM's default limit of log-probabilities a token


class VllmEngine(Engine):
    """Implements `Engine`. Noise comes from each ask's seed; kernels may differ in rounding with the batch."""

    def __init__(self, model: str, *, batch_size: int | None, device: str, dtype: str) -> None:
        """Raises: UsageError."""
        if device != "auto":
            raise UsageError("vllm: chooses its device itself", hint="CUDA_VISIBLE_DEVICES")
        self._name, self._dtype = model, dtype
        self.batch_size = batch_size or 1024

    @cached_property
    def path(self) -> Path:
        return resolve(self._name)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    @cached_property
    def llm(self) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise CaiError("vLLM is not installed", hint="pip install 'cai[vllm]' (needs a GPU)") from error
        return LLM(model=str(self.path), dtype=self._dtype, enable_prefix_caching=True, trust_remote_code=False)

    @cached_property
    def window(self) -> int:
        """Tokens that fit: prompt and answer together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    def identity(self) -> dict[str, Any]:
        return {"engine": "vllm", "fingerprint": fingerprint(self.path), "dtype": self._dtype}

    def speaks_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _encode(self, text: Text, continuation: str, new: int) -> list[int]:
        """Raises: RowError, CaiError as `encode_chat`."""
        if isinstance(text, str):
            ids = encode_text(self.tokenizer, text + continuation)
        else:
            ids = encode_chat(self.tokenizer, text, add_generation_prompt=True)
            ids += encode_text(self.tokenizer, continuation, start=False)
        if not ids or len(ids) + new > self.window:
            raise RowError(f"does not fit 1 to {self.window} tokens: {len(ids)} tokens + {new} new ones")
        return ids

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Mapping[str, Any]]) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        asked = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        found: list[Any] = self.llm.generate(asked, [SamplingParams(**p) for p in params], use_tqdm=False)
        return found

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """One answer per ask, in order. Raises: CaiError without vLLM, or where the model has no chat template."""
        replies: dict[int, Completion | RequestFailure] = {}
        prompts: dict[int, list[int]] = {}
        for index, ask in enumerate(asks):
            try:
                prompts[index] = self._encode(ask.text, ask.prefill, sampling.max_new_tokens)
            except RowError as error:
                replies[index] = RequestFailure(error.message)
        params = [
            {
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": asks[index].seed,
                "stop": list(asks[index].stop),
            }
            for index in prompts
        ]
        for (index, ids), output in zip(prompts.items(), self._run(list(prompts.values()), params), strict=True):
            best = output.outputs[0]
            if best.finish_reason in ("stop", "length"):
                replies[index] = Completion(best.text, best.finish_reason, len(ids), len(best.token_ids))
            else:
                replies[index] = RequestFailure(f"vLLM ended the reply with {best.finish_reason!r}")
        return [replies[index] for index in range(len(asks))]

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """For each request the natural log-probability of each option.

        Options of one token are read off the likeliest next tokens, behind cached prefixes; where one is not among
        them, or is longer, each option is run as the end of its prompt. Raises: CaiError as `generate`.
        """
        answers: dict[int, list[float] | RequestFailure] = {}
        starts: dict[int, list[int]] = {}
        ends: dict[int, list[list[int]]] = {}
        for index, request in enumerate(requests):
            try:
                prompt = self._encode(request.text, request.prefill, 1)
                wholes = [self._encode(request.text, request.prefill + option, 1) for option in request.options]
                if (start := min(common_start(prompt, whole) for whole in wholes)) == 0:
                    raise RowError("an option changes the first token of its prompt")
            except RowError as error:
                answers[index] = RequestFailure(error.message)
                continue
            starts[index], ends[index] = prompt[:start], [whole[start:] for whole in wholes]
        short = [index for index, options in ends.items() if all(len(option) == 1 for option in options)]
        params = {"max_tokens": 1, "temperature": 0.0, "logprobs": LIKELIEST}
        for index, output in zip(short, self._run([starts[i] for i in short], [params] * len(short)), strict=True):
            likeliest = output.outputs[0].logprobs[0]
            if all(option[0] in likeliest for option in ends[index]):
                answers[index] = [float(likeliest[option[0]].logprob) for option in ends[index]]
        left = [index for index in ends if index not in answers]
        whole_prompts = [starts[i] + option for i in left for option in ends[i]]
        params = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        outputs = iter(self._run(whole_prompts, [params] * len(whole_prompts)))
        for index in left:
            answers[index] = [_summed(next(outputs).prompt_logprobs, option) for option in ends[index]]
        return [answers[index] for index in range(len(requests))]


def _summed(positions: Sequence[Mapping[int, Any] | None], option: Sequence[int]) -> float:
    """The log-probabilities of the last tokens of a prompt, `option`, summed."""
    last = positions[len(positions) - len(option) :]
    return math.fsum(at[token].logprob for at, token in zip(last, option, strict=True) if at is not None)
