"""Scores rows with a preference model (paper section 4.1)."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from cai_cli.common.errors import RowError
from cai_cli.data.schema import Rejected, Sample, Scored, reject
from cai_cli.models.loading import context_window, pick_device
from cai_cli.models.source import ModelSource
from cai_cli.reward.preference_model import encode_conversation, open_for_scores, score_ids
from cai_cli.runtime.config import Effect, Group, Option, StageConfig, option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PreferenceModelOptions(StageConfig):
    """The preference model that scores."""

    pm: str = option(..., "Preference model, from `cai train-pm`.", Option(Effect.HASHED, Group.MODEL))


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
    window = context_window(model.config, tokenizer)
    ids: list[list[int] | str] = []  # or the reason of the rejection
    for row in rows:
        try:
            encoded = encode_conversation(tokenizer, [*row.prompt, *row.completion], model.reading)
            fits = len(encoded) <= window
            ids.append(encoded if fits else f"longer than the preference model's window of {window:,} tokens")
        except RowError as error:
            ids.append(error.message)
    fitting = [(row.key, encoded) for row, encoded in zip(rows, ids, strict=True) if not isinstance(encoded, str)]
    names, sequences = [key for key, _ in fitting], [encoded for _, encoded in fitting]
    scores = iter(score_ids(model, tokenizer, sequences, batch_size, names))
    for row, encoded_or_reason in zip(rows, ids, strict=True):
        if isinstance(encoded_or_reason, str):
            yield reject(row.key, encoded_or_reason, row)
        else:
            yield Scored(**row.sample_fields(), score=next(scores))


class Scorer:
    """A preference model that scores rows. It is loaded at first use, so a finished output does not load it.

    Args:
        name: Name or path of the model.
        batch_size: Number of conversations in one forward pass; 16 if None.
        device: Device, or "auto".
    """

    def __init__(self, name: str, batch_size: int | None, device: str) -> None:
        self.base, self.batch_size, self.device = ModelSource.resolve(name), batch_size or 16, device

    @cached_property
    def _loaded(self) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
        return open_for_scores(self.base.path, pick_device(self.device))

    def score(self, rows: Sequence[Sample]) -> Iterator[Scored | Rejected]:
        """Yield each row with its score, as the function `score` does."""
        return score(rows, *self._loaded, self.batch_size)
