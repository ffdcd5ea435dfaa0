"""A run file, and the plan of one."""

from pathlib import Path

from cai_cli.pipeline.plan import Step, plan
from cai_cli.pipeline.run_file import load_run

PIPELINE = """\
name: pipeline
model: scripted:script.jsonl
seed: 3
steps:
  samples: {command: sample, input: prompts.jsonl, n: 2}
  revisions: {command: critique-revise, input: "@samples", rounds: 1}
  helpful: {command: sample, input: helpful.txt}
  preferences: {command: label-prefs, input: "@samples", both-orders: false}
"""


def planned(folder: Path, steps: str, head: str = "name: n\n") -> list[Step]:
    path = folder / "run.yaml"
    path.write_text(f"{head}steps:\n{steps}")
    return plan(load_run(path), path, Path("out"))
