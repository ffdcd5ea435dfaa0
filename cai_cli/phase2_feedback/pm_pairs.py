"""The pairs of `cai train-pm` and `cai dpo`: read, encoded, and scored by a preference model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from cai_cli.common.errors import RowError
from cai_cli.data.formats import parse_preference
from cai_cli.data.jsonl import origin
from cai_cli.data.row_reader import RowReader
from cai_cli.data.schema import JudgedPair, Preference, conversation_id, reject
from cai_cli.data.splits import IDENTICAL_REPLIES, pair_problem, too_long_for
from cai_cli.engines.tokenization import encode_text
from cai_cli.models.reading import Reading
from cai_cli.reward.packed_pairs import score_pairs
from cai_cli.reward.preference_model import encode_conversation, score_ids
from cai_cli.runtime.counts import Counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


PLACE = Reading()  # the end of the turn, where `train-pm` and `dpo` end a conversation by default


def read_preferences(
    reader: RowReader, source: str, limit: int | None = None, soft_from: str | None = None
) -> list[Preference]:
    """Read Preference rows and labelled pairs. A labelled pair without a source gets the file's name.

    Args:
        reader: Reads the rows.
        source: The file.
        limit: Largest number of rows to read, or None.
        soft_from: The name of the scores that give the labels of rows without votes, or None.
    """
    name = origin(source)

    def parse(value: object) -> Preference:
        return parse_preference(value, source=name, soft_from=soft_from, dropped=reader.dropped)

    return [row for _, row in reader.rows(source, parse, limit)]


@dataclass(frozen=True)
class EncodedPair:
    """A preference, encoded.

    Attributes:
        row: The preference.
        chosen: Token ids of the conversation with the chosen reply, shape (length,).
        rejected: Token ids of the conversation with the rejected reply.
        target: The probability of `chosen` to train on.
    """

    row: Preference
    chosen: list[int]
    rejected: list[int]
    target: float

    @property
    def ids(self) -> tuple[list[int], list[int]]:
        """The ids of both conversations, chosen first."""
        return self.chosen, self.rejected

    def columns(self) -> dict[str, Any]:
        """The row of the training dataset."""
        return {"chosen_ids": self.chosen, "rejected_ids": self.rejected, "p_chosen": self.target}


P = TypeVar("P", bound=EncodedPair)


def encode_pair(tokenizer: "PreTrainedTokenizerBase", row: Preference, reading: Reading = PLACE) -> EncodedPair:
    """Encode both conversations of a pair, up to the tokens at which a preference model is read. Raises RowError."""
    chosen, rejected = (
        encode_conversation(tokenizer, [*row.prompt, *reply], reading) for reply in (row.chosen, row.rejected)
    )
    return EncodedPair(row, chosen, rejected, row.p_chosen)


def encode_pairs(
    encode: Callable[[Preference], P],
    rows: Sequence[Preference],
    max_length: int,
    counts: Counts,
    *,
    window: int,
    hard: bool,
) -> list[P]:
    """Encode the pairs, and reject those that cannot be trained on.

    Args:
        encode: Encodes a pair, or raises RowError.
        rows: The preferences.
        max_length: Longest conversation in tokens.
        counts: Receives the rejected and skipped rows, and how the replies of the others ended.
        window: The model's context window in tokens.
        hard: Whether the preferred reply has probability 1. A tie is skipped then, because neither is preferred.

    Returns:
        The pairs that fit, in order.
    """
    pairs, too_long = [], too_long_for(max_length, window)
    for row in rows:
        try:
            pair = encode(row)
        except RowError as error:
            counts.reject(reject(row.key, error.message, row))
            continue
        if problem := pair_problem(row.chosen, row.rejected):
            counts.reject(reject(row.key, problem, row))
        elif max(map(len, pair.ids)) > min(max_length, window):
            counts.reject(reject(row.key, too_long, row))
        elif pair.chosen == pair.rejected:  # the chat template may change a text
            counts.reject(reject(row.key, IDENTICAL_REPLIES, row))
        elif hard and row.p_chosen == 0.5:
            counts.skipped["a tie, which has no hard target"] += 1
        else:
            pairs.append(replace(pair, target=1.0) if hard else pair)
            counts.reply_ends.add("replies", row.chosen_finish_reason)
            counts.reply_ends.add("replies", row.rejected_finish_reason)
    return pairs


def score_held_out(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    pairs: Sequence[EncodedPair],
    batch_size: int,
    *,
    share_prompts: bool,
) -> list[JudgedPair]:
    """Score both replies of each held-out pair.

    Args:
        model: The preference model.
        tokenizer: Its tokenizer.
        pairs: The pairs.
        batch_size: Pairs in one forward pass.
        share_prompts: Whether the model takes packed pairs, which compute the prompt of a pair once.

    Returns:
        The pairs in order, each with its scores (logits) and the lengths of its replies in tokens.
    """
    if share_prompts:
        chosen, rejected = score_pairs(model, [pair.ids for pair in pairs], batch_size)
    else:
        chosen = score_ids(model, tokenizer, [pair.chosen for pair in pairs], batch_size)
        rejected = score_ids(model, tokenizer, [pair.rejected for pair in pairs], batch_size)

    def tokens(text: str) -> int:
        return len(encode_text(tokenizer, text, start=False))

    return [
        JudgedPair(
            id=row.id,
            prompt_id=conversation_id(row.prompt),
            source=row.source,
            p_chosen=row.p_chosen,
            chosen_score=a,
            rejected_score=b,
            chosen_tokens=tokens(row.chosen[0].content),
            rejected_tokens=tokens(row.rejected[0].content),
        )
        for row, a, b in zip((pair.row for pair in pairs), chosen, rejected, strict=True)
    ]
