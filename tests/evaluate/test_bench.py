"""`cai eval bench`: models reply to a published file, a judge applies its rule, and the scores compare the models."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import Cai
from helpers import death_after, manifest_of, rows_in, write_rows

FILES = {
    "harmbench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        + "".join(f"Do deed {i},standard,illegal,,,deed{i}\n" for i in range(8))
        + "Write the first page of a novel,copyright,copyright,,,novel\n"
    ),
    "advbench": "goal,target\n" + "".join(f"Do deed {i},Sure\n" for i in range(8)),
    "strongreject": "category,source,forbidden_prompt\n" + "".join(f"Illegal,custom,Do deed {i}\n" for i in range(8)),
}
LOW = [-99.0] * 4
# Judges by what a reply says, whichever question is asked.
JUDGE = [
    {"contains": "I will not\n\n\nDoes the last reply", "scores": [-99.0, 0.0]},
    {"contains": "I will not\n\n\nDoes the assistant refuse", "scores": [0.0, -99.0]},
    {"contains": "I will not\n\n\nHow", "scores": [0.0, *LOW]},
    {"contains": "Sure, so\n\n\nDoes the last reply", "scores": [0.0, -99.0]},
    {"contains": "Sure, so\n\n\nDoes the assistant refuse", "scores": [-99.0, 0.0]},
    {"contains": "Sure, so\n\n\nHow", "scores": [*LOW, 0.0]},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that does every deed, one that does deed 0 only, a judge, and the files."""
    write_rows(tmp_path / "before.jsonl", [{"replies": ["Sure, so"]}])
    write_rows(tmp_path / "after.jsonl", [{"contains": "deed 0", "replies": ["Sure, so"]}, {"replies": ["I will not"]}])
    write_rows(tmp_path / "judge.jsonl", JUDGE)
    for name, text in FILES.items():
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


def words(name: str, *more: str) -> list[str]:
    models = ["-m", "before=scripted:before.jsonl", "-m", "after=scripted:after.jsonl"]
    return ["eval", "bench", name, f"{name}.csv", *models, "--judge", "scripted:judge.jsonl", "-o", "o.jsonl", *more]


@pytest.mark.parametrize("name", FILES)
def test_models_are_compared_by_the_rule_of_the_benchmark(name: str, cai: Cai, folder: Path) -> None:
    done = cai(*words(name, "--json"))
    assert done.code == 0, done.stderr
    result = json.loads((folder / "o.jsonl.bench.json").read_text())
    assert {key: json.loads(done.stdout)[key] for key in result} == result
    assert [(one["model"], one["score"]["value"], one["score"]["n"]) for one in result["models"]] == [
        ("before", 1.0, 8), ("after", 0.125, 8),
    ]  # fmt: skip
    (difference,) = result["differences"]
    assert difference["high"] < 0
    assert "after against before: better" in done.stderr
    rows = rows_in(folder / "o.jsonl")
    assert [row["model"] for row in rows] == ["before"] * 8 + ["after"] * 8
    assert len({row["prompt_id"] for row in rows}) == 8
    manifest = manifest_of(folder / "o.jsonl")
    assert manifest["provenance"]["models"].keys() == {"before", "after"}
    assert manifest["counts"]["rejected"] == (1 if name == "harmbench" else 0)  # copyright has a rule of its own
    if name == "harmbench":
        assert result["models"][1]["groups"].keys() == {"standard", "illegal"}
        assert "copyright" in rows_in(folder / "o.jsonl.rejected.jsonl")[0]["reason"]
    if name == "strongreject":
        assert result["models"][1]["refused"]["value"] == pytest.approx(7 / 8)
        assert rows[-1]["answers"] == {"refused": 1.0, "convincing": 1.0, "specific": 1.0}


def test_a_resumed_run_gives_the_same_files_and_samples_only_what_is_missing(cai: Cai, folder: Path) -> None:
    batches = ("--batch-size", "4")
    assert cai(*words("advbench", *batches)).code == 0
    names = ("o.jsonl", "o.jsonl.bench.json")
    whole = [(folder / name).read_bytes() for name in names]
    with death_after(5):  # in the third of four batches, between the reply and its judgement
        cai(*words("advbench", *batches, "--overwrite"))
    assert len((folder / "o.jsonl.partial").read_bytes().splitlines()) == 8
    done = cai(*words("advbench", *batches))
    assert done.code == 0, done.stderr
    assert [(folder / name).read_bytes() for name in names] == whole
    swapped = words("advbench")
    swapped[5], swapped[7] = swapped[7], swapped[5]  # the other model is the baseline
    assert cai(*swapped).error == "other-run"


def test_a_failed_judgement_rejects_the_reply_with_the_reason(cai: Cai, folder: Path) -> None:
    write_rows(folder / "judge.jsonl", JUDGE[3:])
    done = cai(*words("advbench"))
    assert done.code == 0, done.stderr
    assert manifest_of(folder / "o.jsonl")["counts"]["rejected_reasons"] == {"not judged": 7}


PAIRS = [
    {"id": i, "prompt": f"Add {i}.", "chosen": "right", "chosen_model": "a", "rejected": "wrong", "rejected_model": "b",
     "subset": subset}
    for i, subset in enumerate(["alpacaeval-easy"] * 4 + ["hep-python", "math-prm"])
]  # fmt: skip


def test_the_pairs_of_rewardbench_are_decided_in_both_orders(cai: Cai, folder: Path) -> None:
    write_rows(folder / "rb.jsonl", PAIRS)
    write_rows(folder / "good.jsonl", [{"contains": "(A) [[[right", "scores": [0.0, -2.0]}, {"scores": [-2.0, 0.0]}])
    write_rows(folder / "first.jsonl", [{"scores": [0.0, -2.0]}])  # always prefers the first reply
    models = ["-m", "first=scripted:first.jsonl", "-m", "good=scripted:good.jsonl"]
    done = cai("eval", "bench", "rewardbench", "rb.jsonl", *models, "-o", "o.jsonl")
    assert done.code == 0, done.stderr
    result = json.loads((folder / "o.jsonl.bench.json").read_text())
    assert [(one["model"], one["score"]["value"]) for one in result["models"]] == [("first", 0.5), ("good", 1.0)]
    assert result["models"][1]["sections"].keys() == {"Chat", "Reasoning"}
    assert result["differences"][0]["value"] == pytest.approx(0.5)
    assert [vote["order"] for vote in rows_in(folder / "o.jsonl")[0]["votes"]] == ["ab", "ba"]
    shown = cai("show", "o.jsonl", "--limit", "1")
    assert shown.code == 0, shown.stderr


def test_a_preference_model_decides_the_pairs_of_rewardbench_by_its_scores(cai: Cai, folder: Path) -> None:
    from tiny import tiny_model_dir

    from cai_cli.models.loading import load_reward_model, load_tokenizer
    from cai_cli.prompting.base import assistant, user
    from cai_cli.reward.preference_model import score_conversations

    base = tiny_model_dir(folder / "base")
    load_reward_model(base, new_head_seed=3).save_pretrained(folder / "pm")
    load_tokenizer(base).save_pretrained(folder / "pm")
    model, tokenizer = load_reward_model(folder / "pm"), load_tokenizer(folder / "pm")
    pairs = [PAIRS[0], PAIRS[1] | {"chosen": "wrong", "rejected": "right"}, PAIRS[4] | {"rejected": "long " * 600}]
    write_rows(folder / "rb.jsonl", pairs)
    done = cai("eval", "bench", "rewardbench", "rb.jsonl", "--pm", "pm", "-o", "o.jsonl", "--json")
    assert done.code == 0, done.stderr
    rows = rows_in(folder / "o.jsonl")
    for row, pair in zip(rows, pairs[:2], strict=True):
        talks = [[user(str(pair["prompt"])), assistant(str(pair[side]))] for side in ("chosen", "rejected")]
        chosen, rejected = score_conversations(model, tokenizer, talks)
        assert row["p_chosen"] == pytest.approx(1 / (1 + math.exp(rejected - chosen)), abs=1e-5)
        assert (row["value"], row["votes"]) == (float(chosen > rejected), [])
    assert manifest_of(folder / "o.jsonl")["counts"]["rejected"] == 1
    result = json.loads(done.stdout)
    assert result["models"][0]["sections"]["Chat"]["n"] == 2
    assert result["judge"] is None


@pytest.mark.parametrize(
    ("file", "name", "line", "said", "hint"),
    [
        ("advbench.csv", "harmbench", 2, "a row of AdvBench, not of HarmBench", "cai eval bench advbench"),
        ("before.jsonl", "harmbench", 1, "not a row of HarmBench", "harmbench_behaviors_text_all.csv"),
        ("odd.jsonl", "rewardbench", 2, "'Factuality' is not a subset of RewardBench", "23 subsets"),
    ],
)
def test_a_wrong_file_is_named_with_its_line_and_what_it_is(
    file: str, name: str, line: int, said: str, hint: str, cai: Cai, folder: Path
) -> None:
    write_rows(folder / "odd.jsonl", [PAIRS[0], PAIRS[1] | {"subset": "Factuality"}])
    judge = ["--judge", "scripted:judge.jsonl"] if name != "rewardbench" else []
    done = cai("eval", "bench", name, file, "-m", "scripted:before.jsonl", *judge)
    assert (done.code, done.error) == (1, "invalid-row")
    for text in (f"{file}:{line}", said, hint):
        assert text in done.stderr


def test_a_run_file_takes_the_benchmark_as_a_step(cai: Cai, folder: Path) -> None:
    (folder / "run.yaml").write_text(
        "name: r\nmodel: scripted:before.jsonl\nsteps:\n"
        "  harm:\n    command: eval bench\n    benchmark: advbench\n    input: advbench.csv\n"
        "    model: ['before=scripted:before.jsonl', 'after=scripted:after.jsonl']\n    judge: scripted:judge.jsonl\n"
        "  alone: {command: eval bench, benchmark: advbench, input: advbench.csv, judge: 'scripted:judge.jsonl'}\n"
    )
    dry = cai("run", "run.yaml", "--dry-run", "--json")
    assert dry.code == 0, dry.stderr
    first, second = json.loads(dry.stdout)
    assert (first["rows"], first["requests"], second["rows"]) == (16, 32, 8)
    assert first["command"].startswith("cai eval bench advbench advbench.csv -o ")
    assert "--model before=scripted:before.jsonl --model after=scripted:after.jsonl" in first["command"]
    assert "--model scripted:before.jsonl" in second["command"]


def test_options_that_do_not_fit_the_benchmark_are_refused(cai: Cai, folder: Path) -> None:
    write_rows(folder / "rb.jsonl", PAIRS)
    adv: list[Any] = ["eval", "bench", "advbench", "advbench.csv"]
    pairs: list[Any] = ["eval", "bench", "rewardbench", "rb.jsonl"]
    assert cai(*adv).error == "missing-option"
    assert cai(*adv, "--pm", "x").error == "option-conflict"
    assert cai(*adv, "--judge", "j", "-m", "a=x", "-m", "a=y").error == "option-conflict"
    assert cai(*pairs, "--judge", "j").error == "option-conflict"
    assert cai(*pairs, "--pm", "a", "-m", "b").error == "option-conflict"
    assert cai(*pairs, "-m", "b", "-n", "2").error == "option-conflict"
