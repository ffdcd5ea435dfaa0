"""The published JSON forms, rebuilt here in other words: imported whole, or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai

from cai_cli.common.errors import CaiError
from cai_cli.constitution import schema as con
from cai_cli.prompting.comparison import cot_example
from cai_cli.prompting.paper_import import import_published
from cai_cli.prompting.revision import critique_request

INSTRUCTIONS = {
    "rule0": {
        "prompt": ["\n\nCritiqueRequest: What could hurt?\nSay where.\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Make it gentle.\n\nRevision:",
    },
    "rule1": {
        "prompt": ["\n\nCritiqueRequest: Is it true?\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Make it true.\n\nRevision:",
    },
}
_TALK = "\n\nHuman: may I?\n\nAssistant: Yes, take it."
_WORKED = (
    "\n\nCritiqueRequest: Whose is it?\n\nCritique: Not yours."
    "\n\nRevisionRequest: Respect that.\n\nRevision: Ask first."
)
EXAMPLES = [f"{_TALK}{_WORKED}\n\nHuman:", f"{_TALK}\n\nHuman: sure?\n\nAssistant: Sure.{_WORKED}"]
COMPARISONS = ["\nWhich one is warmer? Options:", "\nWhich one\nis wiser? Options:"]
_TURNS = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
COMPARED = [
    {"prompt": _TURNS, "corrects": ["good"], "incorrects": ["bad"]},
    {"prompt": "\n\nHuman: four\n\nAssistant:", "corrects": ["right"], "incorrects": ["wrong"]},
]


def cot(speaker: str, answer: str) -> str:
    return (
        f"{speaker}: Consider the following conversation between a human and a helper:"
        "\n\nH: one?\n\nA: two.\n\nH: three?\n\n{}\n (A) [[[left [1].]]]\n (B) [[[right]]]\n\nAssistant: Let's think step by step: left is \n\nright.\n\n"
        f"Human:\nSo the answer is: ({answer})"
    )


COT = [{"prompt": cot("\n\nHuman", "A")}, {"prompt": cot("Human", "B")}]


def put(folder: Path, value: Any) -> Path:
    path = folder / "Given.json"
    path.write_text(json.dumps(value))
    return path


def test_critique_instructions_become_principles(tmp_path: Path) -> None:
    found = import_published(put(tmp_path, INSTRUCTIONS))
    assert isinstance(found, con.CritiqueConstitution)
    assert [p.model_dump(exclude_none=True) for p in found.principles] == [
        {"id": "rule0", "critique": "What could hurt?\nSay where.", "revision": "Make it gentle."},
        {"id": "rule1", "critique": "Is it true?", "revision": "Make it true."},
    ]
    assert found.name == "Given"


def test_few_shot_critiques_render_back_to_the_published_text(tmp_path: Path) -> None:
    found = import_published(put(tmp_path, EXAMPLES))
    assert isinstance(found, con.CritiqueConstitution)
    raw = critique_request([], "x", found.examples, "raw").text
    assert raw == "".join(text.removesuffix("\n\nHuman:") for text in EXAMPLES) + "\n\nCritiqueRequest: x"


def test_comparisons_become_principles(tmp_path: Path) -> None:
    found = import_published(put(tmp_path, COMPARISONS))
    assert isinstance(found, con.PreferenceConstitution)
    assert [p.comparison for p in found.principles] == ["Which one is warmer?", "Which one\nis wiser?"]


def test_pairs_become_examples_whose_answers_alternate(tmp_path: Path) -> None:
    found = import_published(put(tmp_path, COMPARED))
    assert isinstance(found, con.PreferenceConstitution)
    assert [(e.options, e.answer) for e in found.examples] == [(["good", "bad"], "A"), (["wrong", "right"], "B")]
    assert [m.content for m in found.examples[0].messages] == ["one", "two", "three"]


def test_chain_of_thought_examples_come_back_byte_for_byte(tmp_path: Path) -> None:
    found = import_published(put(tmp_path, COT))
    assert isinstance(found, con.PreferenceConstitution)
    assert [{"prompt": cot_example(e, "{}")} for e in found.examples] == COT
    assert [e.answer for e in found.examples] == ["A", "B"]
    assert found.examples[0].options == ["left [1].", "right"]


@pytest.mark.parametrize("value", [INSTRUCTIONS, EXAMPLES, COMPARISONS, COMPARED, COT])
def test_an_import_survives_yaml_and_is_not_replaced_without_overwrite(value: Any, cai: Cai, tmp_path: Path) -> None:
    path = put(tmp_path, value)
    done = cai("principles", "import", "Given.json", "-o", "deep/ours.yaml")
    assert done.code == 0, done.stderr
    ours = tmp_path / "deep/ours.yaml"
    assert con.load(ours) == import_published(path)
    ours.write_text("mine")
    assert cai("principles", "import", "Given.json", "-o", "deep/ours.yaml").code == 1
    assert ours.read_text() == "mine"
    assert cai("principles", "import", "Given.json", "-o", "deep/ours.yaml", "--overwrite").code == 0
    assert con.load(ours) == import_published(path)


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        3,
        [3],
        {"rule0": {"prompt": ["no request"], "edit_request": "\n\nRevisionRequest: x\n\nRevision:"}},
        {"rule0": {"prompt": [], "edit_request": ""}},
        {"rule0": {**INSTRUCTIONS["rule0"], "weight": 2}},
        {"rule0": ["x"]},
        [COMPARISONS[0], "Which one is warmer?"],
        [EXAMPLES[0], "\n\nHuman: cut off\n\nCritiqueRequest: x"],
        [EXAMPLES[0].replace("Human: may", "Human:  may").replace("Assistant: Yes", "Assistant:Yes")],
        [{**COMPARED[0], "corrects": ["a", "b"]}],
        [{**COMPARED[0], "prompt": "\n\nHuman: no cue"}],
        [COT[0], {"prompt": cot("Human", "C")}],
    ],
)
def test_an_entry_of_another_form_stops_the_import(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CaiError) as error:
        import_published(put(tmp_path, value))
    assert error.value.code == "invalid-constitution"


def test_a_file_that_is_missing_or_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "Given.json").write_text("{")
    with pytest.raises(CaiError) as error:
        import_published(tmp_path / "Given.json")
    assert error.value.code == "invalid-constitution"
    with pytest.raises(CaiError) as error:
        import_published(tmp_path / "None.json")
    assert error.value.code == "cannot-read"
