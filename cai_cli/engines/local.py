"""The local engine: a model of a directory, alias or Hub name on this machine's CPU or GPU, in torch.

Rows are encoded by `chat`, drawn by `decoding`. Nothing heavy is loaded before the first request.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cai_cli.engines.base import Ask, Engine, Question, Refusal, Reply, Sampling, Text
from cai_cli.engines.chat import encode_chat, encode_text
from cai_cli.engines.decoding import Row, Writer, check_finite, draw, end_of_turn_ids, uniforms
from cai_cli.engines.memory import Memory
from cai_cli.engines.shared import Context, SharedMemory, can_share, common_start, groups
from cai_cli.errors import RowError, UsageError
from cai_cli.models import fingerprint, load_causal_lm, load_tokenizer, resolve

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LEAST_BATCH = 8
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
        return load_causal_lm(self.path, dtype=self.dtype, device=self.device)

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
        return can_share(self.model)

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
            raise RowError(
                f"prompt of {prompt} tokens + {new} new tokens does not fit the context window of {self.window}"
            )

    def _memory(self, room: int) -> Memory | SharedMemory:
        """For the rows of one batch, which may grow by `room` tokens each."""
        kind = SharedMemory if self.shares else Memory
        return kind(self.model, self.tokenizer.pad_token_id, room)

    def _batches(self, rows: Sequence[T], sizes: Sequence[int]) -> Iterator[Sequence[T]]:
        """`rows` in batches: no larger than batch_size, than what memory holds of their `sizes` (tokens, ascending),
        or than where padding to the longest would outweigh what a larger batch saves."""
        start = total = 0
        for end, size in enumerate(sizes):
            count, padded = end - start + 1, (end - start + 1) * size
            wasteful = count > LEAST_BATCH and padded > 2 * (total + size)
            if count > 1 and (count > self.batch_size or padded > self.most_tokens or wasteful):
                yield rows[start:end]
                start, total = end, 0
            total += size
        if rows:
            yield rows[start:]

    # --- text -------------------------------------------------------------------------------------------------

    def generate(self, asks: Sequence[Ask], sampling: Sampling) -> list[Reply | Refusal]:
        """One answer per ask, in order. Raises: CaiError when the model's logits are not finite, or it has no chat
        template for a chat."""
        import torch

        replies: dict[int, Reply | Refusal] = {}
        rows: list[Row] = []
        for index, ask in enumerate(asks):
            try:
                ids = self._encode(ask.text, ask.cue)
                self._check_fits(len(ids), sampling.max_new_tokens)
            except RowError as error:
                replies[index] = Refusal(error.message)
            else:
                rows.append(Row(index, ask, ids))
        rows.sort(key=lambda row: len(row.prompt))
        with torch.inference_mode():
            for batch in self._batches(rows, [len(row.prompt) + sampling.max_new_tokens for row in rows]):
                replies |= self._decode(batch, sampling)
        return [replies[index] for index in range(len(asks))]

    def _decode(self, rows: Sequence[Row], sampling: Sampling) -> dict[int, Reply]:
        """Grow every row to its end; replies by the index of their ask."""
        import numpy as np
        import torch

        writer = Writer(self.tokenizer, self.end_ids, sampling.max_new_tokens)
        noise = torch.from_numpy(np.stack([uniforms(row.ask.seed, sampling.max_new_tokens) for row in rows]))
        noise = noise.to(self.device)
        memory = self._memory(sampling.max_new_tokens)
        logits = memory.prefill([row.prompt for row in rows], 1)[:, 0]
        live = list(rows)
        for step in range(sampling.max_new_tokens):
            tokens = draw(logits, noise[:, step], sampling)
            for row, token in zip(live, tokens.tolist(), strict=True):
                writer.add(row, token)
            going = _closed_up([row.reply is None for row in live])
            if not going:
                break
            if len(going) < len(live):
                live = [live[place] for place in going]
                memory.keep(going)
                noise, tokens = noise[going], tokens[going]
            logits = memory.step(tokens)
        return {row.index: row.reply for row in rows if row.reply is not None}

    # --- option log-probabilities -----------------------------------------------------------------------------

    def score(self, questions: Sequence[Question]) -> list[list[float] | Refusal]:
        """For each question the log-probability of each option, natural log, summed over the option's tokens.

        Where an option changes how the end of the prompt is tokenised, all of that question's options are scored
        from the first token in which they differ from the prompt. Raises: CaiError as `generate`.
        """
        import torch

        refused: dict[int, Refusal] = {}
        scores: dict[int, list[float]] = {}
        wanted: dict[Context, list[Reading]] = {}
        for index, question in enumerate(questions):
            try:
                readings = self._readings(index, question)
            except RowError as error:
                refused[index] = Refusal(error.message)
                continue
            scores[index] = [0.0] * len(question.options)
            for context, reading in readings:
                wanted.setdefault(context, []).append(reading)
        with torch.inference_mode():
            for group in groups(list(wanted)) if self.shares else [list(wanted)]:
                group.sort(key=len)
                for batch in self._batches(group, [len(context) for context in group]):
                    for reading, value in self._read(batch, wanted):
                        scores[reading.question][reading.option] = value
        return [refused.get(index) or scores[index] for index in range(len(questions))]

    def _read(
        self, batch: Sequence[Context], wanted: Mapping[Context, Sequence["Reading"]]
    ) -> Iterator[tuple["Reading", float]]:
        keep = max(len(reading.tokens) for context in batch for reading in wanted[context])
        logits = self._memory(0).prefill(batch, max(keep, 1))
        for context, row in zip(batch, logits, strict=True):
            for reading in wanted[context]:
                yield reading, _log_probability(row, reading.tokens)

    def _readings(self, index: int, question: Question) -> list[tuple[Context, "Reading"]]:
        """For each option the ids to run the model over, and what to read at the end of them."""
        prompt = self._encode(question.text, question.cue)
        wholes = [self._encode(question.text, question.cue + option) for option in question.options]
        start = min(common_start(prompt, whole) for whole in wholes)
        self._check_fits(start, max(len(whole) for whole in wholes) - start)
        return [
            (tuple(whole[:-1]), Reading(index, option, tuple(whole[start:]))) for option, whole in enumerate(wholes)
        ]


@dataclass(frozen=True)
class Reading:
    """An option of a question: its ids, the last of which follows the context it is read from."""

    question: int
    option: int
    tokens: tuple[int, ...]


def _closed_up(going: Sequence[bool]) -> list[int]:
    """The places of those still going, the last ones moved up into the gaps: few rows move."""
    places = [place for place, goes in enumerate(going) if goes]
    late = [place for place in places if place >= len(places)]
    return [place if going[place] else late.pop() for place in range(len(places))]


def _log_probability(logits: "Tensor", tokens: Sequence[int]) -> float:
    """Summed over `tokens`, the log-probability of each at its place in the last rows of `logits` (n, vocabulary)."""
    import torch

    if not tokens:
        return 0.0
    logp = logits[-len(tokens) :].float().log_softmax(-1)
    total = logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None]).sum()
    check_finite(total)
    return float(total)
