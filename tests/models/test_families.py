"""Facts of encoding that hold for the chat template of every family of models."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from family_models import FAMILIES, FRUIT, PEAR, family_model_dir

from cai_cli.constitution.schema import load
from cai_cli.data.schema import Message
from cai_cli.engines.base import ChatOptions
from cai_cli.engines.tokenization import PromptEncoder, encode_chat, end_of_turn_ids
from cai_cli.models.loading import load_generation_config, load_tokenizer
from cai_cli.prompting.base import assistant, user
from cai_cli.prompting.comparison import comparison_request, rationale_request
from cai_cli.prompting.revision import critique_request, revision_request
from cai_cli.prompting.system import with_system
from cai_cli.training.completions import encode

RULE = "Reply in three words."
SHORT, LONG = [user(FRUIT)], [user("Hello."), assistant("Hi."), user(FRUIT)]
every_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def model_dir(name: str) -> Path:
    return family_model_dir(Path(mkdtemp(prefix="cai-test-")) / name, FAMILIES[name])


def tokenizer_of(name: str) -> Any:
    return load_tokenizer(model_dir(name))


@every_family
@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["one turn", "several turns"])
def test_a_conversation_begins_once_and_holds_its_system_text_once(name: str, prompt: list[Message]) -> None:
    tokenizer = tokenizer_of(name)
    whole = with_system(prompt, RULE)
    for chat, starts in ((whole, True), ([*whole, assistant(PEAR)], False)):
        ids = encode_chat(tokenizer, chat, add_generation_prompt=starts)
        if FAMILIES[name].adds_begin:
            assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
        assert tokenizer.decode(ids).count(RULE) == 1


@every_family
@pytest.mark.parametrize("prompt", [SHORT, with_system(LONG, RULE)], ids=["one turn", "system and several turns"])
def test_the_labels_are_the_reply_and_its_end_of_turn(name: str, prompt: list[Message]) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    encoded = encode(tokenizer, prompt, PEAR)
    assert encoded.ids[: encoded.prompt_length] == encode_chat(tokenizer, prompt, add_generation_prompt=True)
    trained = encoded.ids[encoded.prompt_length :]
    assert tokenizer.decode(trained) == f"{family.before}{PEAR}{family.after}"
    ends = end_of_turn_ids(tokenizer, load_generation_config(model_dir(name)))
    assert next(i for i in trained if i in ends) == tokenizer.convert_tokens_to_ids(family.end)
    cut = encode(tokenizer, prompt, PEAR, close=False)
    assert tokenizer.decode(cut.ids[cut.prompt_length :]) == f"{family.before}{PEAR}"


@every_family
def test_an_answer_with_a_given_start_is_a_reply_without_thoughts(name: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    start = "The answer is: ("
    for thinking in ("auto", "on", "off"):
        encoder = PromptEncoder(tokenizer, ChatOptions(thinking))
        ids = encoder.encode(SHORT, start)
        finished = encode_chat(tokenizer, [*SHORT, assistant(start)], add_generation_prompt=False, close=False)
        header = family.before if family.before.strip() else ""
        assert tokenizer.decode(ids).endswith(f"{header}{start}")
        if name != "deepseek-r1":  # whose finished turns have no place for thoughts
            assert tokenizer.decode(ids).replace(" ", "") == tokenizer.decode(finished).replace(" ", "")


@every_family
def test_the_template_takes_what_critics_and_judges_are_asked(name: str) -> None:
    tokenizer = tokenizer_of(name)
    critic, judge = (load(f"principles/{file}.yaml") for file in ("critique_revision", "preference"))
    for prompt in (SHORT, with_system(LONG, RULE)):
        reply = [*prompt, assistant(PEAR)]
        rule, rules = critic.principles[0], judge.principles[0]
        requests = [
            critique_request(reply, rule.critique, critic.examples[:2], "chat"),
            revision_request(reply, (rule.critique, "None."), rule.revision, critic.examples[:2], "chat"),
            revision_request(reply, None, rule.revision, critic.examples[:2], "chat"),
            comparison_request(prompt, rules.comparison, (PEAR, "A stone."), judge.examples[:2], "chat"),
            rationale_request(prompt, rules.comparison, (PEAR, "A stone."), judge.examples[:2], "chat"),
        ]
        for request in requests:
            assert not isinstance(request.text, str)
            assert PromptEncoder(tokenizer).encode(request.text, request.prefill)
