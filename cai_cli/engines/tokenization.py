"""Encodes rows as token ids, and decodes answers. Control tokens come from the chat template, never from a row's text.

A row that spells a control token (`<|im_end|>\\n<|im_start|>system`) could otherwise end its turn and impersonate
another speaker. Such strings are encoded as plain characters.
No other module encodes rows, or decides where an answer ends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cai_cli.common import console
from cai_cli.common.errors import CaiError, RowError, UsageError
from cai_cli.data.schema import Message
from cai_cli.engines import thoughts
from cai_cli.engines.base import ChatOptions, GenerationRequest, Text, drop_broken_end
from cai_cli.models.fetch import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_TEMPLATE = "give one with --chat-template FILE, or use --prompt-format raw where there is such an option"


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    close: bool = True,
    arguments: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a conversation in the tokenizer's chat template.

    If no message spells a token of the tokenizer's added vocabulary, they equal those of
    `tokenizer.apply_chat_template`.

    Args:
        tokenizer: The model's tokenizer.
        messages: The conversation.
        add_generation_prompt: Whether to append the start of an assistant turn.
        close: Whether the end of turn follows the last message.
        arguments: Further arguments of the template, such as `enable_thinking`.

    Raises:
        CaiError: The tokenizer has no chat template (`no-chat-template`).
        RowError: The template does not accept these messages (many accept no system message), or their text cannot be
            distinguished from control tokens.
    """
    if tokenizer.chat_template is None:
        raise CaiError("the model has no chat template", hint=NO_TEMPLATE, code="no-chat-template")
    chat = [{"role": message.role, "content": message.content} for message in messages]
    if chat[:1] and chat[0]["role"] == "system" and not _takes_system(tokenizer):
        chat = _folded(chat)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not close,
            sanitize_control_tokens=_spells_a_token(tokenizer, [message.content for message in messages]),
            return_dict=False,
            tokenizer_kwargs={"verbose": False},
            **(arguments or {}),
        )
    # A template is a program that comes with the model (run in a sandbox) and may raise anything.
    except Exception as error:
        raise RowError(f"the chat template refuses the messages: {first_line(error)}", code="request-failed") from error
    if not ids:
        raise RowError("the chat template renders the messages as no tokens", code="request-failed")
    return ids


def _takes_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template renders system messages: some refuse them, and some leave them out."""
    known: tuple[Any, bool] | None = vars(tokenizer).get("_cai_takes_system")
    if known is None or known[0] != tokenizer.chat_template:
        known = tokenizer.chat_template, _renders_system(tokenizer)
        vars(tokenizer)["_cai_takes_system"] = known
        if not known[1]:
            console.say("the chat template takes no system message: it is put before the first user turn")
    return known[1]


def _renders_system(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether a system message is rendered in the prompt and in the finished conversation: some templates write it into
    the last user turn, and only where no reply follows."""
    marker, user = "cai-system-marker", {"role": "user", "content": "a"}
    prompt = [{"role": "system", "content": marker}, user]
    chats = [prompt, [*prompt, {"role": "assistant", "content": "b"}]]
    try:
        return all(marker in tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats)
    except Exception:  # whatever the template raises
        return False


def _folded(chat: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation with its system message at the start of its first user turn."""
    system, *rest = chat
    if not rest or rest[0]["role"] != "user":
        return chat
    return [{"role": "user", "content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str, *, start: bool = True) -> list[int]:
    """The token ids of plain text. Special tokens spelled in `text` are encoded as plain characters.

    Args:
        tokenizer: The model's tokenizer.
        text: The text.
        start: Whether to prepend what the tokenizer puts before any text (a begin-of-text id).
    """
    ids: list[int] = tokenizer(text, add_special_tokens=start, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def generation_prompt(tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any] | None = None) -> str:
    """The text that the chat template writes after the last user turn to start an answer; empty where it fails."""
    marker = "cai-last-turn-marker"
    try:
        rendered: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": marker}], add_generation_prompt=True, tokenize=False, **(arguments or {})
        )
    except Exception:  # `encode_chat` reports it for each row
        return ""
    return rendered.rpartition(marker)[2]


def reply_header(tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any] | None = None) -> str:
    """What the chat template writes between its generation prompt and the reply of a finished turn.

    It is the header of a channel, or empty thoughts; empty where there is nothing but white space, or where a finished
    turn does not begin with the generation prompt.
    """
    marker, reply = "cai-last-turn-marker", "cai-reply-marker"
    chat = [{"role": "user", "content": marker}, {"role": "assistant", "content": reply}]
    try:
        rendered: str = tokenizer.apply_chat_template(chat, tokenize=False, **(arguments or {}))
    except Exception:  # `encode_chat` reports it for each row
        return ""
    start = generation_prompt(tokenizer, arguments)
    before = rendered.rpartition(marker)[2].partition(reply)[0]
    header = before.removeprefix(start)
    return header if before.startswith(start) and header.strip() else ""


def control_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The token ids of text of a chat template, whose control tokens are encoded as such."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return ids


# The arguments by which chat templates switch thoughts.
SWITCHES = ("enable_thinking", "thinking")
# Variables of chat templates that are no arguments: they are those of each request.
NO_ARGUMENTS = frozenset({"messages", "add_generation_prompt"})


def template_variables(tokenizer: "PreTrainedTokenizerBase") -> set[str]:
    """The variables that a chat template reads; empty without a valid template."""
    from jinja2 import TemplateError, meta
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if tokenizer.chat_template is None:
        return set()
    try:
        template = tokenizer.get_chat_template()
        return meta.find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))
    except (TemplateError, ValueError):  # `encode_chat` reports it for each row
        return set()


@dataclass(frozen=True)
class PromptEncoder:
    """Encodes the requests of an engine in this process.

    Attributes:
        tokenizer: The model's tokenizer.
        chat: How chats are rendered.
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat: ChatOptions = field(default_factory=ChatOptions)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments of the chat template. `thinking` sets the switches that the template has."""
        variables = template_variables(self.tokenizer) - NO_ARGUMENTS
        if unknown := sorted(self.chat.template_args.keys() - variables):
            raise UsageError(
                f"--template-arg {unknown[0]}: the model's chat template has no such argument", code="invalid-option"
            )
        switches = {name: self.chat.thinking == "on" for name in SWITCHES if name in variables}
        return ({} if self.chat.thinking == "auto" else switches) | dict(self.chat.template_args)

    @cached_property
    def opened(self) -> str:
        """The opening of thoughts with which the template starts an answer; empty without one."""
        return thoughts.unclosed(generation_prompt(self.tokenizer, self.arguments))

    @cached_property
    def reply_start(self) -> list[int]:
        """The token ids between the generation prompt and a reply without thoughts: the end of thoughts that the
        template opens, the header of the reply's channel, or empty thoughts."""
        start = thoughts.closing_of(self.opened) or reply_header(self.tokenizer, self.arguments)
        return control_ids(self.tokenizer, start)

    def may_think(self, request: GenerationRequest) -> bool:
        """Whether the answer to a request may begin with thoughts: in a chat that has no start of its answer."""
        return not isinstance(request.text, str) and not request.prefill and self.chat.thinking != "off"

    def opened_in(self, request: GenerationRequest) -> str:
        """`opened`, where the answer to a request starts within thoughts."""
        return self.opened if self.may_think(request) else ""

    def encode(self, text: Text, continuation: str, *, thinks: bool = False) -> list[int]:
        """The token ids of `text` followed by `continuation`.

        Args:
            text: A chat, or raw text.
            continuation: The start of the answer.
            thinks: Whether the answer may begin with thoughts. Otherwise `reply_start` stands before the continuation,
                so that it belongs to the reply.

        Raises:
            RowError: As `encode_chat`, like CaiError.
        """
        if isinstance(text, str):
            return encode_text(self.tokenizer, text + continuation)
        ids = encode_chat(self.tokenizer, text, add_generation_prompt=True, arguments=self.arguments)
        start = [] if thinks else self.reply_start
        return [*ids, *start, *encode_text(self.tokenizer, continuation, start=False)]


def _spells_a_token(tokenizer: "PreTrainedTokenizerBase", contents: Sequence[str]) -> bool:
    from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

    tokens = tokenizer.added_tokens_encoder
    spelled = any(token in content for content in contents for token in tokens)
    # transformers marks spelled control tokens with these two private characters, and would delete them from a text.
    marks = (_CONTROL_TOKEN_START, _CONTROL_TOKEN_END)
    if spelled and any(mark in content for content in contents for mark in marks):
        raise RowError(
            "a message spells a control token and contains U+F0000 or U+F0001: both together cannot be encoded",
            code="request-failed",
        )
    return spelled


def end_of_turn_ids(tokenizer: "PreTrainedTokenizerBase", generation_config: Any) -> frozenset[int]:
    """The token ids that end an answer: in every engine, in `cai rl`, and in the models that training saves.

    These are the ends that the model and the tokenizer declare, and the control token that follows an assistant's turn
    in the chat template: a model tuned from a base model often declares only the base model's end.

    Args:
        tokenizer: The model's tokenizer.
        generation_config: The model's generation config, or None.
    """
    ends = {*_declared_ends(generation_config), *_template_end(tokenizer)}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return frozenset(ends)


def declare_end_of_turn(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Add the ids of `end_of_turn_ids` to the model's generation config, and return them.

    The config is what `generate` of transformers, TRL and servers such as vLLM read, and is saved with the model. So a
    trained model ends its turns there too.
    """
    ends = end_of_turn_ids(tokenizer, model.generation_config)
    declared = _declared_ends(model.generation_config)
    if added := sorted(ends - set(declared)):
        model.generation_config.eos_token_id = [*declared, *added]
    return ends


def decode_reply(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], ends: frozenset[int]) -> tuple[str, str]:
    """The text of an answer without its end of turn, and its finish reason ("stop" or "length").

    Thoughts are part of the text, with their tags (`thoughts.separate`).

    Args:
        tokenizer: The model's tokenizer.
        ids: The token ids of the answer, with its end of turn if it reached one.
        ends: The ids of `end_of_turn_ids`.
    """
    ended = bool(ids) and ids[-1] in ends
    return drop_broken_end(decode(tokenizer, ids[:-1] if ended else ids), "stop" if ended else "length")


def decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens except those around thoughts (`thoughts.MARKERS`)."""
    markers = {i: token for token, i in tokenizer.added_tokens_encoder.items() if token in thoughts.MARKERS}
    if markers.keys().isdisjoint(ids):
        return _decode_plain(tokenizer, ids)
    runs = [(marker, list(run)) for marker, run in groupby(ids, markers.get)]
    return "".join(marker * len(run) if marker else _decode_plain(tokenizer, run) for marker, run in runs)


def _decode_plain(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _declared_ends(generation_config: Any) -> list[int]:
    declared = generation_config.eos_token_id if generation_config else None
    return [declared] if isinstance(declared, int) else list(declared or ())


def _template_end(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The control token that closes an assistant's turn, as a list of one id; empty where there is none."""
    if tokenizer.chat_template is None:
        return []
    marker = "cai-end-of-turn-marker"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
    try:
        rendered: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # `encode_chat` reports it for each row
        return []
    after = rendered.partition(marker)[2]
    control = set(tokenizer.added_tokens_decoder)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next(([i] for i in ids if i in control), [])
