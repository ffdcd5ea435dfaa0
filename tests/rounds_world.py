"""A world for rounds whose truth is known: a tiny policy says "Yes" or "No", and judge and monitor prefer "Yes".

A round of DPO is so short that one alone does not teach the policy to say "Yes" always.
"""

from pathlib import Path

from conftest import Cai
from helpers import assistant, rows_in, user, write_rows
from tiny import tiny_model_dir

GOOD, BAD = "Yes", "No"
PROMPTS = 160
RUN = """\
name: rounds
model: policy
steps:
  rounds:
    repeat: {repeat}
    carry: all
    stop: {{monitor: dpo}}
    steps:
      pairs: {{command: sample, input: prompts.txt, model: "@dpo@last", n: 2, max-new-tokens: 4}}
      labels: {{command: label-prefs, input: "@pairs", model: "scripted:judge.jsonl"}}
      dpo: {{command: dpo, input: "@labels", model: "@dpo@last", monitor-judge: "scripted:judge.jsonl", monitor-prompts: 40,
        eval-share: 0.3, max-new-tokens: 4, max-steps: {steps}, save-steps: 2, learning-rate: 1.0e-3, batch-size: 8,
        gradient-accumulation: 1, device: cpu}}
  after: {{command: sample, input: prompts.txt, model: "@dpo", max-new-tokens: 4}}
"""


def plant(cai: Cai, world: Path, *, repeat: int, steps: int) -> None:
    """Write the policy, the judge and `run.yaml` to the folder `world`, in which `cai` runs."""
    tiny_model_dir(world / "tiny")
    prompts = [f"question number {n}" for n in range(PROMPTS)]
    (world / "prompts.txt").write_text("\n".join(prompts) + "\n")
    write_rows(
        world / "either.jsonl",
        [{"prompt": user(p), "completion": assistant(reply)} for p in prompts[:60] for reply in (GOOD, BAD)],
    )
    trained = "--max-steps 60 --epochs 60 --learning-rate 1e-2 --eval-share 0 --batch-size 64 --gradient-accumulation 1"
    result = cai(*f"sft either.jsonl -o policy --model tiny {trained} --device cpu --quiet".split())
    assert result.code == 0, result.stderr
    better = [[-0.1, -2.4], [-2.4, -0.1]]
    lines = [
        {"contains": f"(A) [[[{a}]]]\n (B) [[[{b}]]]", "scores": scores}
        for (a, b), scores in zip(((GOOD, BAD), (BAD, GOOD)), better, strict=True)
    ]
    write_rows(world / "judge.jsonl", [*lines, {"scores": [-0.7, -0.7]}])
    (world / "run.yaml").write_text(RUN.format(repeat=repeat, steps=steps))


def share_of_good(file: Path) -> float:
    replies = [row["completion"][0]["content"] for row in rows_in(file)]
    return sum(reply == GOOD for reply in replies) / len(replies)
