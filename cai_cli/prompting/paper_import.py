"""Imports the JSON files published with the paper as constitutions.

Every string is parsed and rendered again. If the result is not the same byte for byte, the import stops, so no part of
a published prompt is lost.
"""

import re
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common.errors import CaiError, RowError
from cai_cli.constitution.schema import (
    AnyConstitution,
    ComparisonExample,
    CritiqueConstitution,
    CritiqueExample,
    CritiquePrinciple,
    PreferenceConstitution,
    PreferencePrinciple,
)
from cai_cli.data.schema import Message
from cai_cli.data.transcripts import parse_transcript, render_transcript
from cai_cli.prompting.comparison import cot_example

_CRITIQUE = re.compile(r"\A\n\nCritiqueRequest: (.+)\n\nCritique:\Z", re.DOTALL)
_REVISION = re.compile(r"\A\n\nRevisionRequest: (.+)\n\nRevision:\Z", re.DOTALL)
_COMPARISON = re.compile(r"\A\n(.+) Options:\Z", re.DOTALL)
_CRITIQUE_EXAMPLE = re.compile(
    r"\A(.+?)\n\nCritiqueRequest: (.+?)\n\nCritique: (.+?)"
    r"\n\nRevisionRequest: (.+?)\n\nRevision: (.+?)(?:\n\nHuman:)?\Z",
    re.DOTALL,
)
_COT_EXAMPLE = re.compile(
    r"\A(\n{0,2}Human: Consider the following conversation[^\n]+:)(.+?)\n\n\{\}\n \(A\) \[\[\[(.+?)\]\]\]"
    r"\n \(B\) \[\[\[(.+?)\]\]\]\n\nAssistant: Let's think step by step:(.+?)\n\nHuman:\nSo the answer is: "
    r"\((A|B)\)\Z",
    re.DOTALL,
)
_COT_SPEAKER = {"H": "Human", "A": "Assistant"}


def import_published(path: Path) -> AnyConstitution:
    """The constitution in a published file, which is recognised by its content.

    Raises:
        CaiError: The file cannot be read (`cannot-read`) or is not one of the published files
            (`invalid-constitution`).
    """
    try:
        value = orjson.loads(path.read_bytes())
    except OSError as error:
        raise CaiError(f"cannot read {path}: {error.strerror}", code="cannot-read") from error
    except orjson.JSONDecodeError as error:
        raise CaiError(f"{path}: not JSON: {error}", code="invalid-constitution") from error
    try:
        return _recognise(path.stem, value)
    except (CaiError, TypeError, KeyError, ValueError) as error:
        raise CaiError(
            f"{path}: not one of the published files: {error}",
            hint="supported: the critique-revision and the preference instructions and their few-shot prompts",
            code="invalid-constitution",
        ) from error


def _recognise(name: str, value: Any) -> AnyConstitution:
    if isinstance(value, dict) and value:
        principles = [_critique_principle(key, entry) for key, entry in value.items()]
        return CritiqueConstitution(kind="critique-revision", name=name, principles=principles)
    if not isinstance(value, list) or not value:
        raise RowError("not a non-empty object or list", code="invalid-row")
    if isinstance(value[0], dict):
        cot = set(value[0]) == {"prompt"}
        compared = [_cot_example(e["prompt"]) if cot else _preferred(i, e) for i, e in enumerate(value)]
        return PreferenceConstitution(kind="preference", name=name, examples=compared)
    if "CritiqueRequest:" in value[0]:
        examples = [_critique_example(text) for text in value]
        return CritiqueConstitution(kind="critique-revision", name=name, examples=examples)
    comparisons = [_groups(_COMPARISON, text)[0] for text in value]
    principles_ = [PreferencePrinciple(id=f"comparison{i}", comparison=text) for i, text in enumerate(comparisons)]
    return PreferenceConstitution(kind="preference", name=name, principles=principles_)


def _groups(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.match(text)
    if not match:
        raise RowError(f"an entry in another format: {text[:60]!r}", code="invalid-row")
    return match.groups()


def _critique_principle(key: str, entry: dict[str, Any]) -> CritiquePrinciple:
    (prompt,) = entry["prompt"]
    if set(entry) != {"prompt", "edit_request"}:
        raise RowError(f"{key}: other fields than prompt and edit_request", code="invalid-row")
    (critique,) = _groups(_CRITIQUE, prompt)
    (revision,) = _groups(_REVISION, entry["edit_request"])
    return CritiquePrinciple(id=key, critique=critique, revision=revision)


def _critique_example(text: str) -> CritiqueExample:
    transcript, critique_request, critique, revision_request, revision = _groups(_CRITIQUE_EXAMPLE, text)
    example = CritiqueExample(
        messages=parse_transcript(transcript),
        critique_request=critique_request,
        critique=critique,
        revision_request=revision_request,
        revision=revision,
    )
    _check_same(render_transcript(example.messages), transcript)
    return example


def _preferred(index: int, entry: dict[str, Any]) -> ComparisonExample:
    """An example from a prompt with one correct and one incorrect reply.

    Published entries have no letters. The correct reply comes first in every other example, so that the examples teach
    no position.
    """
    (correct,), (incorrect,) = entry["corrects"], entry["incorrects"]
    messages = parse_transcript(entry["prompt"])
    if messages[-1] != Message(role="assistant", content=""):
        raise RowError("a prompt that does not end with an empty assistant turn", code="invalid-row")
    _check_same(render_transcript(messages[:-1]) + "\n\nAssistant:", entry["prompt"])
    correct_first = index % 2 == 0
    return ComparisonExample(
        messages=messages[:-1],
        options=[correct, incorrect] if correct_first else [incorrect, correct],
        answer="A" if correct_first else "B",
    )


def _cot_example(text: str) -> ComparisonExample:
    preamble, conversation, a, b, rationale, answer = _groups(_COT_EXAMPLE, text)
    transcript = re.sub(r"\n\n(H|A):", lambda m: f"\n\n{_COT_SPEAKER[m[1]]}:", conversation)
    example = ComparisonExample(
        messages=parse_transcript(transcript),
        options=[a, b],
        answer="A" if answer == "A" else "B",
        rationale=rationale,
        preamble=preamble,
    )
    _check_same(cot_example(example, "{}"), text)
    return example


def _check_same(rendered: str, published: str) -> None:
    if rendered != published:
        raise RowError(f"an entry that parsing does not preserve: {published[:60]!r}", code="invalid-row")
