"""The local engine: a model of a directory, alias or Hub name on this machine's CPU or GPU, in torch.

Rows are encoded by `chat`, drawn by `decoding`. Nothing heavy is loaded before the first request.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import RowError, UsageError
from cai_cli.engines.base import Completion, Engine, GenerationRequest, LogprobRequest, RequestFailure, Sampling, Text
from cai_cli.engines.local.kv_cache import KVCache
from cai_cli.engines.local.onednn import pack_linears
from cai_cli.engines.local.prefix_cache import Context, PrefixCache, can_share, common_start, groups, shared_start
from cai_cli.engines.local.sampling import ActiveSequence, Writer, check_finite, draw, end_of_turn_ids, uniforms
from cai_cli.engines.tokenization import encode_chat, encode_text
from cai_cli.models.fingerprint import fingerprint
from cai_cli.models.loading import load_causal_lm, load_tokenizer
from cai_cli.models.names import resolve

if TYPE_CHECKING:
    from torch import Tensor

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16")


class LocalEngine(Engine):
    """Implements `Engine`. The same ask gets the same text in every batch, but for near-ties in rounding."""

    def __init__(self, model: str, *, batch_size: int | None, device: str, dtype: str) -> None:
        """`batch_size` None fits the device; `device` auto is cuda where there is one; `dtype` auto is float32 on
        CPU, bfloat16 on cuda. Raises: UsageError for any other value."""
        if device not in DEVICES:
            raise UsageError(f"--device must be one of {', '.join(DEVICES)}, not {device!r}")
        if dtype not in DTYPES:
            raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self._name, self._asked_device, self._asked_dtype = model, device, dtype
        self.batch_size: int = batch_size or (256 if self.device == "cuda" else 64)

    # --- what it is -------------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> str:
        import torch

        if self._asked_device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self._asked_device

    @cached_property
    def dtype(self) -> str:
        if self._asked_dtype == "auto":
            return "bfloat16" if self.device == "cuda" else "float32"
        return self._asked_dtype

    @cached_property
    def path(self) -> Path:
        return resolve(self._name)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.path)

    @cached_property
    def model(self) -> Any:
        model = load_causal_lm(self.path, dtype=self.dtype, device=self.device)
        pack_linears(model)
        return model

    @cached_property
    def window(self) -> int:
        """Tokens that fit: prompt and answer together."""
        config = self.model.config.get_text_config()
        return min(int(self.tokenizer.model_max_length), int(config.max_position_embeddings))

    @cached_property
    def end_ids(self) -> set[int]:
        return end_of_turn_ids(self.tokenizer, self.model.generation_config)

    @cached_property
    def shares(self) -> bool:
        """Whether rows can share what they start with: else each is run whole, as transformers does it."""
        shares = can_share(self.model)
        if not shares:
            kind = self.model.config.model_type
            console.warn(f"{self._name}: models of type {kind} are run by transformers' own loop, which is slower")
        return shares

    @cached_property
    def most_tokens(self) -> int:
        """Tokens whose keys and values may be held at once: they get an eighth of the machine's memory."""
        import torch

        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * int(config.num_hidden_layers) * heads * size * self.model.dtype.itemsize
        if self.device == "cuda":
            held = torch.cuda.get_device_properties(0).total_memory
        else:
            held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(held // 8 // token)

    def identity(self) -> dict[str, Any]:
        return {"engine": "local", "fingerprint": fingerprint(self.path), "dtype": self.dtype}

    def speaks_chat(self) -> bool:
        return self.tokenizer.chat_template is not None

    def _encode(self, text: Text, continuation: str) -> list[int]:
        """Raises: RowError, CaiError as `encode_chat`."""
        if isinstance(text, str):
            return encode_text(self.tokenizer, text + continuation)
        ids = encode_chat(self.tokenizer, text, add_generation_prompt=True)
        return ids + encode_text(self.tokenizer, continuation, start=False)

    def _check_fits(self, prompt: int, new: int) -> None:
        if prompt == 0:
            raise RowError("the prompt is empty: it has not one token")
        if prompt + new > self.window:
            # What differs from row to row stands after the colon: rejected rows are counted by what is before it.
            raise RowError(f"does not fit the context window of {self.window}: {prompt} tokens + {new} new ones")

    def _memory(self, start: Context, room: int) -> KVCache | PrefixCache:
        """For rows that begin with `start` and may grow by `room` tokens each."""
        pad_id = self.tokenizer.pad_token_id
        return PrefixCache(self.model, start, room) if self.shares else KVCache(self.model, pad_id)

    def _fitting(self, sizes: Sequence[int], live: Sequence[int] = ()) -> int:
        """How many of the rows of these `sizes` (tokens, descending) can join those of the sizes `live`: no more than
        batch_size, nor than memory holds when each has room for the longest; one if there is none yet."""
        widest = max([*live, *sizes[:1]])
        held = min(self.batch_size, self.most_tokens // widest)
        return min(len(sizes), max(held - len(live), 0 if live else 1))

    # --- text -------------------------------------------------------------------------------------------------

    def generate(self, asks: Sequence[GenerationRequest], sampling: Sampling) -> list[Completion | RequestFailure]:
        """One answer per ask, in order. Raises: CaiError when the model's logits are not finite, or it has no chat
        template for a chat."""
        import torch

        replies: dict[int, Completion | RequestFailure] = {}
        rows: list[ActiveSequence] = []
        for index, ask in enumerate(asks):
            try:
                ids = self._encode(ask.text, ask.prefill)
                self._check_fits(len(ids), sampling.max_new_tokens)
            except RowError as error:
                replies[index] = RequestFailure(error.message)
            else:
                rows.append(ActiveSequence(index, ask, tuple(ids), uniforms(ask.seed, sampling.max_new_tokens)))
        with torch.inference_mode():
            replies |= self._decode(rows, sampling) if rows else {}
        return [replies[index] for index in range(len(asks))]

    def grow(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[list[int]]:
        """As `generate`, for prompts that are encoded already: the ids of the answers, the end of turn among them."""
        import torch

        rows = [
            ActiveSequence(index, GenerationRequest("", seed), tuple(ids), uniforms(seed, sampling.max_new_tokens))
            for index, (ids, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        with torch.inference_mode():
            self._decode(rows, sampling)
        return [row.new for row in rows]

    def _decode(self, rows: Sequence[ActiveSequence], sampling: Sampling) -> dict[int, Completion]:
        """Grow every row to its end, the longest first: when one ends, the next one takes its place. Replies by the
        index of their ask."""
        import torch

        writer = Writer(self.tokenizer, self.end_ids, sampling.max_new_tokens)
        start = shared_start([row.prompt for row in rows], [1] * len(rows)) if self.shares else ()
        memory = self._memory(start, sampling.max_new_tokens)
        waiting = sorted(rows, key=lambda row: (len(row.prompt), row.prompt))
        live: list[ActiveSequence] = []
        tokens = torch.empty(0)
        while live or waiting:
            logits = [memory.step(tokens)] if live else []
            joining = self._joining(waiting, live, sampling, memory.joins)
            if joining:
                logits += memory.add([row.prompt for row in joining], [1] * len(joining))
                live += joining
            noise = torch.tensor([row.noise[len(row.new)] for row in live], dtype=torch.float64, device=self.device)
            tokens = draw(torch.cat(logits), noise, sampling, [row.ask.row for row in live])
            for row, token in zip(live, tokens.tolist(), strict=True):
                writer.add(row, token)
            going = _closed_up([row.reply is None for row in live])
            if len(going) < len(live):
                live = [live[place] for place in going]
                memory.keep(going)
                tokens = tokens[going]
        return {row.index: row.reply for row in rows if row.reply is not None}

    def _joining(
        self, waiting: list[ActiveSequence], live: Sequence[ActiveSequence], sampling: Sampling, joins: bool
    ) -> list[ActiveSequence]:
        """Take the rows out of `waiting` (the longest at the end) that have a place now."""
        free = self.batch_size - len(live)
        if live and (not joins or free < self.batch_size / 8):  # few at a time cost more passes
            return []
        sizes = [len(row.prompt) + sampling.max_new_tokens for row in reversed(waiting)]
        count = self._fitting(sizes, [len(row.prompt) + sampling.max_new_tokens for row in live]) if waiting else 0
        return [waiting.pop() for _ in range(count)]

    # --- option log-probabilities -----------------------------------------------------------------------------

    def option_logprobs(self, requests: Sequence[LogprobRequest]) -> list[list[float] | RequestFailure]:
        """For each request the log-probability of each option, natural log, summed over the option's tokens.

        Where an option changes how the end of the prompt is tokenised, all of that request's options are scored
        from the first token in which they differ from the prompt. Raises: CaiError as `generate`.
        """
        import torch

        refused: dict[int, RequestFailure] = {}
        scores: dict[int, list[float]] = {}
        wanted: dict[Context, list[Reading]] = {}
        for index, request in enumerate(requests):
            try:
                readings = self._readings(index, request)
            except RowError as error:
                refused[index] = RequestFailure(error.message)
                continue
            scores[index] = [0.0] * len(request.options)
            for context, reading in readings:
                wanted.setdefault(context, []).append(reading)
        with torch.inference_mode():
            for group in groups(list(wanted)) if self.shares else [list(wanted)]:
                for reading, value in self._read(group, wanted):
                    scores[reading.question][reading.option] = value
        return [refused.get(index) or scores[index] for index in range(len(requests))]

    def _read(
        self, group: Sequence[Context], wanted: Mapping[Context, Sequence["Reading"]]
    ) -> Iterator[tuple["Reading", float]]:
        waiting = sorted(group, key=len, reverse=True)
        keeps = [max(1, *(len(reading.tokens) for reading in wanted[context])) for context in waiting]
        memory = self._memory(shared_start(waiting, keeps) if self.shares else (), 0)
        at = 0
        while at < len(waiting):
            batch = slice(at, at + self._fitting([len(context) for context in waiting[at:]]))
            for context, logits in zip(waiting[batch], memory.add(waiting[batch], keeps[batch]), strict=True):
                for reading in wanted[context]:
                    yield reading, _log_probability(logits, reading)
            memory.keep([])
            at = batch.stop

    def _readings(self, index: int, question: LogprobRequest) -> list[tuple[Context, "Reading"]]:
        """For each option the ids to run the model over, and what to read at the end of them."""
        prompt = self._encode(question.text, question.prefill)
        wholes = [self._encode(question.text, question.prefill + option) for option in question.options]
        start = min(common_start(prompt, whole) for whole in wholes)
        self._check_fits(start, max(len(whole) for whole in wholes) - start)
        return [
            (tuple(whole[:-1]), Reading(index, option, tuple(whole[start:]), question.row))
            for option, whole in enumerate(wholes)
        ]


def engine_around(model: Any, tokenizer: Any, batch_size: int) -> LocalEngine:
    """An engine that answers with `model` as it is now, such as one in training. It is run as transformers runs it:
    rows that share what they start with would need its attention switched over. It has no `identity`."""
    engine = LocalEngine("", batch_size=batch_size, device=model.device.type, dtype="auto")
    engine.model, engine.tokenizer, engine.shares = model, tokenizer, False
    return engine


@dataclass(frozen=True)
class Reading:
    """An option of a question: its ids, the last of which follows the context it is read from."""

    question: int
    option: int
    tokens: tuple[int, ...]
    row: str


def _closed_up(going: Sequence[bool]) -> list[int]:
    """The places of those still going, the last ones moved up into the gaps: few rows move."""
    places = [place for place, goes in enumerate(going) if goes]
    late = [place for place in places if place >= len(places)]
    return [place if going[place] else late.pop() for place in range(len(places))]


def _log_probability(logits: "Tensor", reading: Reading) -> float:
    """Summed over the reading's tokens, the log-probability of each at its place in the last rows of `logits`
    (n, vocabulary)."""
    import torch

    tokens = reading.tokens
    if not tokens:
        return 0.0
    logp = logits[-len(tokens) :].float().log_softmax(-1)
    total = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None]).sum()
    check_finite(total[None], [reading.row])
    return float(total)
