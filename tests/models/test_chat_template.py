import json
from hashlib import sha256
from pathlib import Path

import pytest
from conftest import Cai
from helpers import manifest_of
from tiny import CHATML, tiny_model_dir

from cai_cli.models.loading import load_tokenizer
from cai_cli.models.names import resolve

PEAR, STONE = ([{"role": "assistant", "content": text}] for text in ("A pear.", "A stone."))
ROWS = [
    {"prompt": [{"role": "user", "content": f"Name a {thing}."}], "completion": PEAR, "chosen": PEAR, "rejected": STONE}
    for thing in ("fruit", "town")
]
TRAIN = ["--model", "base", "--max-steps", "1", "--eval-share", "0", "--batch-size", "2"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model without a chat template, as pretrained models have none, and templates beside it."""
    (tmp_path / "chat.jinja").write_text(CHATML)
    (tmp_path / "foreign.jinja").write_text(CHATML.replace("<|im_end|>", "<|over|>"))
    for name, keys in {"sft": ("prompt", "completion"), "pm": ("prompt", "chosen", "rejected")}.items():
        lines = [json.dumps({key: row[key] for key in keys}) for row in ROWS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tiny_model_dir(tmp_path / "base", chat_template=None)


def test_a_base_model_trains_with_a_given_template_and_the_finished_model_carries_it(cai: Cai, base: Path) -> None:
    assert cai("sft", "sft.jsonl", "-o", "without", *TRAIN).error == "no-chat-template"
    for stage, rows in (("sft", "sft.jsonl"), ("train-pm", "pm.jsonl")):
        trained = cai(stage, rows, "-o", stage, *TRAIN, "--chat-template", "chat.jinja")
        assert trained.code == 0, trained.stderr
        assert load_tokenizer(base.parent / stage).chat_template == CHATML
        recorded = manifest_of(base.parent / stage)["provenance"]["model"]["chat_template"]
        assert recorded == sha256(CHATML.encode()).hexdigest()


def test_a_base_model_is_sampled_with_a_given_template(cai: Cai, base: Path) -> None:
    (base.parent / "prompts.txt").write_text("Name a fruit.")
    sample = ["sample", "prompts.txt", "-m", "base", "--max-new-tokens", "4", "--chat-template", "chat.jinja"]
    assert cai(*sample, "-o", "s.jsonl").code == 0
    provenance = manifest_of(base.parent / "s.jsonl")["provenance"]
    assert provenance["settings"]["prompt_format"] == "chat"
    assert provenance["model"]["chat_template"] == sha256(CHATML.encode()).hexdigest()


def test_a_template_whose_turns_no_token_of_the_model_ends_is_refused(cai: Cai, base: Path) -> None:
    refused = cai("sft", "sft.jsonl", "-o", "m", *TRAIN, "--chat-template", "foreign.jinja")
    assert (refused.code, refused.error) == (2, "invalid-option")
    assert "{{ eos_token }}" in refused.stderr


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace("message['content']", "message['content'] | upper"), "without changes"),
        ("{# a #}" * 200_000 + CHATML, "longer than"),
    ],
)
def test_a_template_that_changes_replies_or_is_no_template_at_all_is_refused(
    cai: Cai, base: Path, template: str, said: str
) -> None:
    (base.parent / "wrong.jinja").write_text(template)
    refused = cai("sft", "sft.jsonl", "-o", "m", *TRAIN, "--chat-template", "wrong.jinja")
    assert (refused.code, refused.error) == (2, "invalid-option")
    assert said in refused.stderr


def test_an_adapter_that_was_trained_with_a_given_template_carries_it(cai: Cai, base: Path) -> None:
    given = ["--chat-template", "chat.jinja", "--keep-adapter"]
    pair = {"chosen": PEAR, "rejected": STONE}
    pairs = [{"prompt": [{"role": "user", "content": f"Name {i}."}]} | pair for i in range(10)]
    (base.parent / "pm.jsonl").write_text("\n".join(json.dumps(row) for row in pairs))
    for stage, rows, kind in (("sft", "sft.jsonl", ["--lora"]), ("train-pm", "pm.jsonl", ["--fit-head"])):
        steps = TRAIN if stage == "sft" else ["--model", "base", "--epochs", "0", "--eval-share", "0"]
        trained = cai(stage, rows, "-o", stage, *steps, *given, *kind)
        assert trained.code == 0, trained.stderr
        assert load_tokenizer(resolve(f"{base}+{base.parent / stage}/adapter")).chat_template == CHATML


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("messages=[]", "no such argument"),  # it is the template's, but each request has its own
        ("add_generation_prompt=false", "no such argument"),
        ("day=2026-01-01", "cannot be recorded"),
        ("level=.nan", "cannot be recorded"),
        ("map={1: 2}", "cannot be recorded"),
        ("map=!!set {a}", "cannot be recorded"),
    ],
)
def test_arguments_of_a_template_that_cannot_be_given_or_recorded_are_usage_errors(
    cai: Cai, base: Path, argument: str, said: str
) -> None:
    (base.parent / "prompts.txt").write_text("Name a fruit.")
    given = ["--chat-template", "chat.jinja", "--template-arg", argument]
    refused = cai("sample", "prompts.txt", "-m", "base", "-o", "s.jsonl", *given)
    assert (refused.code, refused.error) == (2, "invalid-option")
    assert said in refused.stderr
