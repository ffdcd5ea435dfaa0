"""Principles: what is read, what is refused, and a draw that depends on the row alone."""

from collections import Counter
from pathlib import Path

import pytest
from conftest import COMPARE, SMALL

from cai_cli.common.errors import CaiError
from cai_cli.constitution import schema as con


@pytest.mark.parametrize("name", con.SHIPPED.values())
def test_the_shipped_principles_are_sixteen_with_examples_and_come_back_from_their_dump(
    name: str, tmp_path: Path
) -> None:
    shipped = con.load(con.shipped_directory() / name)
    assert len(shipped.principles) == 16
    assert len(shipped.examples) >= 2
    (tmp_path / "again.yaml").write_text(con.dump(shipped), encoding="utf-8")
    assert con.load(tmp_path / "again.yaml") == shipped


def test_shipped_comparison_examples_teach_no_position() -> None:
    shipped = con.open_constitution(con.PreferenceConstitution, None, None)
    counts = Counter(e.answer for e in shipped.examples)
    assert abs(counts["A"] - counts["B"]) <= 1


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nkind: preference\nname: n\nprinciples: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "aliases are not allowed"),
        ("kind: preference\nname: !!python/object/apply:os.system [true]\n", "not YAML"),
        ("kind: [preference]\n", "`kind` must be one of"),
        ("kind: other\n", "`kind` must be one of critique-revision, preference, not 'other'"),
        ("- a\n", "`kind` must be one of"),
        ("", "`kind` must be one of"),
        ("kind: preference\nname: [\n", "not YAML"),
        ("kind: preference\nname: 2024-99-99\n", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("kind: preference\nname: a\nname: b\n", "key 'name' occurs twice"),
        ("kind: preference\nname: n\nmore: 1\n", "more: Extra inputs are not permitted"),
        ("kind: preference\nname: n\nprinciples: [{id: a}]\n", "principles.0.comparison: Field required"),
        ("kind: preference\nname: n\nprinciples: [{id: a, comparison: ''}]\n", "principles.0.comparison"),
        ("kind: preference\nname: n\nprinciples: [{id: 1, comparison: x}]\n", "principles.0.id"),
        (
            "kind: preference\nname: n\nprinciples: [{id: a, comparison: x}, {id: a, comparison: y}]\n",
            "'a' occurs twice",
        ),
        (SMALL.replace("role: assistant", "role: user"), "messages must end with the assistant reply"),
        (COMPARE.replace("answer: A", "answer: C"), "examples.0.answer"),
        (COMPARE.replace("[me, you]", "[me]"), "examples.0.options"),
    ],
)
def test_an_invalid_constitution_is_refused_in_one_line_naming_the_file(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(CaiError) as error:
        con.load(path)
    assert error.value.message.startswith(f"{path}: ")
    assert reason in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("content", [None, b"kind: \xff\n"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(CaiError) as error:
        con.load(tmp_path / "bad.yaml")
    assert error.value.code == "cannot-read"


def test_the_fingerprint_is_of_what_decides_prompts(small: Path) -> None:
    def fingerprint(text: str) -> str:
        small.write_text(text)
        return con.load(small).fingerprint()

    same = {fingerprint(SMALL), fingerprint("license: MIT\ndescription: d\n" + SMALL.replace("name: small", "name: n"))}
    assert len(same) == 1
    changed = [
        ("Rewrite it.", "Rewrite it!"), ("Redo it.", "Redo."), ("id: b", "id: c"), ("theme: harm", "theme: hurt"),
    ]  # fmt: skip
    assert len(same | {fingerprint(SMALL.replace(*change)) for change in changed}) == 5


def test_few_shot_takes_the_examples_of_another_file_or_none(small: Path) -> None:
    model = con.CritiqueConstitution
    own = con.open_constitution(model, str(small), None)
    shipped = con.open_constitution(model, None, None)
    mixed = con.open_constitution(model, None, str(small))
    assert (mixed.principles, mixed.examples) == (shipped.principles, own.examples)
    assert con.open_constitution(model, str(small), "none").examples == []
    assert len({c.fingerprint() for c in (own, shipped, mixed)}) == 3


def test_a_file_of_the_other_kind_or_without_principles_is_refused(small: Path) -> None:
    compare = str(small.with_name("compare.yaml"))
    with pytest.raises(CaiError) as error:
        con.open_constitution(con.CritiqueConstitution, compare, None)
    assert error.value.code == "invalid-constitution"
    with pytest.raises(CaiError) as error:
        con.open_constitution(con.CritiqueConstitution, None, compare)
    assert error.value.code == "invalid-constitution"
    small.write_text("kind: critique-revision\nname: bare\n")
    with pytest.raises(CaiError) as error:
        con.open_constitution(con.CritiqueConstitution, str(small), None)
    assert error.value.code == "invalid-constitution"


def test_a_weight_of_one_changes_neither_the_fingerprint_nor_the_file() -> None:
    def with_weight(**weight: float) -> con.PreferenceConstitution:
        principle = {"id": "kind", "comparison": "Choose the kinder reply."}
        return con.PreferenceConstitution.model_validate(
            {"kind": "preference", "name": "one", "principles": [principle | weight]}
        )

    assert with_weight().fingerprint() == with_weight(weight=1).fingerprint() != with_weight(weight=2).fingerprint()
    assert "weight" not in con.dump(with_weight())
    assert "weight: 2.0" in con.dump(with_weight(weight=2))
