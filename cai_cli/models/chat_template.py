"""Chat templates that the user gives for models, in place of their own or where they have none (`--chat-template`).

A template is registered for the directory of a model and holds for every tokenizer that is loaded from there, so that
all parts of a stage render alike. A manifest records its hash, and a trained model is saved with it.
"""

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from cai_cli.common.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEMPLATE = 1 << 20  # characters; published templates have some thousands
_GIVEN: dict[Path, str] = {}  # directory of a model -> its template


def use_chat_template(path: Path, file: str | None) -> Path:
    """`path`, whose tokenizers are loaded with the template in `file` from now on; with None as they are.

    Raises:
        UsageError: The file cannot be read, is too long or holds no text (`invalid-option`).
    """
    if file is None:
        return path
    try:
        with open(file, encoding="utf-8") as opened:
            template = opened.read(MAX_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {file}: cannot be read: {error}", code="invalid-option") from error
    if len(template) > MAX_TEMPLATE:
        raise UsageError(
            f"--chat-template {file}: longer than {MAX_TEMPLATE:,} characters, not a chat template",
            code="invalid-option",
        )
    if not template.strip():
        raise UsageError(f"--chat-template {file}: the file is empty", code="invalid-option")
    _GIVEN[path.resolve()] = template
    return path


def given_template(path: Path) -> str | None:
    """The template registered for the model in a directory, or None."""
    return _GIVEN.get(path.resolve())


def recorded_template(path: Path) -> dict[str, str]:
    """What a manifest records of the template given for the model in a directory; empty without one."""
    template = given_template(path)
    return {} if template is None else {"chat_template": sha256(template.encode()).hexdigest()}


def apply_given_template(path: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Set the template registered for `path`.

    Raises:
        UsageError: It is not a template, or ends an assistant's turn with text that is no token of this model
            (`invalid-option`): the model could not learn where a turn ends.
    """
    template = given_template(path)
    if template is None:
        return
    tokenizer.chat_template = template
    marker = "cai-end-of-turn-marker"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
    try:
        rendered: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template is a program and may raise anything
        raise UsageError(f"--chat-template: the template fails: {error}", code="invalid-option") from error
    if marker not in rendered:
        raise UsageError(
            "--chat-template: the template does not write an assistant's turn as it is",
            hint="let it write message['content'] of every role, without changes",
            code="invalid-option",
        )
    if not set(tokenizer(rendered.partition(marker)[2], add_special_tokens=False)["input_ids"]) & set(
        tokenizer.added_tokens_decoder
    ):
        raise UsageError(
            "--chat-template: no token of this model ends an assistant's turn",
            hint="let the template write {{ eos_token }} after it",
            code="invalid-option",
        )
