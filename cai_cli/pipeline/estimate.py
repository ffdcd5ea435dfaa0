"""`cai run --dry-run`: how many rows and tokens each step would take, and how many GPU-hours, before anything runs.

New tokens are an upper bound (every answer as long as allowed); prompt tokens count four characters a token. What
cannot be known without running (rows that will be rejected) is taken as none. `paper_run` counts the paper's own run in
the same way, from its numbers of prompts and assumed lengths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.constitution.draw import select
from cai_cli.constitution.schema import CritiqueConstitution, PreferenceConstitution, open_constitution
from cai_cli.data.formats import render_transcript
from cai_cli.data.jsonl import read_prompts, stop
from cai_cli.pipeline import flops
from cai_cli.pipeline.flops import Work
from cai_cli.pipeline.plan import DATA_STAGES, Step, stage_options
from cai_cli.pipeline.sweep import split_name

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class RowFlow:
    """What leaves a step: rows, replies per prompt, and the mean length of a prompt and of a reply in tokens.
    `texts`: how many replies, critiques and revisions a row holds."""

    rows: int
    per_prompt: int
    prompt_tokens: float
    reply_tokens: float
    rounds: int = 0
    texts: int = 0

    @property
    def bytes(self) -> float:
        """Of the file that holds these rows."""
        text = CHARACTERS_PER_TOKEN * (self.prompt_tokens + self.texts * self.reply_tokens)
        return self.rows * (flops.ROW_BYTES + text)


@dataclass(frozen=True)
class StepEstimate:
    """`bytes`: of the file that comes out, 0 where a model does."""

    step: str
    rows: int
    requests: int
    work: Work
    bytes: float
    command: str

    def as_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "rows": self.rows,
            "requests": self.requests,
            "prompt_tokens": round(self.work.prompt_tokens),
            "new_tokens": round(self.work.new_tokens),
            "trained_tokens": round(self.work.trained_tokens),
            "gpu_hours": {name: self.work.gpu_hours(size) for name, size in flops.MODELS.items()},
            "bytes": round(self.bytes),
            "command": self.command,
        }


def estimate(steps: Sequence[Step]) -> list[StepEstimate]:
    """One estimate per step, in order."""
    known = stage_options()
    flows: dict[str, RowFlow] = {}
    estimates = []
    for step in steps:
        options = {**{name: o.default for name, o in known[step.command].items()}, **step.settings}
        sources = options["input"] if isinstance(options["input"], list) else [options["input"]]
        files = [_file(str(source), flows) for source in sources]
        read = [flows.get(file) or _flow_of_file(file, bool(options.get("skip-invalid"))) for file in files]
        flow = min(read, key=lambda one: one.rows)  # several are joined by prompt
        if options["limit"]:
            flow = replace(flow, rows=min(flow.rows, int(options["limit"])))
        found, after = _estimated(step.name, step.command, flow, options, step.shell)
        if step.command in DATA_STAGES:
            flows[str(step.output)] = after
        estimates.append(found)
    return estimates


def _estimated(
    name: str, command: str, flow: RowFlow, options: dict[str, Any], shell: str
) -> tuple[StepEstimate, RowFlow]:
    rows, requests, work, after = _ESTIMATORS[command](flow, options)
    size = after.bytes if command in DATA_STAGES else 0.0
    return StepEstimate(name, rows, requests, work, size, shell), after


Counted = tuple[int, int, Work, RowFlow]


def _file(source: str, flows: Mapping[str, RowFlow]) -> str:
    """The file of FILE or NAME=FILE."""
    return source if source in flows or Path(source).exists() else split_name(source)[1]


def _flow_of_file(source: str, skip_invalid: bool) -> RowFlow:
    prompts = read_prompts(source, on_invalid=(lambda _error, _raw: None) if skip_invalid else stop)
    lengths = [len(render_transcript(p.prompt)) / CHARACTERS_PER_TOKEN for _, p in prompts]
    return RowFlow(len(lengths), 1, sum(lengths) / max(1, len(lengths)), 0.0)


def _few_shot_tokens(model: Any, options: dict[str, Any]) -> float:
    examples = open_constitution(model, options["constitution"], options["few-shot"]).examples
    return sum(len(e.model_dump_json()) for e in examples) / CHARACTERS_PER_TOKEN


def _red_team(flow: RowFlow, options: dict[str, Any]) -> Counted:
    made, new = int(options["n"]), int(options["max-new-tokens"])  # as if no attempt were lost
    shown = (int(options["num-examples"]) + 1) * flow.prompt_tokens
    return made, made, Work(made * shown, made * new), RowFlow(made, 1, new, 0.0)


def _sample(flow: RowFlow, options: dict[str, Any]) -> Counted:
    rows, new = flow.rows * int(options["n"]), int(options["max-new-tokens"])
    after = RowFlow(rows, int(options["n"]), flow.prompt_tokens, new, texts=1)
    return rows, rows, Work(rows * flow.prompt_tokens, rows * new), after


def _revise(flow: RowFlow, options: dict[str, Any], requests_per_row: int) -> Counted:
    new = int(options["max-new-tokens"])
    requests = flow.rows * requests_per_row
    each = _few_shot_tokens(CritiqueConstitution, options) + flow.prompt_tokens + flow.reply_tokens + new
    rounds, texts = int(options.get("rounds", 1)), flow.texts + requests_per_row
    after = RowFlow(flow.rows, flow.per_prompt, flow.prompt_tokens, new, rounds, texts)
    return flow.rows, requests, Work(requests * each, requests * new), after


def _critique_revise(flow: RowFlow, options: dict[str, Any]) -> Counted:
    rounds = int(options["rounds"])
    rows, requests, work, after = _revise(flow, options, rounds * (2 if options["critique"] else 1))
    return rows, requests, work, replace(after, rounds=flow.rounds + rounds) if rounds else flow


def _label(flow: RowFlow, options: dict[str, Any]) -> Counted:
    pairs = flow.rows  # of a file of pairs
    if flow.per_prompt > 1:
        pairs = flow.rows * (flow.per_prompt - 1) // 2 if options["pairs"] == "all" else flow.rows // 2
    method, per_pair = options["method"], str(options["principles-per-pair"])
    if per_pair == "all":
        per_pair = str(len(_preference_principles(options)))
    votes = pairs * int(per_pair) * (2 if options["both-orders"] and method != "contrast" else 1)
    votes *= int(options["cot-samples"])
    replies = flow.prompt_tokens + 2 * flow.reply_tokens
    each = replies if method == "contrast" else _few_shot_tokens(PreferenceConstitution, options) + replies
    new = int(options["max-new-tokens"]) if method in ("cot", "verdict") else 0
    texts = 2 * votes if method in ("contrast", "cot") else votes  # both characters; the thoughts, then the letter
    if options.get("votes"):  # all recorded, as in a sweep of limits
        texts = votes = 0
    after = RowFlow(pairs, 1, flow.prompt_tokens, flow.reply_tokens, texts=2)
    return pairs, texts, Work(texts * each, votes * new), after


def _compare(flow: RowFlow, options: dict[str, Any]) -> Counted:
    models = len(options["input"])
    pairs = replace(flow, rows=flow.rows * models * (models - 1) // 2, per_prompt=1)
    if options["judge"]:
        return _label(pairs, options | {"both-orders": True})
    tokens = flow.rows * models * (flow.prompt_tokens + flow.reply_tokens)
    return pairs.rows, 0, Work(tokens), pairs


def _harm(flow: RowFlow, options: dict[str, Any]) -> Counted:
    return flow.rows, flow.rows, Work(flow.rows * (flow.prompt_tokens + flow.reply_tokens)), flow


def _preference_principles(options: dict[str, Any]) -> Sequence[Any]:
    loaded = open_constitution(PreferenceConstitution, options["constitution"], options["few-shot"])
    return select(loaded.principles, options["principles"], options["max-principles"])


def _sft(flow: RowFlow, options: dict[str, Any]) -> Counted:
    examples = flow.rows * (max(1, flow.rounds) if options["revisions"] == "all" else 1)
    tokens = examples * (flow.prompt_tokens + flow.reply_tokens) * float(options["epochs"])
    return examples, 0, Work(trained_tokens=tokens), flow


def _train_pm(flow: RowFlow, options: dict[str, Any]) -> Counted:
    tokens = 2 * flow.rows * (flow.prompt_tokens + flow.reply_tokens) * float(options["epochs"])
    return flow.rows, 0, Work(trained_tokens=tokens), flow


def _score(flow: RowFlow, options: dict[str, Any]) -> Counted:
    return flow.rows, 0, Work(flow.rows * (flow.prompt_tokens + flow.reply_tokens)), flow


def _rl(flow: RowFlow, options: dict[str, Any]) -> Counted:
    trained = int(options["steps"]) * int(options["prompts-per-step"]) * int(options["samples-per-prompt"])
    checks = 1 + -(-int(options["steps"]) // int(options["monitor-every"]))
    checked = max(16, min(int(options["held-out"]), flow.rows // 2))
    replies = trained + checks * checked
    new = int(options["max-new-tokens"])
    whole = flow.prompt_tokens + new
    # Each reply is read by the preference model and by the start model too.
    read, asked = replies * (flow.prompt_tokens + 2 * whole), 0
    if options["monitor-pm"]:
        read += checks * checked * whole
    if options["monitor-judge"]:  # both orders; of the first check it is not asked, whose replies are the start model's
        asked = 2 * (checks - 1) * checked
        examples = _few_shot_tokens(PreferenceConstitution, {"constitution": None, "few-shot": None})
        read += asked * (examples + flow.prompt_tokens + 2 * new)
    return flow.rows, replies + asked, Work(read, replies * new, trained * whole), flow


_ESTIMATORS = {
    "red-team": _red_team,
    "sample": _sample,
    "critique": lambda flow, options: _revise(flow, options, 1),
    "revise": lambda flow, options: _revise(flow, options, 1),
    "critique-revise": _critique_revise,
    "label-prefs": _label,
    "sft": _sft,
    "train-pm": _train_pm,
    "score": _score,
    "rl": _rl,
    "eval compare": _compare,
    "eval harm": _harm,
}


def print_estimate(steps: Sequence[Step], *, as_json: bool) -> None:
    """The plan on stdout: a line of numbers and the command, step by step."""
    found = estimate(steps)
    if as_json:
        print(orjson.dumps([e.as_json() for e in found]).decode())
        return
    wide = max(14, *(len(e.step) + 1 for e in found))

    def line(name: str, rows: str, requests: str, work: Work) -> str:
        hours = "".join(f"{hours_shown(work.gpu_hours(size)):>10}" for size in flops.MODELS.values())
        tokens = f"{work.prompt_tokens:>15,.0f}{work.new_tokens:>13,.0f}{work.trained_tokens:>13,.0f}"
        return f"{name:<{wide}}{rows:>10}{requests:>10}{tokens}{hours}"

    sizes = "".join(f"{f'GPU-h {name}':>10}" for name in flops.MODELS)
    print(f"{'step':<{wide}}{'rows':>10}{'requests':>10}{'prompt tokens':>15}{'new':>13}{'trained':>13}{sizes}")
    for e in found:
        print(line(e.step, f"{e.rows:,}", f"{e.requests:,}", e.work))
        print(console.safe(f"  $ {e.command}"))
    print(line("total", "", f"{sum(e.requests for e in found):,}", flops.total([e.work for e in found])))
    print(f"GPU-h: {flops.ASSUMED}.")


def hours_shown(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


# --- the paper's own run -------------------------------------------------------------------------------------------

# Numbers of prompts: sections 3.2 and 4.1 to 4.2 of the paper. Mean lengths, which it does not give, are assumed.
RED_TEAM, OF_THEM_MADE, HELPFUL, RL_RED_TEAM, RL_HELPFUL = 182_831, 140_335, 135_296, 491_142, 474_300
PROMPT, REPLY = 60, 120  # tokens
RL_BATCH = 512  # prompts in one step, each answered four times: one pass


def paper_run() -> list[StepEstimate]:
    """The paper's run, step by step, with our defaults where the paper says nothing."""
    known = stage_options()
    reply = {"max-new-tokens": REPLY}
    prompts = RL_RED_TEAM + RL_HELPFUL
    given, rl_prompts = RowFlow(RED_TEAM, 1, PROMPT, 0), RowFlow(prompts, 1, PROMPT, 0)
    found: list[StepEstimate] = []

    def step(name: str, command: str, flow: RowFlow, **settings: Any) -> RowFlow:
        options = {option: o.default for option, o in known[command].items()}
        options |= {key.replace("_", "-"): value for key, value in settings.items()}
        done, after = _estimated(name, command, flow, options, command)
        found.append(done)
        return after

    step("new red-team prompts", "red-team", given, n=OF_THEM_MADE, max_new_tokens=PROMPT)
    samples = step("replies to red-team prompts", "sample", given, **reply)
    revisions = step("four rounds of critique and revision", "critique-revise", samples, rounds=4, **reply)
    helpful = step("two replies to helpful prompts", "sample", RowFlow(HELPFUL, 1, PROMPT, 0), n=2, **reply)
    examples = revisions.rows * revisions.rounds + helpful.rows
    step("SL-CAI", "sft", RowFlow(examples, 1, PROMPT, REPLY))
    pairs = step("two replies of SL-CAI", "sample", given, n=2, **reply)
    labels = step("labels, both orders", "label-prefs", pairs)
    step("preference model, with human labels", "train-pm", replace(labels, rows=labels.rows + HELPFUL))
    step("more prompts for RL", "red-team", given, n=prompts, max_new_tokens=PROMPT)
    steps = -(-prompts // RL_BATCH)
    step("RL-CAI", "rl", rl_prompts, steps=steps, prompts_per_step=RL_BATCH, samples_per_prompt=4, **reply)
    return found


def paper_table() -> str:
    """`paper_run` as the Markdown table of docs/scale.md."""
    found = paper_run()
    sizes = "".join(f" GPU-h {name} |" for name in flops.MODELS)
    lines = [
        f"| step | command | rows | read | written | trained |{sizes} file |",
        "|---|---|" + "---:|" * (5 + len(flops.MODELS)),
    ]

    def line(name: str, command: str, rows: str, work: Work, file: str) -> str:
        tokens = (work.prompt_tokens, work.new_tokens, work.trained_tokens)
        cells = [name, command, rows, *(f"{count / 1e6:,.0f} M" if count else "" for count in tokens)]
        cells += [hours_shown(work.gpu_hours(size)) for size in flops.MODELS.values()]
        return f"| {' | '.join([*cells, file])} |"

    for e in found:
        size = f"{e.bytes / 1e9:,.2f} GB" if e.bytes else ""
        lines.append(line(e.step, f"`cai {e.command}`", f"{e.rows:,}", e.work, size))
    everything = f"{sum(e.bytes for e in found) / 1e9:,.2f} GB"
    lines.append(line("all", "", "", flops.total([e.work for e in found]), everything))
    return "\n".join(lines)
