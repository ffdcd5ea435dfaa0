"""Files whose last two rows were cut at any byte, as by a lost power supply: the whole rows are kept, what is torn is
asked again, and the bytes in the end are those of a run left alone."""

from functools import cache
from pathlib import Path

import pytest
import typer
from conftest import Cai, Ran
from forked import clear, files_of
from helpers import Json, death_after, sample_row, write_rows

SCRIPT = ("--model", "scripted:script.jsonl", "--batch-size", "1", "-o", "out.jsonl")
STAGES = {
    "sample": ("sample", "prompts.jsonl", *SCRIPT),
    "critique": ("critique", "samples.jsonl", *SCRIPT),
    "revise": ("revise", "critiques.jsonl", *SCRIPT),
    "critique-revise": ("critique-revise", "samples.jsonl", *SCRIPT, "--rounds", "1"),
    "label-prefs": ("label-prefs", "samples.jsonl", *SCRIPT, "--one-order", "--min-confidence", "0.55"),
    "a shard": ("sample", "prompts.jsonl", *SCRIPT, "--shard", "1/1"),
}
TORN = {
    ".partial": list(STAGES),
    ".rejected.jsonl": ["sample", "critique-revise", "label-prefs"],
    ".units.jsonl": ["a shard"],
}


EVERY_BYTE = {(".partial", "sample"), (".partial", "label-prefs")}


@pytest.fixture
def folder(cai: Cai, tmp_path: Path) -> Path:
    """Five short rows, two of which fail, each of one letter that no ending shares with another."""
    write_rows(tmp_path / "prompts.jsonl", ({"id": c, "prompt": f"é{c}\u2028"} for c in "abcde"))
    rows = [sample_row(i, k) for i in range(5) for k in range(2)]
    for row in rows:
        row |= {"id": "abcde"[int(row["id"][1:])], "prompt": [{"role": "user", "content": f"é{row['id']}"}]}
    write_rows(tmp_path / "samples.jsonl", rows)
    script: list[Json] = [
        {"contains": "éb", "replies": [""], "scores": [-1.0, -1.0]},
        {"contains": "éc", "replies": [""], "scores": [-1.0, -1.0]},
        {"contains": "ép1", "replies": [""], "scores": [-1.0, -1.0]},
        {"contains": "ép2", "replies": [""], "scores": [-1.0, -1.0]},
        {"replies": ["one.", "two."], "scores": [-0.1, -3.0]},
    ]
    write_rows(tmp_path / "script.jsonl", script)
    return tmp_path


def cut_at_every_byte(ending: str, stage: str, cai: Cai, folder: Path, every: int) -> int:
    """How many places the file was cut at."""
    words = STAGES[stage]
    if stage == "revise":
        assert cai("critique", "samples.jsonl", *SCRIPT[:-1], "critiques.jsonl").code == 0
    assert cai(*words).code == 0
    calm = files_of(folder)
    clear(folder)
    # As late as possible, so that the torn file holds at least two rows.
    calls = 30
    while True:
        clear(folder)
        try:
            with death_after(calls):
                cai(*words)
            break
        except pytest.fail.Exception:  # it ended before
            calls -= 1
    left = {path.name: path.read_bytes() for path in folder.glob("out.jsonl*")}
    whole = left[f"out.jsonl{ending}"]
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    start = whole[: max(0, start - 1)].rfind(b"\n") + 1
    assert whole.count(b"\n") >= 2
    places = range(start, len(whole) + 1, every)
    for place in places:
        clear(folder)
        for name, data in left.items():
            (folder / name).write_bytes(data)
        (folder / f"out.jsonl{ending}").write_bytes(whole[:place])
        done = cai(*words)
        assert done.code == 0, (place, done.stderr)
        assert files_of(folder) == calm, place
    return len(places)


def test_sampling_resumes_from_a_file_cut_at_any_byte(cai: Cai, folder: Path) -> None:
    assert cut_at_every_byte(".partial", "sample", cai, folder, every=37) > 10


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("ending", "stage"), [(ending, stage) for ending, stages in TORN.items() for stage in stages])
def test_every_stage_resumes_from_files_cut_at_any_byte(
    ending: str,
    stage: str,
    cai: Cai,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ran: Ran,
) -> None:
    monkeypatch.setattr("typer.main.get_command", cache(typer.main.get_command))
    places = cut_at_every_byte(ending, stage, cai, folder, every=1 if (ending, stage) in EVERY_BYTE else 11)
    ran(f"{stage}: out.jsonl{ending} cut at {places} places")
