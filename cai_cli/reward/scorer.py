"""Scores rows with a preference model, in this process or behind an address (paper section 4.1)."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.data.schema import Message, Rejected, Sample, Scored, reject
from cai_cli.models.loading import (
    auto_dtype,
    check_one_output,
    context_window,
    pick_device,
    reading_of,
    tokenizer_and_window,
)
from cai_cli.models.reading import RECORD, Reading, layer_of, place_of
from cai_cli.models.source import ModelSource
from cai_cli.reward.preference_model import encode_conversation, open_for_scores, preference_model_identity, score_ids
from cai_cli.reward.score_client import ScoreClient
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option
from cai_cli.runtime.shared_options import DType, EngineDType, RequestOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SERVER_PREFIX = "server:"
BATCH_SIZE = 16  # conversations in one forward pass or one request, by default

Conversation = Sequence[Message]
# Conversations and their names in error messages -> one score each, or the reason why there is none.
ConversationScorer = Callable[[Sequence[Conversation], Sequence[str]], list[float | RowError]]


class PreferenceModelOptions(StageConfig):
    """The preference model that scores."""

    pm: str = option(
        ...,
        "Preference model, from `cai train-pm`; with --pm-url also server:NAME, a model that only the server has.",
        Option(Effect.HASHED, Group.MODEL),
    )
    pm_url: str | None = option(
        None,
        "Take the scores from the server at this address, such as http://HOST:PORT/classify of vLLM (see "
        "docs/preference_models.md); the key is read from PM_API_KEY.",
        Option(Effect.HARMLESS, Group.MODEL),
    )
    pm_dtype: DType = option(
        DType.AUTO,
        "Precision of the preference model; auto is float32 on a CPU, bfloat16 on a GPU.",
        Option(group=Group.MODEL),
    )

    def check(self) -> None:
        super().check()
        if (self.pm or "").startswith(SERVER_PREFIX) and not self.pm_url:
            raise UsageError(f"--pm {self.pm} needs the address of the server", "--pm-url URL", code="missing-option")
        if self.pm_url and self.pm_dtype is not DType.AUTO:
            raise UsageError("--pm-url excludes --pm-dtype: the server chooses it", code="option-conflict")

    def open_scorer(self, batch_size: int | None, device: str) -> "Scorer":
        """The scorer that these options name. Raises UsageError, CaiError."""
        return Scorer(self.pm, batch_size, device, dtype=self.pm_dtype.value, url=self.pm_url)


def score(
    rows: Sequence[Sample], model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int
) -> Iterator[Scored | Rejected]:
    """Yield each row with its score (a logit), in order; a conversation that does not fit the model is rejected.

    Args:
        rows: Conversations with a reply.
        model: The preference model.
        tokenizer: Its tokenizer.
        batch_size: Number of conversations in one forward pass.
    """
    return _scored(rows, _in_process(model, tokenizer, batch_size))


def refuse_int8(options: RequestOptions) -> None:
    """Raise UsageError where the precision is one that only engines have."""
    if options.dtype is EngineDType.INT8:
        raise UsageError("--dtype int8 is not for preference models", hint="bfloat16", code="option-conflict")


class Scorer:
    """A preference model that scores rows. It is loaded at first use, so a finished output does not load it.

    Args:
        name: Name or path of the model, or `server:NAME` for one that only the server at `url` has.
        batch_size: Number of conversations in one forward pass or request; 16 if None.
        device: Device as torch names it, or "auto".
        dtype: Precision of the weights, by its name in torch, or "auto".
        url: The address of a server that scores, or None to score in this process.

    Raises:
        UsageError: `url` is not valid.
        CaiError: There is no such model.
    """

    def __init__(
        self, name: str, batch_size: int | None, device: str, *, dtype: str = "float32", url: str | None = None
    ) -> None:
        self.batch_size, self._device, self._dtype = batch_size or BATCH_SIZE, device, dtype
        self._server_name = name.removeprefix(SERVER_PREFIX)
        self.source = None if name.startswith(SERVER_PREFIX) else ModelSource.resolve(name)
        if self.source:
            check_one_output(self.source.path)  # before hours of training, at the end of which it may be loaded
        if url and self.source:
            _check_served(self.source.path, name)
        self._client = ScoreClient(self._server_name, url, self.batch_size) if url else None

    @classmethod
    def of_evaluation(cls, name: str, options: RequestOptions) -> "Scorer":
        """The scorer of an evaluation whose models may also be judges. Raises as `Scorer`."""
        return cls(name, options.batch_size, options.device, dtype=options.dtype.value)

    def precision(self) -> dict[str, str | None]:
        """Its precision, as evaluations record it; nothing for float32, which they all had before version 0.2.0."""
        return {} if self.dtype == "float32" else {"pm_dtype": self.dtype}

    @property
    def path(self) -> Path | None:
        """The directory of the model; None for one that only a server has."""
        return self.source.path if self.source else None

    @property
    def fingerprint(self) -> str | None:
        """The hash of the model's content; None for one that only a server has."""
        return self.source.fingerprint if self.source else None

    @cached_property
    def device(self) -> str:
        """The device of the model in this process."""
        return pick_device(self._device) if self._device in ("auto", "cuda") else self._device

    @property
    def dtype(self) -> str | None:
        """The precision of the model, by its name in torch; None where a server chooses it."""
        if self._client:
            return None
        return auto_dtype(self.device) if self._dtype == "auto" else self._dtype

    def identity(self) -> dict[str, str]:
        """What identifies the model in a manifest."""
        if self.source is None:
            return {"engine": "server", "name": self._server_name}
        return preference_model_identity(self.source) | ({"scored_by": "server"} if self._client else {})

    def score(self, rows: Sequence[Sample]) -> Iterator[Scored | Rejected]:
        """Yield each row with its score, as the function `score` does."""
        return _scored(rows, self.conversation_scores)

    @cached_property
    def conversation_scores(self) -> ConversationScorer:
        """A function that scores conversations. A model of this process is loaded; a server gets no request yet.

        The function raises CaiError where no conversation can be scored.
        """
        if self._client is None:
            assert self.source is not None  # noqa: S101
            assert self.dtype is not None  # noqa: S101
            model, tokenizer = open_for_scores(self.source.path, self.device, self.dtype)
            return _in_process(model, tokenizer, self.batch_size)
        if self.source is None:
            return _of_messages(self._client)
        return _of_token_ids(self._client, self.source.path)

    def close(self) -> None:
        """Cancel requests in flight. The scorer cannot be used afterwards."""
        if self._client:
            self._client.close()


def _check_served(path: Path, name: str) -> None:
    """Raises UsageError where the model in `path` is read where a server of classifiers does not read it."""
    if not Reading(place_of(path), layer=layer_of(path)).as_servers_read:
        raise UsageError(
            f"--pm-url: {name} is read as its {RECORD} says, but a server of classifiers reads the last token and the "
            "last layer",
            hint="leave out --pm-url, or ask `cai serve-reward` with --pm server:NAME, which sends it messages",
            code="option-conflict",
        )


def check_device(name: str) -> None:
    """Raises UsageError where `name` is not a device as torch names it, or "auto"."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"--pm-device must be auto, cpu, cuda or cuda:N, not {name!r}", code="invalid-option")


def _scored(rows: Sequence[Sample], scorer: ConversationScorer) -> Iterator[Scored | Rejected]:
    scores = scorer([[*row.prompt, *row.completion] for row in rows], [row.key for row in rows])
    for row, score in zip(rows, scores, strict=True):
        if isinstance(score, RowError):
            yield reject(row.key, score.message, row)
        else:
            yield Scored(**row.sample_fields(), score=score)


def _in_process(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int) -> ConversationScorer:
    window = context_window(model.config, tokenizer)

    def scores(conversations: Sequence[Conversation], names: Sequence[str]) -> list[float | RowError]:
        def of_fitting(sequences: Sequence[list[int]], named: Sequence[str]) -> list[float]:
            return score_ids(model, tokenizer, sequences, batch_size, named)

        def encode(conversation: Conversation) -> list[int]:
            return encode_conversation(tokenizer, conversation, model.reading)

        return _of_fitting(conversations, names, encode, window, of_fitting)

    return scores


def _of_token_ids(client: ScoreClient, path: Path) -> ConversationScorer:
    """The server's scores of token ids, which are those that the model in `path` would get in this process."""
    (tokenizer, window), reading = tokenizer_and_window(path), reading_of(path)

    def scores(conversations: Sequence[Conversation], names: Sequence[str]) -> list[float | RowError]:
        def encode(conversation: Conversation) -> list[int]:
            return encode_conversation(tokenizer, conversation, reading)

        return _of_fitting(conversations, names, encode, window, lambda sequences, _: client.scores(sequences))

    return scores


def _of_messages(client: ScoreClient) -> ConversationScorer:
    """The server's scores of conversations as they are; white space around a reply is dropped, as it always is."""

    def scores(conversations: Sequence[Conversation], _: Sequence[str]) -> list[float | RowError]:
        chats = [[message.model_dump() for message in conversation] for conversation in conversations]
        for chat in chats:
            chat[-1]["content"] = chat[-1]["content"].strip()
        return client.scores(chats)

    return scores


def _of_fitting(
    conversations: Sequence[Conversation],
    names: Sequence[str],
    encode: Callable[[Conversation], list[int]],
    window: int,
    scorer: Callable[[Sequence[list[int]], Sequence[str]], Sequence[float | RowError]],
) -> list[float | RowError]:
    """The scores of the conversations that can be encoded and fit the window; of the others the reason."""
    ids: list[list[int] | RowError] = []
    for conversation in conversations:
        try:
            encoded = encode(conversation)
            reason = f"longer than the preference model's window of {window:,} tokens"
            ids.append(encoded if len(encoded) <= window else RowError(reason, code="too-long"))
        except RowError as error:
            ids.append(error)
    fitting = [(encoded, name) for encoded, name in zip(ids, names, strict=True) if not isinstance(encoded, RowError)]
    scores = iter(scorer([encoded for encoded, _ in fitting], [name for _, name in fitting]))
    return [encoded if isinstance(encoded, RowError) else next(scores) for encoded in ids]


def required_score(score: float | RowError) -> float:
    """The score, where a conversation without one cannot be left out.

    Raises:
        CaiError: There is none.
    """
    if isinstance(score, RowError):
        raise CaiError(f"no score for a reply: {score.message}", score.hint, code=score.code)
    return score
