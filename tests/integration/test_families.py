"""Every stage on a tiny model of each family of chat templates: thoughts stay apart, and saved models end their turns."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from family_models import FAMILIES, FRUIT, PEAR, WANT, Family, family_model_dir
from helpers import rows_in, sample_row, write_rows
from thinking_models import taught

pytestmark = pytest.mark.slow

# The other families differ from these in what `tests/models/test_families.py` checks for all.
DIFFERENT = ("qwen3", "mistral", "deepseek-r1", "gpt-oss")
RULE = "Reply in three words."
TRAIN = ("--max-steps", "1", "--eval-share", "0", "--batch-size", "4", "--learning-rate", "1e-6")
MODEL = ("-m", "m", "--dtype", "float32")
STAGES: dict[str, tuple[str, ...]] = {
    "sample": ("sample", "prompts.txt", *MODEL, "--temperature", "0", "--max-new-tokens", "48"),
    "with-system": ("sample", "prompts.txt", *MODEL, "--max-new-tokens", "48", "--temperature", "0", "--system", RULE),
    "critique": ("critique", "samples.jsonl", *MODEL, "--max-new-tokens", "24"),
    "revise": ("revise", "critiques.jsonl", *MODEL, "--max-new-tokens", "24"),
    "critique-revise": ("critique-revise", "samples.jsonl", *MODEL, "--rounds", "1", "--max-new-tokens", "24"),
    "labels": ("label-prefs", "samples.jsonl", *MODEL, "--few-shot", "none"),
    "sft": ("sft", "samples.jsonl", "-m", "m", *TRAIN),
    "pm": ("train-pm", "labels", "-m", "m", *TRAIN),
    "dpo": ("dpo", "labels", "-m", "m", *TRAIN, "--beta", "0.1"),
    "score": ("score", "samples.jsonl", "--pm", "pm"),
    "rl": ("rl", "prompts.txt", "-m", "m", "--pm", "pm", "--steps", "1", "--prompts-per-step", "2", "--samples-per-prompt", "2",
           "--max-new-tokens", "24", "--held-out", "1", "--device", "cpu", "--learning-rate", "1e-6"),
}  # fmt: skip
MAY_REJECT_ALL = {
    "with-system",
    "critique",
    "revise",
    "critique-revise",
}  # a random model may write nothing that passes the checks


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every message that a chat template renders, whoever asks it to."""
    from transformers import PreTrainedTokenizerBase

    seen: list[str] = []
    apply = PreTrainedTokenizerBase.apply_chat_template

    def spied(self: Any, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        chats = [conversation] if conversation and isinstance(conversation[0], dict) else conversation
        seen.extend(message["content"] for chat in chats for message in chat)
        return apply(self, conversation, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", spied)
    return seen


def check_generation(model: Path, family: Family) -> None:
    """Plain transformers, with the files of a saved model, writes the answer and ends at the end of its turn."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": FRUIT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = AutoModelForCausalLM.from_pretrained(model).generate(**inputs, do_sample=False, max_new_tokens=60)
    assert tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]) == family.answer


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_stage_keeps_thoughts_apart_and_saves_a_model_that_ends_its_turns(
    name: str, cai: Cai, tmp_path: Path, rendered: list[str]
) -> None:
    family = FAMILIES[name]
    taught(family_model_dir(tmp_path / "m", family, max_position_embeddings=2048), FRUIT, family.answer)
    (tmp_path / "prompts.txt").write_text(f"{FRUIT}\nName a town.\nName a river.\nName a tree.\n")
    samples = [sample_row(i, j) | {"thoughts": WANT} for i in range(4) for j in range(2)]
    write_rows(tmp_path / "samples.jsonl", samples)
    asked = {"principle_id": "harmful-1", "round": 0, "critique": "It is short.", "history": []}
    write_rows(tmp_path / "critiques.jsonl", [row | asked for row in samples])
    for out, words in STAGES.items():
        done = cai(*words, "-o", out)
        assert done.code == 0 or (out in MAY_REJECT_ALL and done.code == 1), f"{out}: {done.stderr}"
        assert "Traceback" not in done.stderr
        # In rl the model also samples texts that have thoughts in no form at all.
        thoughts = family.answer.partition(PEAR)[0].strip() if out == "rl" and family.thinks else WANT
        assert not [text for text in rendered if thoughts in text], out
    first = rows_in(tmp_path / "sample")[0]
    assert (first["completion"][0]["content"], first["finish_reason"]) == (PEAR, "stop")
    assert first["thoughts"] == (WANT if family.thinks else None)
    for saved in ("sft", "dpo", "rl"):
        check_generation(tmp_path / saved, family)
    rendered.clear()
    chat = cai("chat", "sft", "--temperature", "0", stdin=f"{FRUIT}\nName a town.\n".encode())
    assert chat.stdout.splitlines()[0] == f"sft> {PEAR}"
    assert not [text for text in rendered if WANT in text]
