"""Template syntax in rows, principles and few-shot examples stays text; YAML makes data only, and little of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Cai
from helpers import rows_in, sample_row, write_rows
from hypothesis import given
from hypothesis import strategies as st
from report_run import make_run

from cai_cli.common.errors import CaiError
from cai_cli.common.yaml import MAX_YAML, parse_yaml
from cai_cli.constitution.schema import CritiqueExample, PreferencePrinciple, load
from cai_cli.data.schema import Message
from cai_cli.engines.base import GenerationRequest
from cai_cli.engines.scripted import ScriptedEngine
from cai_cli.pipeline.run_file import load_run
from cai_cli.prompting.base import PromptFormat, reply_request, user
from cai_cli.prompting.comparison import comparison_request, contrast_requests, rationale_request, verdict_request
from cai_cli.prompting.evaluation import harm_request
from cai_cli.prompting.revision import critique_request, revision_request

TRICKS = [
    "{{7*7}}", "{{ config }}", "{% for x in range(9) %}x{% endfor %}", "{# gone #}", "{0.__class__}", "{}", "{0}", "{x}",
    "{__import__('os')}", "%s %(x)s %d %%", "${HOME} $HOME $(id) `id`", "\\g<0> \\1 \\\\n", "<%= 7*7 %>", "#{7*7}", "@samples",
    "!!python/object:os.system", "&a *a", "<<: *a", "\\N{BULLET} \\x41", "%TEMP%", "~/x", "\\u0041",
]  # fmt: skip
EVERYTHING = " ".join(TRICKS)
tricky = st.lists(st.sampled_from(TRICKS) | st.text(max_size=4), min_size=1, max_size=6).map("".join).filter(bool)


def text_of(text: Any) -> str:
    return text if isinstance(text, str) else "\n".join(m.content for m in text)


@pytest.mark.parametrize("form", ["chat", "raw"])
@given(message=tricky, principle=tricky, worked=tricky)
def test_no_prompt_builder_interprets_its_input(form: PromptFormat, message: str, principle: str, worked: str) -> None:
    """The text of rows, principles and examples is in the prompt unchanged (forged headings are tested elsewhere)."""
    talk = [user(message), Message(role="assistant", content=message)]
    example = CritiqueExample(
        messages=talk, critique_request=worked, critique=worked, revision_request=worked, revision=worked
    )
    named = PreferencePrinciple(id="p", comparison=principle, following=principle, breaking=principle)
    requests = [
        critique_request(talk, principle, [example], form),
        revision_request(talk, (principle, message), principle, [example], form),
        comparison_request(talk[:1], principle, [message, "other"], [], form),
        rationale_request(talk[:1], principle, [message, "other"], [], form),
        verdict_request(talk[:1], principle, [message, "other"], [], form),
        *contrast_requests(talk[:1], named, form),
    ]
    for request in requests:
        text = text_of(request.text)
        assert message in text
        assert principle in text
    for request in requests[:2]:
        assert worked in text_of(request.text)
    for request in (reply_request(talk[:1], form), harm_request(talk, form)):
        assert message in text_of(request.text)


def test_template_syntax_stays_text_through_the_whole_pipeline(cai: Cai, tmp_path: Path, monkeypatch: Any) -> None:
    prompts: list[str] = []
    answer = ScriptedEngine._reply

    def reply(self: ScriptedEngine, ask: GenerationRequest) -> Any:
        prompts.append(text_of(ask.text))
        return answer(self, ask)

    monkeypatch.setattr(ScriptedEngine, "_reply", reply)
    write_rows(tmp_path / "prompts.jsonl", [{"id": "p", "prompt": EVERYTHING}])
    write_rows(tmp_path / "script.jsonl", [{"replies": [EVERYTHING, EVERYTHING + "!"], "scores": [-1.0, -3.0]}])
    principle = {"id": EVERYTHING, "critique": f"{EVERYTHING} Judge.", "revision": f"{EVERYTHING} Mend."}
    (tmp_path / "own.yaml").write_text(
        json.dumps({"kind": "critique-revision", "name": "own", "principles": [principle]})
    )
    model = ("--model", "scripted:script.jsonl")
    assert cai("sample", "prompts.jsonl", "-o", "s.jsonl", *model, "--n", "2").code == 0
    assert (
        cai("critique-revise", "s.jsonl", "-o", "r.jsonl", *model, "--constitution", "own.yaml", "--rounds", "2").code
        == 0
    )
    assert all(EVERYTHING in text for text in prompts)
    assert len(prompts) >= 2 + 2 * 2 * 2
    rows = rows_in(tmp_path / "r.jsonl")
    assert len(rows) == 2
    for row in rows:
        assert row["prompt"][0]["content"] == EVERYTHING
        assert row["completion"][0]["content"].startswith(EVERYTHING)
        assert {turn["principle_id"] for turn in row["history"]} == {EVERYTHING}
    assert cai("show", "r.jsonl").stdout.count("{{7*7}} {{ config }} {% for") > 4
    assert cai("export", "r.jsonl", "-o", "ds").code == 0


def test_template_syntax_stays_text_in_the_report_and_in_file_names(cai: Cai, tmp_path: Path) -> None:
    run = make_run(tmp_path / "made")
    rows = [
        {**row, "completion": [{"role": "assistant", "content": EVERYTHING}]}
        for row in rows_in(run / "revisions.jsonl")
    ]
    write_rows(run / "revisions.jsonl", rows)
    assert cai("report", str(run)).code == 0
    page = (run / "report.html").read_text()
    assert "{{7*7}}" in page
    assert "{0.__class__}" in page
    assert "49 " not in page[page.index("{{7*7}}") - 40 : page.index("{{7*7}}")]


# --- YAML --------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "object": "!!python/object/apply:os.mknod [ran]",
    "object in a value": "kind: preference\nname: !!python/object/new:os.system [touch ran]\n",
    "name": "kind: !!python/name:os.system\n",
    "module": "kind: !!python/module:antigravity\n",
    "tuple": "kind: !!python/tuple [1, 2]\n",
    "own tag": "!evil {a: 1}",
    "bomb": BOMB,
    "alias": "kind: preference\nname: &n x\nprinciples: [{id: *n, comparison: c}]\n",
    "merge key": "base: &b {id: a, comparison: c}\nkind: preference\nname: x\nprinciples: [{<<: *b}]\n",
    "alias of itself": "&a [*a]",
    "two documents": "kind: preference\nname: x\n---\nkind: preference\n",
    "deep": "[" * 20_000,
    "deeper keys": "a: " + "{a: " * 20_000,
    "a key twice": "kind: preference\nkind: preference\nname: x\n",
    "a key that is a list": "{[a]: b}",
    "a date that is none": "2026-99-99",
    "a number without end": "1" * 5_000,
    "binary": "kind: !!binary |\n  //8=\n",
    "set": "!!set {a, b}",
    "ordered map": "!!omap [a: 1]",
    "control characters": "kind: \x01",
    "long": "# " + "x" * MAX_YAML,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", REFUSED)
def test_yaml_beyond_plain_data_is_a_one_line_error_in_every_file(what: str, cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "evil.yaml").write_text(REFUSED[what])
    write_rows(tmp_path / "samples.jsonl", [sample_row(k) for k in range(2)])
    write_rows(tmp_path / "script.jsonl", [{"replies": ["x"], "scores": [-1.0, -2.0]}])
    model = ("--model", "scripted:script.jsonl")
    for words in (
        ("run", "evil.yaml"),
        ("principles", "validate", "evil.yaml"),
        ("critique", "samples.jsonl", *model, "-o", "out.jsonl", "--constitution", "evil.yaml"),
        ("critique", "samples.jsonl", *model, "-o", "out.jsonl", "--few-shot", "evil.yaml"),
        ("label-prefs", "samples.jsonl", *model, "-o", "out.jsonl", "--constitution", "evil.yaml"),
    ):
        done = cai(*words)
        assert done.code in (1, 2), words
        assert done.stderr.startswith("error: ")
        assert "evil.yaml" in done.stderr
        assert len(done.stderr.splitlines()) <= 2
        assert len(done.stderr) < 2_000
    assert {p.name for p in tmp_path.iterdir()} == {"evil.yaml", "samples.jsonl", "script.jsonl"}


@given(st.text())
def test_any_text_as_yaml_is_data_or_a_one_line_error(text: str) -> None:
    message = problem(lambda: parse_yaml(text, "x.yaml"))
    assert message is None or (message.startswith("x.yaml: ") and "\n" not in message)


def problem(read: Callable[[], Any]) -> str | None:
    """What the one-line error says, or None where plain data was read."""
    try:
        value = read()
    except CaiError as error:
        return error.message
    assert type(value).__module__.partition(".")[0] in ("builtins", "datetime", "cai_cli")
    return None


@given(st.dictionaries(st.sampled_from(["kind", "name", "principles", "examples", "steps", "model", "seed", "x"]),
                       st.recursive(tricky | st.integers() | st.none() | st.booleans() | st.floats(),
                                    lambda c: st.lists(c, max_size=3) | st.dictionaries(tricky, c, max_size=3), max_leaves=6)))  # fmt: skip
def test_any_mapping_is_a_constitution_or_a_run_or_a_one_line_error(value: dict[str, Any]) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
        for read in (load, load_run):
            message = problem(lambda read=read: read(path))  # type: ignore[misc]
            assert message is None or (str(path) in message and "\n" not in message)
