import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import manifest_of, rows_in
from loopback import Loopback, completion, http
from thinking_models import BRACKETS, CHANNEL_TAGS, CHANNELS, OPENED, SWITCHED, taught, thinking_model_dir

from cai_cli.data.schema import Message
from cai_cli.engines.base import ChatOptions, GenerationRequest, LogprobRequest, Sampling
from cai_cli.engines.local.engine import LocalEngine
from cai_cli.engines.thoughts import NEVER_LEFT, separate
from cai_cli.models.loading import load_tokenizer
from cai_cli.training.completions import encode

FRUIT = "Name a fruit."
CHAT = [Message(role="user", content=FRUIT)]
WANT, PEAR = "They want a fruit.", "A pear."
# What each kind of model writes after its generation prompt.
ANSWERS = {
    SWITCHED: f"<think>\n{WANT}\n</think>\n\n{PEAR}<|im_end|>",
    OPENED: f"{WANT}\n</think>\n\n{PEAR}<|im_end|>",
    BRACKETS: f"[THINK]{WANT}[/THINK]{PEAR}<|im_end|>",
    CHANNELS: f"<|channel|>analysis<|message|>{WANT}<|end|><|start|>assistant<|channel|>final<|message|>{PEAR}<|return|>",
}
GREEDY = Sampling(max_new_tokens=48, temperature=0)


def engine_of(path: Path, **chat: Any) -> LocalEngine:
    return LocalEngine(str(path), batch_size=None, device="cpu", dtype="auto", chat=ChatOptions(**chat))


@pytest.mark.parametrize("template", ANSWERS, ids=["switched", "opened", "brackets", "channels"])
def test_a_model_that_thinks_answers_with_its_reply_and_its_thoughts_apart(template: str, tmp_path: Path) -> None:
    model = taught(thinking_model_dir(tmp_path / "m", template), FRUIT, ANSWERS[template])
    (answer,) = engine_of(model).generate([GenerationRequest(CHAT, seed=0)], GREEDY)
    assert (answer.text.strip(), answer.thoughts, answer.finish_reason) == (PEAR, WANT, "stop")
    (failure,) = engine_of(model).generate([GenerationRequest(CHAT, seed=0)], Sampling(4, temperature=0))
    assert failure.reason.startswith(NEVER_LEFT)


@pytest.mark.parametrize(
    ("text", "thoughts", "reply"),
    [
        ("<|channel>thought\nHm.<channel|>A pear.", "Hm.", "A pear."),
        ("<think></think>A pear.", None, "A pear."),
        ("Hm.\n</think>\n\nA pear.", "Hm.", "A pear."),
        ("analysisThey want a fruit.assistantfinalA pear.", WANT, PEAR),
        ("analysisThey want", "They want", None),
        ("analysis of fruit", None, "analysis of fruit"),
        ("In HTML a tag such as <think> is unknown.", None, "In HTML a tag such as <think> is unknown."),
    ],
)
def test_thoughts_are_found_in_every_form_and_only_at_the_start(
    text: str, thoughts: str | None, reply: str | None
) -> None:
    assert separate(text) == (thoughts, reply)


def test_a_stop_string_does_not_end_thoughts(tmp_path: Path) -> None:
    model = taught(
        thinking_model_dir(tmp_path / "m", OPENED), FRUIT, f"One.\nTwo.\n</think>\n\n{PEAR}\nMore.<|im_end|>"
    )
    (answer,) = engine_of(model).generate([GenerationRequest(CHAT, seed=0, stop=("\nMore", "\nTwo"))], GREEDY)
    assert (answer.text, answer.thoughts) == (PEAR, "One.\nTwo.")


def test_thinking_is_switched_by_the_templates_argument_or_by_closing_what_it_opens(tmp_path: Path) -> None:
    empty = "<think>\n\n</think>\n\n"
    for template, thinking, end in [
        (SWITCHED, "off", f"assistant\n{empty}"),
        (SWITCHED, "on", "assistant\n"),
        (OPENED, "off", f"assistant\n{empty}"),
        (CHANNEL_TAGS, "on", "assistant\n"),
        (CHANNELS, "off", "assistant<|channel|>final<|message|>"),
    ]:
        model = thinking_model_dir(tmp_path / f"{abs(hash(template))}", template)
        engine = engine_of(model, thinking=thinking)
        ids = engine.encoder.encode(CHAT, "", thinks=engine.encoder.may_think(GenerationRequest(CHAT, 0)))
        assert engine.tokenizer.decode(ids).endswith(end)
        assert engine.identity()["thinking"] == thinking


def test_the_start_of_an_answer_and_its_options_follow_closed_thoughts(tmp_path: Path) -> None:
    engine = engine_of(thinking_model_dir(tmp_path / "m", OPENED))
    ids = engine.encoder.encode(CHAT, "The answer is: (")
    assert engine.tokenizer.decode(ids).endswith("<think>\n\n</think>\n\nThe answer is: (")
    switched_off = engine_of(tmp_path / "m", thinking="off")
    asked = [LogprobRequest(CHAT, ("A", "B"))]
    assert engine.option_logprobs(asked) == switched_off.option_logprobs(asked)


def test_an_argument_that_the_template_does_not_read_is_an_error(cai: Cai, tmp_path: Path) -> None:
    thinking_model_dir(tmp_path / "m", BRACKETS)
    (tmp_path / "prompts.txt").write_text(FRUIT)
    sample = ["sample", "prompts.txt", "-o", "s.jsonl", "-m", "m", "--max-new-tokens", "4"]
    refused = cai(*sample, "--template-arg", "reasoning_efort=high")
    assert (refused.code, refused.error) == (2, "invalid-option")
    cai(*sample, "--template-arg", "reasoning_effort=low")
    assert manifest_of(tmp_path / "s.jsonl")["provenance"]["model"]["template_args"] == {"reasoning_effort": "low"}


def test_a_template_that_opens_thoughts_trains_on_what_the_model_is_to_write_after_its_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(thinking_model_dir(tmp_path / "m", OPENED))
    for reply in (PEAR, "<think is no tag"):
        encoded = encode(tokenizer, CHAT, reply)
        assert tokenizer.decode(encoded.ids[: encoded.prompt_length]).endswith("assistant\n<think>\n")
        assert tokenizer.decode(encoded.ids[encoded.prompt_length :]) == f"\n</think>\n\n{reply}<|im_end|>\n"


# --- servers --------------------------------------------------------------------------------------------------------


def test_the_thoughts_that_a_server_returns_apart_are_kept_and_are_no_reply(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(FRUIT)
    cut = False

    def answer(request: Any) -> bytes:
        body = completion(request, PEAR)
        (choice,) = body["choices"]
        choice["message"]["reasoning_content"] = WANT
        if cut:
            choice["message"]["content"], choice["finish_reason"] = None, "length"
        return http(body)

    with Loopback(answer) as server:
        sample = ["sample", "prompts.txt", "-m", "openai:m", "--base-url", server.url]
        cai(*sample, "-o", "s.jsonl", "--thinking", "off", "--template-arg", "effort=low")
        cut = True
        cai(*sample, "-o", "cut.jsonl")
        first, second = (request.body for request in server.requests)
    (row,) = rows_in(tmp_path / "s.jsonl")
    assert (row["completion"][0]["content"], row["thoughts"]) == (PEAR, WANT)
    assert first["chat_template_kwargs"] == {"enable_thinking": False, "effort": "low"}
    assert "chat_template_kwargs" not in second
    (rejected,) = rows_in(tmp_path / "cut.jsonl.rejected.jsonl")
    assert rejected["reason"].startswith(NEVER_LEFT)


# --- stages -------------------------------------------------------------------------------------------------------


def script(tmp_path: Path, **line: Any) -> str:
    (tmp_path / "script.jsonl").write_text(json.dumps({"contains": None, **line}))
    (tmp_path / "prompts.txt").write_text(FRUIT)
    return "scripted:script.jsonl"


def test_no_stage_shows_thoughts_to_a_model(cai: Cai, tmp_path: Path) -> None:
    model = script(tmp_path, replies=[f"<think>\n{WANT}\n</think>\n\n{PEAR}"])
    assert cai("sample", "prompts.txt", "-o", "s.jsonl", "-m", model).code == 0
    (sample,) = rows_in(tmp_path / "s.jsonl")
    assert (sample["completion"][0]["content"], sample["thoughts"]) == (PEAR, WANT)
    revise = ["critique-revise", "s.jsonl", "-o", "r.jsonl", "-m", model, "--rounds", "2"]
    assert cai(*revise).code == 0
    (revision,) = rows_in(tmp_path / "r.jsonl")
    assert (revision["completion"][0]["content"], revision["thoughts"]) == (PEAR, WANT)
    assert [each["critique"] for each in revision["history"]] == [PEAR, PEAR]
    assert [each["thoughts"] for each in revision["history"]] == [WANT, WANT]


def test_rows_without_thoughts_are_read_as_before(cai: Cai, tmp_path: Path) -> None:
    model = script(tmp_path, replies=[PEAR])
    cai("sample", "prompts.txt", "-o", "s.jsonl", "-m", model)
    (sample,) = rows_in(tmp_path / "s.jsonl")
    assert sample.pop("thoughts", "missing") is None
    (tmp_path / "old.jsonl").write_text(json.dumps(sample))
    assert cai("critique", "old.jsonl", "-o", "c.jsonl", "-m", model).code == 0


def test_a_reply_that_never_left_its_thoughts_is_rejected_with_that_reason(cai: Cai, tmp_path: Path) -> None:
    cai(
        "sample",
        "prompts.txt",
        "-o",
        "s.jsonl",
        "-m",
        script(tmp_path, replies=["<think>\nHm"], finish_reason="length"),
    )
    (rejected,) = rows_in(tmp_path / "s.jsonl.rejected.jsonl")
    assert rejected["reason"].startswith(f"{NEVER_LEFT}: cut off at the token limit")


def test_doctor_says_how_a_model_thinks(cai: Cai, tmp_path: Path) -> None:
    for template, words in {
        SWITCHED: "written as <think>; --thinking on|off sets enable_thinking",
        OPENED: "opens them with <think>; there is no switch, --thinking off closes them",
        CHANNELS: "written as <|channel|>analysis; there is no switch, --thinking off starts with the reply",
    }.items():
        thinking_model_dir(tmp_path / "m", template)
        checks = {c["name"]: c["found"] for c in json.loads(cai("doctor", "--model", "m", "--json").stdout)["checks"]}
        assert words in checks["thoughts"]
        assert checks["end of turn"].startswith("<|")
