"""`cai sample`: seeds, rejected replies and limits."""

import json
from pathlib import Path

from conftest import Cai
from helpers import manifest_of, rows_in, write_rows
from reviser_cases import Recorder

from cai_cli.common.seeds import seed_for
from cai_cli.constitution.schema import PreferencePrinciple, load, shipped_directory
from cai_cli.data.schema import Prompt, Rejected, Sample, load_row
from cai_cli.engines.base import RequestFailure, Sampling
from cai_cli.phase1_supervised.sample import sample


def test_sampling_gives_every_reply_its_own_seed_and_rejects_empty_replies() -> None:
    prompt = load_row(Prompt, {"id": "p", "prompt": [{"role": "user", "content": "q"}]})
    engine = Recorder(" one \n", "  ", RequestFailure("does not fit"))
    outcomes = list(sample([(prompt, i) for i in range(3)], engine, sampling=Sampling(), form="chat", seed=5))
    assert [o.key for o in outcomes] == ["p/0", "p/1", "p/2"]
    assert isinstance(outcomes[0], Sample)
    assert outcomes[0].reply == "one"
    assert [o.reason for o in outcomes if isinstance(o, Rejected)] == ["empty reply", "does not fit"]
    assert [a.seed for a in engine.requests] == [seed_for(5, "sample", "p", i) for i in range(3)]


def test_kind_is_for_rows_without_one_and_another_word_is_a_usage_error(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "p.jsonl", [{"prompt": "a", "kind": "helpful"}, {"prompt": "b"}])
    words = ("sample", "p.jsonl", "--model", "scripted:script.jsonl", "-o", "s.jsonl")
    assert cai(*words, "--kind", "red-team").code == 0
    assert [r["kind"] for r in rows_in(inputs / "s.jsonl")] == ["helpful", "red-team"]
    refused = cai(*words, "--kind", "evil")
    assert (refused.code, "--kind" in refused.stderr) == (2, True)


def test_limit_takes_the_first_rows_and_n_counts_replies(cai: Cai, inputs: Path) -> None:
    (inputs / "p.txt").write_text("one\ntwo\nthree\n")
    assert (
        cai("sample", "p.txt", "--model", "scripted:script.jsonl", "-o", "s.jsonl", "-n", "3", "--limit", "2").code == 0
    )
    rows = rows_in(inputs / "s.jsonl")
    assert [(r["prompt"][0]["content"], r["sample_index"]) for r in rows] == [
        (text, k) for text in ("one", "two") for k in range(3)
    ]
    assert manifest_of(inputs / "s.jsonl")["counts"]["in"] == 6
    assert {r["source"] for r in rows} == {"p.txt"}


def test_a_system_prompt_comes_first_and_the_prompt_keeps_its_id(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "p.jsonl", [{"prompt": "a"}, {"prompt": [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "b"}]}])  # fmt: skip
    words = ("sample", "p.jsonl", "--model", "scripted:script.jsonl", "-o")
    (inputs / "kind.txt").write_text("Be kind.\n")
    assert cai(*words, "plain.jsonl").code == 0
    assert cai(*words, "text.jsonl", "--system", "Be kind.").code == 0
    assert cai(*words, "file.jsonl", "--system", "kind.txt").code == 0
    plain, text = rows_in(inputs / "plain.jsonl"), rows_in(inputs / "text.jsonl")
    assert [row["prompt"][0] for row in text] == [
        {"role": "system", "content": said} for said in ("Be kind.", "Be kind.\n\nRhyme.")
    ]
    assert [row["id"] for row in text] == [row["id"] for row in plain]
    assert text == rows_in(inputs / "file.jsonl")
    refused = cai(*words, "text.jsonl", "--system", "Be brief.")
    assert (refused.code, "system" in refused.stderr) == (1, True)


def test_a_constitution_as_the_system_prompt_states_every_principle(cai: Cai, inputs: Path) -> None:
    (inputs / "p.txt").write_text("one\n")
    words = ("sample", "p.txt", "--model", "scripted:script.jsonl", "-o", "s.jsonl", "--overwrite")
    principles = load(shipped_directory() / "preference.yaml").principles
    assert cai(*words, "--system-from", str(shipped_directory() / "preference.yaml")).code == 0
    stated = rows_in(inputs / "s.jsonl")[0]["prompt"][0]["content"]
    assert all(p.comparison in stated for p in principles if isinstance(p, PreferencePrinciple))
    both = cai(*words, "--system-from", "x.yaml", "--system", "Be kind.")
    assert (both.code, "exclude" in both.stderr) == (2, True)
    assert cai(*words, "--system", " ").code == 2
    for no_file in ("kinder.txt", f"{inputs}/"):
        assert "not a file" in cai(*words, "--system", no_file).stderr


def test_a_run_file_finds_the_file_of_a_system_prompt_beside_itself(cai: Cai, inputs: Path) -> None:
    (inputs / "there").mkdir()
    (inputs / "there" / "kind.txt").write_text("Be kind.")
    (inputs / "there" / "p.txt").write_text("one\n")
    steps = {
        name: {"command": "sample", "input": "p.txt", "system": system}
        for name, system in (("file", "kind.txt"), ("text", "Be kind."))
    }
    run = {"name": "two", "model": f"scripted:{inputs / 'script.jsonl'}", "steps": steps}
    (inputs / "there" / "run.yaml").write_text(json.dumps(run))
    assert cai("run", "there/run.yaml", "--out", "out").code == 0
    assert rows_in(inputs / "out" / "file.jsonl") == rows_in(inputs / "out" / "text.jsonl")


CONTRAST = """
kind: preference
name: two
principles:
  - {id: kind, comparison: Choose the kinder one., following: You are kind., breaking: You are cruel.}
  - {id: honest, comparison: Choose the more honest one.}
"""


def test_both_sides_of_a_contrast_draw_the_same_principle_and_each_row_records_it(cai: Cai, inputs: Path) -> None:
    (inputs / "two.yaml").write_text(CONTRAST)
    write_rows(inputs / "p.jsonl", [{"prompt": str(n)} for n in range(8)])
    words = ("sample", "p.jsonl", "--model", "scripted:script.jsonl", "--constitution", "two.yaml", "-n", "2")
    sides = {}
    for side in ("following", "breaking"):
        assert cai(*words, "--contrast", side, "-o", f"{side}.jsonl").code == 0
        sides[side] = rows_in(inputs / f"{side}.jsonl")
        assert {row["contrast"] for row in sides[side]} == {side}
    drawn = [row["principle_id"] for row in sides["following"]]
    assert drawn == [row["principle_id"] for row in sides["breaking"]]
    assert set(drawn) == {"kind", "honest"}
    texts = {(row["principle_id"], row["prompt"][0]["content"]) for rows in sides.values() for row in rows}
    assert {text for name, text in texts if name == "kind"} == {"You are kind.", "You are cruel."}
    assert len(texts) == 4
    assert manifest_of(inputs / "following.jsonl")["provenance"]["constitution"]["name"] == "two"
    assert cai("pairs", "following.jsonl", "breaking.jsonl", "-o", "none.jsonl").code == 0  # the script says the same
    assert cai("critique", "following.jsonl", "--model", "scripted:script.jsonl", "-o", "c.jsonl").code == 0


def test_a_constitution_without_contrast_and_two_system_prompts_are_refused(cai: Cai, inputs: Path) -> None:
    write_rows(inputs / "p.jsonl", [{"prompt": "a"}])
    words = ("sample", "p.jsonl", "--model", "scripted:script.jsonl", "-o", "s.jsonl")
    assert cai(*words, "--principles", "kind").code == 2
    assert cai(*words, "--contrast", "following", "--system", "Be kind.").code == 2
