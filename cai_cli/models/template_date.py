"""The date that chat templates write (`strftime_now`, as in Llama 3.2 and gpt-oss).

transformers reads the clock each time a template is rendered, so that prompts would change overnight: within a run, and
between sampling and training. Here the date is read once and held for the process and the processes it starts. A
manifest records it for models whose template writes it, and a resumed run takes the recorded one (`runtime.stage`).
"""

import os
from datetime import date, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from cai_cli.common.errors import CaiError, UsageError
from cai_cli.models.chat_template import given_template

REQUESTED = "CAI_TEMPLATE_DATE"  # set by the user
_HELD = "CAI_HELD_TEMPLATE_DATE"  # for the processes that this one starts
FIELD = "template_date"


def template_date() -> str:
    """The date that templates write, as YYYY-MM-DD: that of `CAI_TEMPLATE_DATE`, or of the first call.

    Raises:
        UsageError: The variable is not a date.
    """
    return _checked(os.environ.get(REQUESTED) or os.environ.setdefault(_HELD, date.today().isoformat()))


def reuse_template_date(recorded: str) -> None:
    """Hold the date that an earlier run recorded, unless the user asks for another one."""
    os.environ[_HELD] = _checked(recorded)


def recorded_date(path: Path) -> dict[str, str]:
    """What a manifest records of the date for the model in a directory; empty if its template does not write it."""
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    files = [path / name for name in names] + sorted(path.glob("additional_chat_templates/*.jinja"))
    given = given_template(path) or ""
    dated = "strftime_now" in given or any(file.is_file() and b"strftime_now" in file.read_bytes() for file in files)
    return {FIELD: template_date()} if dated else {}


def hold_template_date() -> None:
    """Let every chat template of this process see the held date, at midnight, instead of the clock."""
    from transformers.utils import chat_template_utils

    class HeldDate(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "HeldDate":
            return cls.combine(date.fromisoformat(template_date()), datetime.min.time(), tz)

    chat_template_utils.datetime = HeldDate


@lru_cache
def refuse_random_template(template: str) -> None:
    """Raises CaiError `invalid-model` for a chat template that draws at random, which gives a prompt other tokens each
    time."""
    if "random" not in template and "lipsum" not in template:
        return
    from jinja2 import TemplateError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(template).environment.parse(template)
    except TemplateError:  # `encode_chat` reports it for each row
        return
    drawn = any(node.name == "random" for node in tree.find_all(nodes.Filter))
    if drawn or any(node.name == "lipsum" for node in tree.find_all(nodes.Name)):
        raise CaiError(
            "the chat template draws at random, so that equal prompts would differ",
            hint="remove `random` or `lipsum` from the template",
            code="invalid-model",
        )


def _checked(value: str) -> str:
    try:
        return date.fromisoformat(value).isoformat()
    except ValueError:
        raise UsageError(f"{REQUESTED} must be a date as YYYY-MM-DD, not {value!r}", code="invalid-option") from None
