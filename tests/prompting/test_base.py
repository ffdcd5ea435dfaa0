"""Prompt formats, transcripts and stop strings."""

from types import SimpleNamespace
from typing import Any

import pytest

from cai_cli.common.errors import UsageError
from cai_cli.engines.base import ChatOptions
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.prompting.base import (
    RAW_STOPS,
    Request,
    assistant,
    reply_request,
    resolve_prompt_format,
    user,
)
from cai_cli.prompting.comparison import (
    comparison_request,
)
from cai_cli.prompting.revision import critique_request

TALK = [user("how?"), assistant("like so.")]


def test_a_raw_reply_request_is_the_transcript_and_the_prefill() -> None:
    assert reply_request(TALK[:1], "raw") == Request("\n\nHuman: how?", "\n\nAssistant:", RAW_STOPS)
    assert reply_request(TALK[:1], "chat") == Request(TALK[:1])


@pytest.mark.parametrize("odd", ["{}", "{0}", "%s", "{{ x }}", "\\1", "$HOME"])
def test_template_syntax_inside_rows_stays_text(odd: str) -> None:
    text = comparison_request([user(odd)], odd, [odd, odd], [], "raw").text
    assert isinstance(text, str)
    assert text.count(odd) == 4
    assert odd in str(critique_request([user(odd), assistant(odd)], odd, [], "raw").text)


def test_the_auto_format_depends_on_the_engine_and_an_unknown_format_is_a_usage_error(tmp_path) -> None:  # type: ignore[no-untyped-def]
    script = tmp_path / "script.jsonl"
    script.write_text('{"replies": ["x"]}\n')
    engine = ScriptedEngine(str(script))
    assert (resolve_prompt_format("auto", engine), resolve_prompt_format("raw", engine)) == ("chat", "raw")
    with pytest.raises(UsageError) as error:
        resolve_prompt_format("html", engine)
    assert error.value.code == "invalid-option"


def test_options_of_the_chat_template_are_refused_where_prompts_are_raw() -> None:
    for options in (ChatOptions(thinking="on"), ChatOptions(template_args={"a": 1}), ChatOptions(template="f.jinja")):
        for choice in ("raw", "auto"):
            engine: Any = SimpleNamespace(chat=options, supports_chat=lambda: False)
            with pytest.raises(UsageError) as caught:
                resolve_prompt_format(choice, engine)
            assert caught.value.code == "option-conflict"
        assert resolve_prompt_format("chat", engine) == "chat"
    plain: Any = SimpleNamespace(chat=ChatOptions(), supports_chat=lambda: False)
    assert resolve_prompt_format("auto", plain) == "raw"
