"""Where the score of a preference model is read: at which tokens of a conversation, and in which layer.

A decoder's score is its head's output at one token (last-token pooling), and depends on which one. `cai train-pm` reads
at the token that ends the turn, or at the mean of the reply's tokens (the head is linear, so this is the mean of their
scores), and records this in the model's directory. TRL and transformers read at the last token
of the whole chat template that is not the padding token, so they skip an end-of-turn token that is also used for
padding. So did `cai train-pm` 0.1.0, which left no record.
"""

import json
import types
from collections.abc import Sequence
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
    """The tokens at which a score is read."""

    END_OF_TURN = "end-of-turn"  # the last one that is not white space
    LAST_UNPADDED = "last-unpadded"  # the last one before it that is not the padding token; `train-pm` 0.1.0
    WHOLE_TEMPLATE = "whole-template"  # the last one of the chat template that is not the padding token; TRL
    MEAN_OVER_REPLY = "mean-over-reply"  # all of the reply, without the end of turn


@dataclass(frozen=True)
class Reading:
    """How the place of the score is found.

    Attributes:
        at: Where the model was trained to be read.
        padding: The token id over which the place moves backwards; None where it does not.
        header: The token ids after which a reply begins (`reply_header`), where the mean over it is read.
        layer: The layer whose output is read, from 1; None for the last one, with the final norm.
    """

    at: ReadAt = ReadAt.END_OF_TURN
    padding: int | None = None
    header: tuple[int, ...] = ()
    layer: int | None = None

    @property
    def keeps_white_space(self) -> bool:
        """Whether white space that a template adds after the end of turn is read too."""
        return self.at is ReadAt.WHOLE_TEMPLATE

    @property
    def as_servers_read(self) -> bool:
        """Whether a server of classifiers such as vLLM reads there, given the token ids up to that place."""
        return self.at is not ReadAt.MEAN_OVER_REPLY and self.layer is None

    def finds_reply(self, ids: Sequence[int]) -> bool:
        """Whether token ids have the place at which a reply begins, if it is needed."""
        size = len(self.header)
        return any(tuple(ids[i : i + size]) == self.header for i in reversed(range(len(ids) - size + 1)))


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


def layer_of(path: Path) -> int | None:
    """Return the layer at which the preference model in a directory is read; None for the last one.

    Raises:
        CaiError: The record in the directory is not valid (`invalid-model`).
    """
    record = path / RECORD
    if not record.is_file():
        return None
    place_of(path)  # checks the rest of the record
    layer: Any = json.loads(record.read_bytes()).get("layer")
    if layer is not None and (type(layer) is not int or layer < 1):
        raise CaiError(f"{record}: `layer` must be a number from 1, not {layer!r}", code="invalid-model")
    return None if layer is None else int(layer)


def record_place(path: Path, base_weights: str | None = None, reading: Reading | None = None) -> None:
    """Record in a model's directory where it was trained to be read.

    Args:
        path: The directory.
        base_weights: The hash of the weights that a head alone was fitted to (`weights_digest`).
        reading: The place; by default the end of the turn.
    """
    reading = reading or Reading()
    record: dict[str, Any] = {"read_at": reading.at.value, "trained_by": f"cai train-pm {__version__}"}
    record |= {"layer": reading.layer} if reading.layer else {}
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


def reply_header(tokenizer: Any) -> tuple[int, ...]:
    """The token ids after which a reply begins in a tokenizer's chat template, from the last control token on.

    A control token is among them because rows cannot spell one (`engines.tokenization`), so that the header is found
    at the start of each reply only. Thoughts belong to the reply.

    Raises:
        CaiError: No control token stands before a reply, or none ends it (`no-reply-start`).
    """
    chats = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        for asked, reply in (("a", "b"), ("a", "1"), ("2", "b"))
    ]
    try:
        first, second, third = (tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats)
    except Exception:  # there is no template, or whatever it raises
        first = second = third = []
    shared = next((i for i, (one, other) in enumerate(zip(first, second, strict=False)) if one != other), len(first))
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    start = max((i for i in range(shared) if first[i] in control), default=shared)
    # The tags of thoughts, which some templates write before every reply, are added tokens but no control tokens.
    thoughts = (i for i in range(start + 1, shared) if first[i] in tokenizer.added_tokens_decoder)
    header = tuple(first[start : next(thoughts, shared)])
    if not header or not control & set(first[shared:]) or not Reading(header=header).finds_reply(third):
        raise CaiError(
            "a score cannot be the mean over the reply: the chat template does not mark its start and its end with "
            "control tokens",
            hint="--read-at end-of-turn",
            code="no-reply-start",
        )
    return header


def read_last_token(model: Any) -> bool:
    """Make a decoder with a scalar head give its score at the last token that the attention mask does not hide.

    Where its `reading` says so, it is the mean over the reply instead.

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
    model.forward = types.MethodType(forward_to_place, model)
    return True


def forward_to_place(self: Any, input_ids: Any, attention_mask: Any = None, **_: Any) -> Any:
    import torch
    from transformers.modeling_outputs import SequenceClassifierOutput

    hidden = hidden_states(self, input_ids, attention_mask=attention_mask)
    visible = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return SequenceClassifierOutput(logits=head_output(self, hidden_at_place(self, hidden, input_ids, visible)))


def check_reading(model: Any, reading: Reading) -> None:
    """Check that a preference model can be read at a place.

    Raises:
        CaiError: It is an encoder, which is read at its first token (`wrong-model-kind`); or there is no such layer, or
            the model's layers are not a list before a final norm (`invalid-layer`).
    """
    if not reading.as_servers_read and getattr(model.forward, "__func__", None) is not forward_to_place:
        raise CaiError(
            f"a model of type {model.config.model_type!r} is read where its class reads it",
            hint="--read-at and --layer need a decoder",
            code="wrong-model-kind",
        )
    if (layer := reading.layer) is None:
        return
    layers = getattr(model.base_model, "layers", None)
    if layers is None or not hasattr(model.base_model, "norm"):
        raise CaiError(
            f"a model of type {model.config.model_type!r} has no layers to choose from", code="invalid-layer"
        )
    if not 1 <= layer <= len(layers):
        raise CaiError(f"there is no layer {layer}: the model has {len(layers)}", code="invalid-layer")


def hidden_states(model: Any, input_ids: Any, **inputs: Any) -> Any:
    """The hidden states of the layer at which a preference model is read, shape (rows, columns, hidden size).

    The layers above it do not run.
    """
    import torch

    base, layer = model.base_model, _reading(model).layer
    if layer is None:
        return base(input_ids, use_cache=False, return_dict=True, **inputs)[0]
    layers, norm = base.layers, base.norm
    base.layers, base.norm = layers[:layer], torch.nn.Identity()
    try:
        return base(input_ids, use_cache=False, return_dict=True, **inputs)[0]
    finally:
        base.layers, base.norm = layers, norm


def hidden_at_place(model: Any, hidden: Any, input_ids: Any, visible: Any) -> Any:
    """The hidden state of each row at which its score is read, shape (rows, hidden size).

    Args:
        model: The preference model.
        hidden: The hidden states of all tokens.
        input_ids: Their ids, shape (rows, columns).
        visible: Which of them belong to the conversation.
    """
    import torch

    columns = torch.arange(input_ids.shape[1], device=hidden.device)
    last = (visible * columns).argmax(-1)
    reading = _reading(model)
    if reading.at is not ReadAt.MEAN_OVER_REPLY:
        return hidden[torch.arange(len(last), device=hidden.device), last]
    size = len(reading.header)
    header = torch.tensor(reading.header, device=input_ids.device)
    found = (input_ids.unfold(1, size, 1) == header).all(-1) & visible.bool().unfold(1, size, 1).all(-1)
    start = (found * (columns[: found.shape[1]] + size)).amax(-1)
    tokens = visible.bool() & (columns >= start[:, None]) & (columns < last[:, None])  # the last one ends the turn
    tokens |= ~tokens.any(-1, keepdim=True) & (columns == last[:, None])  # an empty reply is read at its end
    shares = tokens / tokens.sum(-1, keepdim=True)
    return (shares[:, None].float() @ hidden.float())[:, 0]


def _reading(model: Any) -> Reading:
    reading: Reading = getattr(model, "reading", None) or Reading()
    return reading


def head_output(model: Any, hidden: Any) -> Any:
    """The scores of hidden states; the head of a preference model may have a higher precision than its other weights.

    Args:
        model: The preference model, or one whose head is replaced by one without weights, to read its hidden states.
        hidden: Hidden states of shape (rows, hidden size).
    """
    return model.score(hidden.to(getattr(model.score, "weight", hidden).dtype))
