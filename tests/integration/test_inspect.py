"""The logs of `cai export --for inspect` are read by inspect-ai itself, in the environment of `make server-env`."""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import Cai
from helpers import adherence_row, preference, sample_row, write_rows
from server_env import PYTHON

pytestmark = pytest.mark.server

READ = """
import json, sys
from inspect_ai.log import list_eval_logs, read_eval_log, read_eval_log_sample_summaries
found = {}
for info in list_eval_logs(sys.argv[1]):
    log, header = read_eval_log(info), read_eval_log(info, header_only=True)
    assert header.status == "success" and header.results == log.results
    found[log.eval.dataset.name] = {
        "task": info.task,
        "model": log.eval.model,
        "samples": [[s.id, s.epoch, s.messages[-1].text, {k: v.value for k, v in s.scores.items()}] for s in log.samples],
        "means": {s.name: s.metrics["mean"].value for s in log.results.scores},
        "reasoning": [c.reasoning for s in log.samples for c in s.messages[-1].content if getattr(c, "type", "") == "reasoning"],
        "summaries": [[s.id, s.input, {k: v.value for k, v in s.scores.items()}] for s in read_eval_log_sample_summaries(info)],
    }
print(json.dumps(found))
"""


def test_inspect_reads_logs_of_samples_scores_preferences_and_evaluations(cai: Cai, tmp_path: Path) -> None:
    vote = {"principle_id": "kind", "method": "choice", "order": "ab", "p_first": 0.8, "rationale": None}
    judged = {"judged": "compliance", "p_labels": [1.0, 0.0, 0.0]}
    say = [{"role": "assistant", "content": "Hello."}]
    compared = {"id": "p1/0 x:y", "prompt_id": "p1", "sample_index": 0, "prompt": [{"role": "user", "content": "Hi"}], "kind": None, "model_a": "x", "model_b": "y", "a": say, "b": say, "score_a": None, "score_b": None, "p_a": 0.8, "votes": [vote]}  # fmt: skip
    files = {
        "samples": [sample_row(1) | {"thoughts": "Hm."}, sample_row(1, 1)],
        "harm": [sample_row(2) | {"harm": 1.0, "levels": [0.2] * 5}],
        "prefs": [preference(1) | {"votes": [vote], "human": "chosen"}],
        "compared": [compared],
        "adherence": [adherence_row("start", [0.9, 0.2]), adherence_row("after", [0.1])],
        "refusals": [sample_row(3) | {"safety": "safe", "label": "partial_refusal"} | judged],
    }
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
        assert cai("export", f"{name}.jsonl", "-o", f"logs/{name}", "--for", "inspect").code == 0
    words = [str(PYTHON), "-c", READ, str(tmp_path / "logs")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {f"{name}.jsonl" for name in files}
    assert [sample[:2] for sample in found["samples.jsonl"]["samples"]] == [["p1", 1], ["p1", 2]]
    assert found["samples.jsonl"]["reasoning"] == ["Hm."]
    assert found["harm.jsonl"]["means"] == {"harm": 1.0}
    assert found["prefs.jsonl"]["summaries"][0][2]["agrees_with_human"] == "C"
    assert found["adherence.jsonl"]["means"] == {"violation": 0.25}
    assert [sample[2] for sample in found["adherence.jsonl"]["samples"]] == ["reply 0", "reply 1"]  # after, start
    assert found["adherence.jsonl"]["model"] == "start vs after"
    assert found["refusals.jsonl"]["means"] == {"refusal": 1.0, "judged_refusal": 0.0}
    assert found["compared.jsonl"]["samples"] == [["p1:0 x:y", 1, "Hello.", {"p_a": 0.8}]]
