"""The pairs of `cai dpo`: encoded, and rewarded by the policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cai_cli.data.reply_ends import CUT_OFF
from cai_cli.data.schema import JudgedPair, Message, Preference, conversation_id
from cai_cli.phase2_feedback.pm_pairs import EncodedPair
from cai_cli.training.completions import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptedPair(EncodedPair):
    """A preference, encoded as a prompt with two replies.

    Attributes:
        prompt_length: Number of leading ids of both conversations that belong to the prompt and carry no loss.
    """

    prompt_length: int

    def columns(self) -> dict[str, Any]:
        n = self.prompt_length
        ids = {"prompt_ids": self.chosen[:n], "chosen_ids": self.chosen[n:], "rejected_ids": self.rejected[n:]}
        return ids | {"p_chosen": self.target}


def encode_replies(tokenizer: "PreTrainedTokenizerBase", row: Preference) -> PromptedPair:
    """Encode a prompt and two replies, without the end of turn of a reply that was cut off. Raises RowError."""

    def encoded(reply: Sequence[Message], finish_reason: str | None) -> tuple[list[int], int]:
        both = encode(tokenizer, row.prompt, reply[0].content.strip(), close=finish_reason != CUT_OFF)
        return both.ids, both.prompt_length

    chosen, length = encoded(row.chosen, row.chosen_finish_reason)
    rejected, _ = encoded(row.rejected, row.rejected_finish_reason)
    return PromptedPair(row, chosen, rejected, row.p_chosen, length)


def held_out_rewards(trainer: Any, pairs: Sequence[PromptedPair]) -> list[JudgedPair]:
    """Return the held-out pairs with the policy's implicit rewards as their scores. Called on every rank.

    Args:
        trainer: A trainer of `soft_dpo_trainer` whose `eval_dataset` has these pairs.
        pairs: The pairs.
    """
    if not pairs:
        return []
    was_training = trainer.model.training
    rewards = trainer.predict(trainer.eval_dataset).predictions.tolist()
    trainer.model.train(was_training)  # TRL logs the metrics of training only in this mode
    return [
        JudgedPair(
            id=pair.row.id,
            prompt_id=conversation_id(pair.row.prompt),
            source=pair.row.source,
            p_chosen=pair.row.p_chosen,
            chosen_score=chosen,
            rejected_score=rejected,
            chosen_tokens=len(pair.chosen) - pair.prompt_length,
            rejected_tokens=len(pair.rejected) - pair.prompt_length,
        )
        for pair, (chosen, rejected) in zip(pairs, rewards, strict=True)
    ]
