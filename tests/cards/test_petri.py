"""`cai export --for petri`: seeds and dimensions in the Markdown files that inspect-petri 3.1.1 reads."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from conftest import Cai

from cai_cli.constitution.schema import load, shipped_directory

# The fields of inspect_petri.JudgeDimension that its front matter may have.
DIMENSION = {"display_name", "display_order", "description", "tags", "palette"}


def parsed(path: Path) -> tuple[dict[str, Any], str]:
    """As inspect_petri.util.parse_frontmatter: the YAML between two fences, and the text after them."""
    found = re.fullmatch(r"---[ \t]*\n(.*?)\n---[ \t]*\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return yaml.safe_load(found[1]), found[2].strip()


def test_every_principle_is_a_seed_and_a_dimension_of_the_same_name(cai: Cai, tmp_path: Path) -> None:
    for name in ("preference", "critique_revision"):
        source = shipped_directory() / f"{name}.yaml"
        done = cai("export", str(source), "-o", name, "--for", "petri", "--json")
        assert done.code == 0, done.stderr
        principles = load(source).principles
        assert json.loads(done.stdout)["rows"] == len(principles)
        seeds, dimensions = (sorted((tmp_path / name / part).glob("*.md")) for part in ("seeds", "dimensions"))
        assert [path.name for path in seeds] == [path.name for path in dimensions]
        by_id = {p.id: p for p in principles}
        for seed, dimension in zip(seeds, dimensions, strict=True):
            about, instruction = parsed(seed)
            principle = by_id.pop(about["principle"])
            head, rubric = parsed(dimension)
            assert set(head) <= DIMENSION
            assert isinstance(head["description"], str)
            text = getattr(principle, "comparison", None) or principle.critique  # type: ignore[union-attr]
            assert text in instruction
            assert text in rubric
        assert not by_id


def test_names_of_principles_are_never_paths_and_stay_apart(cai: Cai, tmp_path: Path) -> None:
    principles = [{"id": id, "comparison": f"Which is better, {id}?"} for id in ("../a", "a", "a_2", "-")]
    value = {"kind": "preference", "name": "---\nmine: {", "principles": principles}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(value))
    assert cai("export", "mine.yaml", "-o", "petri", "--for", "petri").code == 0
    files = sorted((tmp_path / "petri/seeds").glob("*.md"))
    assert {parsed(file)[0]["principle"] for file in files} == {"../a", "a", "a_2", "-"}
    assert "mine: {" in parsed(tmp_path / "petri/dimensions/a.md")[0]["description"]
    assert cai("export", "mine.yaml", "-o", "petri", "--for", "petri", "--overwrite").code == 0


def test_a_file_that_is_not_a_constitution_is_refused(cai: Cai, tmp_path: Path) -> None:
    (tmp_path / "none.yaml").write_text("kind: preference\nname: none\n")
    done = cai("export", "none.yaml", "-o", "petri", "--for", "petri")
    assert (done.code, done.error) == (1, "invalid-constitution")
