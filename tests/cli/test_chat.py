"""`cai chat`: the history of a conversation, several models, and failures."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Cai
from helpers import write_rows
from loopback import Loopback, good
from thinking_models import OPENED, taught, thinking_model_dir


@pytest.fixture
def script(tmp_path: Path) -> str:
    rows = [
        {"contains": "broken", "replies": []},
        {"contains": "steer", "replies": ["\x1b[31mred [bold]"]},
        {"contains": "long", "replies": ["so lo"], "finish_reason": "length"},
        {"contains": "my name is Ada\n\nAssistant: hello\n\nHuman: who", "replies": ["Ada"]},
        {"contains": "who", "replies": ["nobody"]},
        {"replies": ["hello"]},
    ]
    write_rows(tmp_path / "a.jsonl", rows)
    return "scripted:a.jsonl"


def test_a_chat_keeps_its_history_until_it_is_reset(cai: Cai, script: str) -> None:
    done = cai("chat", script, stdin=b"my name is Ada\n\nwho am i\n/reset\nwho am i\n/quit\nwho am i\n")
    assert done.code == 0
    assert done.stdout.splitlines() == [f"{script}> hello", f"{script}> Ada", f"{script}> nobody"]
    assert "a new conversation starts" in done.stderr


def test_two_models_get_the_same_messages_and_each_keeps_its_own_answers(cai: Cai, script: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "b.jsonl", [{"contains": "Assistant: good day", "replies": ["as I said"]}, {"replies": ["good day"]}])  # fmt: skip
    done = cai("chat", script, "scripted:b.jsonl", stdin=b"my name is Ada\nwho am i")
    assert done.stdout.splitlines() == [
        f"{script}> hello", "scripted:b.jsonl> good day", f"{script}> Ada", "scripted:b.jsonl> as I said",
    ]  # fmt: skip


def test_failures_cut_offs_and_unknown_commands_are_reported_and_not_part_of_the_conversation(
    cai: Cai, script: str
) -> None:
    done = cai("chat", script, stdin=b"broken\nmy name is Ada\nwho\nlong\n/help\nsteer\n")
    assert [line.partition("> ")[2] for line in done.stdout.splitlines()] == [
        "hello", "Ada", "so lo [cut off at --max-new-tokens]", r"\x1b[31mred [bold]",
    ]  # fmt: skip
    assert "the script holds no reply for this prompt; this turn is not part" in done.stderr
    assert "unknown command /help" in done.stderr


def test_the_same_model_twice_gets_numbered_names(cai: Cai, script: str) -> None:
    done = cai("chat", script, script, stdin=b"hi\n")
    assert done.stdout.splitlines() == [f"{script} 1> hello", f"{script} 2> hello"]


def test_a_line_that_is_not_utf8_is_reported_and_not_part_of_the_conversation(cai: Cai, script: str) -> None:
    done = cai("chat", script, stdin=b"my name is Ada\ncaf\xe9\nwho am i\n")
    assert done.stdout.splitlines() == [f"{script}> hello", f"{script}> Ada"]
    assert done.stderr.count("this line is not UTF-8") == 1


def test_a_chat_through_a_server(cai: Cai, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    without = cai("chat", "openai:m", stdin=b"hi")
    assert (without.code, without.error) == (2, "missing-option")
    with Loopback(good) as server:
        assert cai("chat", "openai:m", script, "--base-url", server.url, stdin=b"hi").stdout.count("> ") == 2
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        done = cai("chat", "openai:x", stdin=b"hi")
    assert done.stdout.startswith("openai:x> Words ")
    assert "chat with openai:x: " in done.stderr  # `:x:` is not an emoji here
    local = cai("chat", script, "--base-url", "http://host/v1", stdin=b"hi")
    assert (local.code, local.error) == (2, "option-conflict")
    assert "--model" not in local.stderr


def test_a_chat_with_an_unknown_model_ends_at_once(cai: Cai) -> None:
    assert cai("chat", "./nowhere", stdin=b"hello\n").code == 1


def test_side_by_side_on_a_terminal(tmp_path: Path, script: str) -> None:
    write_rows(tmp_path / "b.jsonl", [{"replies": ["good day"]}])
    command = f"echo hi | {sys.executable} -m cai_cli chat {script} scripted:b.jsonl"
    master, slave = pty.openpty()
    child = subprocess.Popen(["bash", "-c", command], cwd=tmp_path, stdout=slave, stderr=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"})  # fmt: skip
    os.close(slave)
    assert child.wait(timeout=60) == 0
    text = os.read(master, 65536).decode()
    os.close(master)
    assert any("hello" in line and "good day" in line for line in text.splitlines())


def test_a_system_prompt_opens_every_conversation(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "s.jsonl", [{"contains": "Be kind.", "replies": ["kindly"]}, {"replies": ["hello"]}])
    done = cai("chat", "scripted:s.jsonl", "--system", "Be kind.", stdin=b"hi\n/reset\nhi\n")
    assert [line.partition("> ")[2] for line in done.stdout.splitlines()] == ["kindly", "kindly"]


def test_thinking_and_the_chat_template_and_its_arguments_are_options_of_a_chat(cai: Cai, tmp_path: Path) -> None:
    taught(thinking_model_dir(tmp_path / "m", OPENED), "Name a fruit.", "They want one.\n</think>\n\nA pear.<|im_end|>")
    switched = "{% if enable_thinking is defined %}{{ raise_exception('thinking: ' ~ enable_thinking) }}{% endif %}"
    (tmp_path / "switched.jinja").write_text(switched + OPENED)
    chat = ["chat", "m", "--temperature", "0", "--max-new-tokens", "24"]
    given = [*chat, "--chat-template", "switched.jinja"]
    assert cai(*chat, stdin=b"Name a fruit.\n").stdout == "m> A pear.\n"
    assert cai(*given, stdin=b"Name a fruit.\n").stdout == "m> A pear.\n"
    assert "thinking: False" in cai(*given, "--thinking", "off", stdin=b"Name a fruit.\n").stderr
    refused = cai(*chat, "--template-arg", "mood=kind", stdin=b"Name a fruit.\n")
    assert (refused.code, refused.error) == (2, "invalid-option")
