"""`cai export --for feedback-forensics`: the JSON is what inverse-cai 0.4.8 and feedback-forensics 0.5.0 read.

Their code is not installed; the tests check what `get_votes_dict_from_annotated_pairs_json` of
`feedback_forensics.data.loader` and `merge_annotated_pairs` of inverse-cai use.
"""

import json
from pathlib import Path

from conftest import Cai
from helpers import Json, sample_row, user, write_rows
from label_rows import pref

# hash_string(DEFAULT_ANNOTATOR_DESCRIPTION) of inverse_cai.data.annotated_pairs_format
DEFAULT_ANNOTATOR_HASH = "ba751e7b"
VOTES = (("kind", "ab", 0.9), ("kind", "ba", 0.2), ("brief", "ab", 0.3), ("brief", "ba", 0.6), ("blunt", "ab", 0.5))


def export(cai: Cai, folder: Path, rows: list[Json]) -> Json:
    write_rows(folder / "labels.jsonl", rows)
    done = cai("export", "labels.jsonl", "-o", "ff", "--for", "feedback-forensics", "--overwrite")
    assert done.code == 0, done.stderr
    return json.loads((folder / "ff/data/annotated_pairs.json").read_text())  # type: ignore[no-any-return]


def test_each_principle_is_an_annotator_beside_the_human_labels(cai: Cai, tmp_path: Path) -> None:
    rows = [pref(i, *VOTES, human="rejected" if i else "chosen").model_dump() for i in range(8)]
    found = export(cai, tmp_path, rows)
    metadata, annotators = found["metadata"], found["annotators"]
    assert (metadata["version"], metadata["default_annotator"]) == ("2.0", DEFAULT_ANNOTATOR_HASH)
    assert annotators[DEFAULT_ANNOTATOR_HASH]["type"] == "human"
    principles = {a["description"]: key for key, a in annotators.items() if a["type"] == "principle"}
    assert set(principles) == {"kind", "brief", "blunt"}  # the constitution is unknown
    assert {c["response_a"]["text"] for c in found["comparisons"]} == {"aaaa", "bbbb"}
    for number, comparison in enumerate(found["comparisons"]):
        assert (comparison["id"], comparison["prompt"]) == (f"p{number}", f"question {number}")
        chosen = "a" if comparison["response_a"]["text"] == "aaaa" else "b"
        other = {"a": "b", "b": "a"}[chosen]
        annotations = comparison["annotations"]
        assert set(annotations) <= set(annotators)
        assert annotations[DEFAULT_ANNOTATOR_HASH]["pref"] == (other if number else chosen)
        assert annotations[principles["kind"]]["pref"] == chosen
        assert annotations[principles["brief"]]["pref"] == other
        assert annotations[principles["blunt"]] == {"pref": None, "no_pref_reason": "not_applicable"}
        assert set(comparison["metadata"]) == set(metadata["available_metadata_keys_per_comparison"])


def test_without_human_labels_the_default_annotator_is_the_label(cai: Cai, tmp_path: Path) -> None:
    talk = [*user("one"), {"role": "assistant", "content": "two"}, *user("three")]
    row = pref(1, *VOTES, p_chosen=0.7).model_dump() | {"prompt": talk}
    found = export(cai, tmp_path, [row, pref(2, *VOTES, p_chosen=0.5).model_dump()])
    assert found["annotators"][DEFAULT_ANNOTATOR_HASH]["name"] == "label"
    first, tie = found["comparisons"]
    assert first["prompt"] == "Human: one\n\nAssistant: two\n\nHuman: three"
    preferred = first["annotations"][DEFAULT_ANNOTATOR_HASH]["pref"]
    assert first[f"response_{preferred}"]["text"] == "aaaa"
    assert tie["annotations"][DEFAULT_ANNOTATOR_HASH]["pref"] is None


def test_rows_that_are_no_preferences_are_refused(cai: Cai, tmp_path: Path) -> None:
    write_rows(tmp_path / "samples.jsonl", [sample_row(1)])
    done = cai("export", "samples.jsonl", "-o", "ff", "--for", "feedback-forensics")
    assert (done.code, done.error) == (1, "wrong-row-type")
    assert not (tmp_path / "ff").exists()
