"""The local engine: runs a model (a directory, alias or Hub name) in torch on this machine's CPU or GPU.

`tokenization` encodes the rows and `sampling` draws the tokens. Nothing heavy is loaded before the first request.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cai_cli.common import console
from cai_cli.common.errors import RowError, UsageError
from cai_cli.engines.base import (
    ChatOptions,
    Completion,
    Engine,
    GenerationRequest,
    LogprobRequest,
    RequestFailure,
    Sampling,
)
from cai_cli.engines.local.kv_cache import KVCache
from cai_cli.engines.local.onednn import pack_linears
from cai_cli.engines.local.option_tokens import OptionTokens, log_probability
from cai_cli.engines.local.prefix_cache import (
    PrefixCache,
    TokenIds,
    common_prefix_length,
    enable_prefix_cache,
    prefix_groups,
    shared_prefix,
)
from cai_cli.engines.local.reduced_weights import check_int8, reduce_weights, reduces_weights
from cai_cli.engines.local.rope import fixed_rope, length_groups, rope_limits
from cai_cli.engines.local.sampling import (
    ActiveSequence,
    CompletionBuilder,
    draw,
    record_logprobs,
    uniforms,
)
from cai_cli.engines.thoughts import without_thoughts
from cai_cli.engines.tokenization import PromptEncoder, end_of_turn_ids
from cai_cli.models.chat_template import recorded_template, use_chat_template
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.loading import auto_dtype, context_window, load_causal_lm, load_tokenizer
from cai_cli.models.names import resolve
from cai_cli.models.template_date import recorded_date

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "int8")


class LocalEngine(Engine):
    """Implements `Engine`. A request gets the same text in every batch, except for rounding at near-ties."""

    def __init__(
        self, model: str, *, batch_size: int | None, device: str, dtype: str, chat: ChatOptions | None = None
    ) -> None:
        """Check the options; nothing is loaded.

        Args:
            model: A directory, alias or Hub name.
            batch_size: The most rows at once; None takes the default for the device.
            device: "cpu", "cuda" or "auto" (cuda if available).
            dtype: "float32", "bfloat16", "int8" (on CPUs only) or "auto" (float32 on the CPU, bfloat16 on cuda).
            chat: How chats are rendered.

        Raises:
            UsageError: `device` or `dtype` has another value, or this machine cannot run int8 weights.
        """
        if device not in DEVICES:
            raise UsageError(f"--device must be one of {', '.join(DEVICES)}, not {device!r}", code="invalid-option")
        if dtype not in DTYPES:
            raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}", code="invalid-option")
        self._name, self._device_option, self._dtype_option = model, device, dtype
        self.chat = chat or ChatOptions()
        if dtype == "int8":
            check_int8(self.device)
        self.batch_size: int = batch_size or (512 if self.device == "cuda" else 64)

    # --- the model --------------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> str:
        """The device as torch names it: "cpu" or "cuda"."""
        import torch

        if self._device_option == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self._device_option

    @cached_property
    def dtype(self) -> str:
        """The data type of the weights, by its name in torch; with some models that of linear layers alone."""
        return auto_dtype(self.device) if self._dtype_option == "auto" else self._dtype_option

    @cached_property
    def path(self) -> Path:
        """The directory of the model, which is fetched first if necessary."""
        return use_chat_template(resolve(self._name), self.chat.template)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.path)

    @cached_property
    def model(self) -> Any:
        """The model, loaded at first use."""
        model = load_causal_lm(self.path, "float32" if self.dtype == "int8" else self.dtype, self.device)
        if self.reduces_weights:
            reduce_weights(model, self.dtype)
        else:
            pack_linears(model)
        return model

    @cached_property
    def reduces_weights(self) -> bool:
        """Whether `dtype` is that of the linear layers' weights alone, and all else is float32. Raises UsageError."""
        return reduces_weights(self.path, self.device, self.dtype)

    @cached_property
    def window(self) -> int:
        """The context window in tokens, prompt and answer together."""
        return context_window(self.model.config, self.tokenizer)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The token ids that end an answer."""
        return end_of_turn_ids(self.tokenizer, self.model.generation_config)

    @cached_property
    def rope_limits(self) -> list[int]:
        """The row lengths at which the model's rotary positions change (`rope`)."""
        return rope_limits(self.model)

    @cached_property
    def uses_prefix_cache(self) -> bool:
        """Whether rows share the computation of their common prefix; other models run in transformers' own way."""
        enabled = enable_prefix_cache(self.model)
        if not enabled:
            kind = self.model.config.model_type
            console.warn(f"{self._name}: models of type {kind} are run by transformers' own loop, which is slower")
        return enabled

    @cached_property
    def max_cached_tokens(self) -> int:
        """The most tokens in the KV cache at once, which may fill half of what the weights leave free on a GPU, and an
        eighth of the machine's memory on a CPU."""
        import torch

        config = self.model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", 1)  # Mamba has none, and a state of one size for any length
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        heads = getattr(config, "num_key_value_heads", None) or heads
        bytes_per_token = 2 * int(config.num_hidden_layers) * heads * size * self.model.dtype.itemsize
        if self.device == "cuda":
            room = torch.cuda.mem_get_info()[0] // 2
        else:
            room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
        return int(room // bytes_per_token)

    def identity(self) -> dict[str, Any]:
        more = recorded_date(self.path) | recorded_template(self.path) | self.chat.recorded()
        if self.reduces_weights:
            more["activations"] = "float32"
        return {"engine": "local", "fingerprint": fingerprint(self.path), "dtype": self.dtype, **more}

    def supports_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Encodes the requests."""
        return PromptEncoder(self.tokenizer, self.chat)

    def _check_fits(self, prompt: int, new: int) -> None:
        if prompt == 0:
            raise RowError("the prompt is empty: it has no tokens", code="invalid-row")
        if prompt + new > self.window:
            # Rejected rows are counted by the text before the colon, so details of one row come after it.
            raise RowError(
                f"does not fit the context window of {self.window}: {prompt} tokens + {new} new ones", code="too-long"
            )

    def _new_cache(self, prefix: TokenIds, room: int) -> KVCache | PrefixCache:
        """The cache for rows that start with `prefix` and may grow by `room` tokens each."""
        pad_id = self.tokenizer.pad_token_id
        return PrefixCache(self.model, prefix, room) if self.uses_prefix_cache else KVCache(self.model, pad_id)

    def _count_fitting(self, sizes: Sequence[int], active: Sequence[int] = ()) -> int:
        """The number of waiting rows that can join the active ones.

        The limits are `batch_size` and `max_cached_tokens`, where each row takes the room of the longest. If no row is
        active, at least one joins.

        Args:
            sizes: The lengths of the waiting rows in tokens, in descending order.
            active: The lengths of the active rows.
        """
        longest = max([*active, *sizes[:1]])
        most_rows = min(self.batch_size, self.max_cached_tokens // longest)
        return min(len(sizes), max(most_rows - len(active), 0 if active else 1))

    # --- text -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """As `Engine.generate`.

        Raises:
            CaiError: The model's logits are not finite (`not-finite`), or it has no chat template for a chat
                (`no-chat-template`).
        """
        return [
            completion
            if isinstance(completion, RequestFailure)
            else without_thoughts(completion, self.encoder.opened_in(request))
            for request, completion in zip(requests, self.generate_whole(requests, sampling), strict=True)
        ]

    def generate_whole(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[Completion | RequestFailure]:
        """As `generate`, with the thoughts in the text. Raises CaiError as `generate`."""
        import torch

        results: dict[int, Completion | RequestFailure] = {}
        rows: list[ActiveSequence] = []
        for index, request in enumerate(requests):
            try:
                opened = self.encoder.opened_in(request)
                thinks = self.encoder.may_think(request)
                ids = self.encoder.encode(request.text, request.prefill, thinks=thinks)
                self._check_fits(len(ids), sampling.max_new_tokens)
            except RowError as error:
                results[index] = RequestFailure(error.message)
            else:
                noise = uniforms(request.seed, sampling.max_new_tokens)
                rows.append(ActiveSequence(index, request, tuple(ids), noise, opened=opened))
        with torch.inference_mode():
            results |= self._decode(rows, sampling) if rows else {}
        return [results[index] for index in range(len(requests))]

    def generate_ids(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> tuple[list[list[int]], list[list[float]]]:
        """As `generate`, for prompts that are already encoded.

        Args:
            prompts: The token ids of each prompt.
            seeds: The seed of each prompt's sampling noise.
            sampling: How tokens are sampled.

        Returns:
            The token ids of each answer with its end of turn, if it reached one, and the log-probability with which
            each token was drawn: natural logarithm, at the temperature, before top-p.

        Raises:
            CaiError: The model's logits are not finite.
        """
        import torch

        rows = [
            ActiveSequence(
                index, GenerationRequest("", seed), tuple(ids), uniforms(seed, sampling.max_new_tokens), logprobs=[]
            )
            for index, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        with torch.inference_mode():
            self._decode(rows, sampling)
        return [row.new for row in rows], [row.logprobs or [] for row in rows]

    def _decode(self, rows: Sequence[ActiveSequence], sampling: Sampling) -> dict[int, Completion]:
        """Generate every row to its end.

        Returns:
            The completions by the index of their request.
        """
        for limit in [*self.rope_limits, None]:
            with fixed_rope(self.model, limit):
                self._decode_up_to(limit, [row for row in rows if row.fits(limit)], sampling)
        return {row.index: row.completion for row in rows if row.completion is not None}

    def _decode_up_to(self, limit: int | None, rows: Sequence[ActiveSequence], sampling: Sampling) -> None:
        """Generate every row to its end or until it has more than `limit` tokens, by continuous batching: when rows
        end, waiting ones take their places."""
        import torch

        if not rows:
            return
        builder = CompletionBuilder(self.tokenizer, self.end_ids, sampling.max_new_tokens)
        prefix = shared_prefix([row.tokens for row in rows], [1] * len(rows)) if self.uses_prefix_cache else ()
        cache = self._new_cache(prefix, sampling.max_new_tokens)
        waiting = sorted(rows, key=lambda row: (len(row.tokens), row.tokens))
        active: list[ActiveSequence] = []
        tokens = torch.empty(0)
        while active or waiting:
            logits = [cache.step(tokens)] if active else []
            joining = self._take_joining(waiting, active, sampling, cache.can_join)
            if joining:
                logits += cache.add([row.tokens for row in joining], [1] * len(joining))
                active += joining
            noise = torch.tensor([row.noise[len(row.new)] for row in active], dtype=torch.float64, device=self.device)
            tokens = draw(last := torch.cat(logits), noise, sampling, [row.request.row for row in active])
            record_logprobs(active, last, tokens, sampling)
            for row, token in zip(active, tokens.tolist(), strict=True):
                builder.add(row, token)
            kept = _compacted([row.fits(limit) for row in active])
            if len(kept) < len(active):
                active = [active[place] for place in kept]
                cache.keep(kept)
                tokens = tokens[kept]

    def _take_joining(
        self, waiting: list[ActiveSequence], active: Sequence[ActiveSequence], sampling: Sampling, can_join: bool
    ) -> list[ActiveSequence]:
        """Take the rows that can join now out of `waiting`, whose longest come last."""
        free = self.batch_size - len(active)
        if active and (not can_join or free < self.batch_size / 8):  # joining a few at a time costs more passes
            return []
        sizes = [len(row.prompt) + sampling.max_new_tokens for row in reversed(waiting)]
        active_sizes = [len(row.prompt) + sampling.max_new_tokens for row in active]
        count = self._count_fitting(sizes, active_sizes) if waiting else 0
        return [waiting.pop() for _ in range(count)]

    # --- option log-probabilities -----------------------------------------------------------------------------

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """As `Engine.option_logprobs`.

        If an option changes how the end of the prompt is tokenised, all options of that request are scored from the
        first token in which they differ from the prompt.

        Raises:
            CaiError: As `generate`.
        """
        import torch

        failures: dict[int, RequestFailure] = {}
        scores: dict[int, list[float]] = {}
        by_context: dict[TokenIds, list[OptionTokens]] = {}
        for index, request in enumerate(requests):
            try:
                encoded = self._encode_options(index, request)
            except RowError as error:
                failures[index] = RequestFailure(error.message)
                continue
            scores[index] = [0.0] * len(request.options)
            for context, option in encoded:
                by_context.setdefault(context, []).append(option)
        with torch.inference_mode():
            contexts = list(by_context)
            for limit, indices in length_groups([len(context) for context in contexts], self.rope_limits):
                alike = [contexts[index] for index in indices]
                with fixed_rope(self.model, limit):
                    for group in prefix_groups(alike) if self.uses_prefix_cache else [alike]:
                        for option, value in self._score(group, by_context):
                            scores[option.request][option.index] = value
        return [failures.get(index) or scores[index] for index in range(len(requests))]

    def _score(
        self, group: Sequence[TokenIds], by_context: Mapping[TokenIds, Sequence[OptionTokens]]
    ) -> Iterator[tuple[OptionTokens, float]]:
        """The options of these contexts, which share a prefix, with their log-probabilities."""
        waiting = sorted(group, key=len, reverse=True)
        keeps = [max(1, *(len(option.tokens) for option in by_context[context])) for context in waiting]
        cache = self._new_cache(shared_prefix(waiting, keeps) if self.uses_prefix_cache else (), 0)
        done = 0
        while done < len(waiting):
            batch = slice(done, done + self._count_fitting([len(context) for context in waiting[done:]]))
            for context, logits in zip(waiting[batch], cache.add(waiting[batch], keeps[batch]), strict=True):
                for option in by_context[context]:
                    yield option, log_probability(logits, option)
            cache.keep([])
            done = batch.stop

    def _encode_options(self, index: int, request: LogprobRequest) -> list[tuple[TokenIds, OptionTokens]]:
        """For each option the context to run the model on, and the option's tokens at its end."""
        prompt = self.encoder.encode(request.text, request.prefill)
        wholes = [self.encoder.encode(request.text, request.prefill + option) for option in request.options]
        start = min(common_prefix_length(prompt, whole) for whole in wholes)
        self._check_fits(start, max(len(whole) for whole in wholes) - start)
        return [
            (tuple(whole[:-1]), OptionTokens(index, option, tuple(whole[start:]), request.row))
            for option, whole in enumerate(wholes)
        ]


def _compacted(keep: Sequence[bool]) -> list[int]:
    """The indices of the rows to keep, with the last ones moved into the gaps, so that few rows move."""
    places = [place for place, kept in enumerate(keep) if kept]
    movable = [place for place in places if place >= len(places)]
    return [place if keep[place] else movable.pop() for place in range(len(places))]
