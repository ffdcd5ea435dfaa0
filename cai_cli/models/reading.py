"""Where the score of a preference model is read: at which token of a conversation.

A decoder's score is its head's output at one token (last-token pooling), and depends on which one. `cai train-pm` reads
at the token that ends the turn and records this in the model's directory. TRL and transformers read at the last token
of the whole chat template that is not the padding token, so they skip an end-of-turn token that is also used for
padding. So did `cai train-pm` 0.1.0, which left no record.
"""

import json
import types
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cai_cli import __version__
from cai_cli.common.errors import CaiError
from cai_cli.common.files import write_atomically

RECORD = "preference_model.json"


class ReadAt(StrEnum):
    """The token at which a score is read."""

    END_OF_TURN = "end-of-turn"  # the last one that is not white space
    LAST_UNPADDED = "last-unpadded"  # the last one before it that is not the padding token; `train-pm` 0.1.0
    WHOLE_TEMPLATE = "whole-template"  # the last one of the chat template that is not the padding token; TRL


@dataclass(frozen=True)
class Reading:
    """How the place of the score is found.

    Attributes:
        at: Where the model was trained to be read.
        padding: The token id over which the place moves backwards; None where it does not.
    """

    at: ReadAt = ReadAt.END_OF_TURN
    padding: int | None = None

    @property
    def keeps_white_space(self) -> bool:
        """Whether white space that a template adds after the end of turn is read too."""
        return self.at is ReadAt.WHOLE_TEMPLATE


def place_of(path: Path) -> ReadAt:
    """Return where the preference model in a directory was trained to be read.

    Raises:
        CaiError: The record in the directory is not valid (`invalid-model`).
    """
    record = path / RECORD
    if record.is_file():
        try:
            return ReadAt(json.loads(record.read_bytes())["read_at"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CaiError(
                f"{record}: not a valid record of where a score is read: {error}", code="invalid-model"
            ) from (error)
    return ReadAt.LAST_UNPADDED if _made_by_train_pm(path) else ReadAt.WHOLE_TEMPLATE


def record_place(path: Path, base_weights: str | None = None) -> None:
    """Record in a model's directory that it was trained to be read at the end of the turn.

    Args:
        path: The directory.
        base_weights: The hash of the weights that a head alone was fitted to (`weights_digest`).
    """
    record = {"read_at": ReadAt.END_OF_TURN.value, "trained_by": f"cai train-pm {__version__}"}
    record |= {"base_weights": base_weights} if base_weights else {}
    write_atomically(path / RECORD, [json.dumps(record, indent=2).encode() + b"\n"])


def recorded_base(path: Path) -> str | None:
    """The hash of the weights that the head in a directory was fitted to; None where none is recorded."""
    with suppress(OSError, ValueError):
        record = json.loads((path / RECORD).read_bytes())
        base = record.get("base_weights") if isinstance(record, dict) else None
        return base if isinstance(base, str) else None
    return None


def _made_by_train_pm(path: Path) -> bool:
    """Whether a directory without a record was written by `cai train-pm`, by its card or the manifest beside it."""
    card, manifest = path / "README.md", path.resolve().with_name(f"{path.resolve().name}.manifest.json")
    try:
        if card.is_file() and "\n- cai-train-pm\n" in card.read_text(encoding="utf-8"):
            return True
        return manifest.is_file() and json.loads(manifest.read_bytes())["provenance"]["stage"] == "train-pm"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_last_token(model: Any) -> bool:
    """Make a decoder with a scalar head give its score at the last token that the attention mask does not hide.

    transformers looks for the last token that is not the padding token instead: it skips an end-of-turn token that is
    also used for padding, and it depends on a padding token in the config.

    Args:
        model: A sequence classifier.

    Returns:
        Whether the model is such a decoder; others (encoders, which read at their first token) are unchanged.
    """
    import torch

    if not isinstance(getattr(model, "score", None), torch.nn.Linear) or model.base_model is model:
        return False
    model.forward = types.MethodType(forward_to_last_token, model)
    return True


def forward_to_last_token(self: Any, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
    import torch
    from transformers.modeling_outputs import SequenceClassifierOutput

    hidden = self.base_model(input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True)[0]
    last = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=hidden.device)
    if attention_mask is not None:
        last = (attention_mask * torch.arange(input_ids.shape[1], device=hidden.device)).argmax(-1)
    return SequenceClassifierOutput(
        logits=head_output(self, hidden[torch.arange(len(last), device=hidden.device), last])
    )


def head_output(model: Any, hidden: Any) -> Any:
    """The scores of hidden states; the head of a preference model may have a higher precision than its other weights.

    Args:
        model: The preference model, or one whose head is replaced by one without weights, to read its hidden states.
        hidden: Hidden states of shape (rows, hidden size).
    """
    return model.score(hidden.to(getattr(model.score, "weight", hidden).dtype))
