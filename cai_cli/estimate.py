"""`cai run --dry-run`: how many rows and tokens each step would take, before anything runs.

New tokens are an upper bound (every answer as long as allowed); prompt tokens count four characters a token. What
cannot be known without running (rows that will be rejected) is taken as none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from cai_cli import console
from cai_cli.constitution import CritiqueConstitution, PreferenceConstitution, open_constitution, select
from cai_cli.forms import render_transcript
from cai_cli.jsonl import read_prompts, stop
from cai_cli.pipeline import DATA_STAGES, Step, stage_options

CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Flow:
    """What leaves a step: rows, replies per prompt, and the mean length of a prompt and of a reply in tokens."""

    rows: int
    per_prompt: int
    prompt_tokens: float
    reply_tokens: float
    rounds: int = 0


@dataclass(frozen=True)
class Estimate:
    step: str
    rows: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    command: str


def estimate(steps: Sequence[Step]) -> list[Estimate]:
    """One estimate per step, in order."""
    known = stage_options()
    flows: dict[str, Flow] = {}
    estimates = []
    for step in steps:
        options = {**{name: o.default for name, o in known[step.command].items()}, **step.settings}
        sources = options["input"] if isinstance(options["input"], list) else [options["input"]]
        read = [
            flows.get(str(source)) or _flow_of_file(str(source), bool(options.get("skip-bad"))) for source in sources
        ]
        flow = min(read, key=lambda one: one.rows)  # several are joined by prompt
        if options["limit"]:
            flow = replace(flow, rows=min(flow.rows, int(options["limit"])))
        rows, requests, prompt, new, after = _ESTIMATORS[step.command](flow, options)
        if step.command in DATA_STAGES:
            flows[str(step.output)] = after
        estimates.append(Estimate(step.name, rows, requests, round(prompt), round(new), step.shell))
    return estimates


Parts = tuple[int, int, float, float, Flow]


def _flow_of_file(source: str, skip_bad: bool) -> Flow:
    prompts = read_prompts(source, on_bad=(lambda _error, _raw: None) if skip_bad else stop)
    lengths = [len(render_transcript(p.prompt)) / CHARACTERS_PER_TOKEN for _, p in prompts]
    return Flow(len(lengths), 1, sum(lengths) / max(1, len(lengths)), 0.0)


def _few_shot_tokens(model: Any, options: dict[str, Any]) -> float:
    examples = open_constitution(model, options["constitution"], options["few-shot"]).examples
    return sum(len(e.model_dump_json()) for e in examples) / CHARACTERS_PER_TOKEN


def _red_team(flow: Flow, options: dict[str, Any]) -> Parts:
    made, new = int(options["n"]), int(options["max-new-tokens"])  # as if no attempt were lost
    shown = (int(options["shown"]) + 1) * flow.prompt_tokens
    return made, made, made * shown, made * new, Flow(made, 1, new, 0.0)


def _sample(flow: Flow, options: dict[str, Any]) -> Parts:
    rows, new = flow.rows * int(options["n"]), int(options["max-new-tokens"])
    after = Flow(rows, int(options["n"]), flow.prompt_tokens, new)
    return rows, rows, rows * flow.prompt_tokens, rows * new, after


def _revise(flow: Flow, options: dict[str, Any], requests_per_row: int) -> Parts:
    new = int(options["max-new-tokens"])
    requests = flow.rows * requests_per_row
    each = _few_shot_tokens(CritiqueConstitution, options) + flow.prompt_tokens + flow.reply_tokens + new
    after = Flow(flow.rows, flow.per_prompt, flow.prompt_tokens, new, rounds=int(options.get("rounds", 1)))
    return flow.rows, requests, requests * each, requests * new, after


def _critique_revise(flow: Flow, options: dict[str, Any]) -> Parts:
    rounds = int(options["rounds"])
    rows, requests, prompt, new, after = _revise(flow, options, rounds * (2 if options["critique"] else 1))
    return rows, requests, prompt, new, replace(after, rounds=flow.rounds + rounds) if rounds else flow


def _label(flow: Flow, options: dict[str, Any]) -> Parts:
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
    after = Flow(pairs, 1, flow.prompt_tokens, flow.reply_tokens)
    return pairs, texts, texts * each, votes * new, after


def _compare(flow: Flow, options: dict[str, Any]) -> Parts:
    models = len(options["input"])
    pairs = replace(flow, rows=flow.rows * models * (models - 1) // 2, per_prompt=1)
    if options["judge"]:
        return _label(pairs, options | {"both-orders": True})
    tokens = flow.rows * models * (flow.prompt_tokens + flow.reply_tokens)
    return pairs.rows, 0, tokens, 0, pairs


def _harm(flow: Flow, options: dict[str, Any]) -> Parts:
    return flow.rows, flow.rows, flow.rows * (flow.prompt_tokens + flow.reply_tokens), 0, flow


def _preference_principles(options: dict[str, Any]) -> Sequence[Any]:
    loaded = open_constitution(PreferenceConstitution, options["constitution"], options["few-shot"])
    return select(loaded.principles, options["principles"], options["max-principles"])


def _sft(flow: Flow, options: dict[str, Any]) -> Parts:
    examples = flow.rows * (max(1, flow.rounds) if options["revisions"] == "all" else 1)
    tokens = examples * (flow.prompt_tokens + flow.reply_tokens) * float(options["epochs"])
    return examples, 0, tokens, 0, flow


def _train_pm(flow: Flow, options: dict[str, Any]) -> Parts:
    tokens = 2 * flow.rows * (flow.prompt_tokens + flow.reply_tokens) * float(options["epochs"])
    return flow.rows, 0, tokens, 0, flow


def _score(flow: Flow, options: dict[str, Any]) -> Parts:
    return flow.rows, 0, flow.rows * (flow.prompt_tokens + flow.reply_tokens), 0, flow


def _rl(flow: Flow, options: dict[str, Any]) -> Parts:
    replies = int(options["steps"]) * int(options["prompts-per-step"]) * int(options["samples-per-prompt"])
    checks = 1 + -(-int(options["steps"]) // int(options["monitor-every"]))
    replies += checks * max(16, min(int(options["held-out"]), flow.rows // 2))
    return flow.rows, replies, replies * flow.prompt_tokens, replies * int(options["max-new-tokens"]), flow


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
        print(orjson.dumps([vars(e) for e in found]).decode())
        return
    wide = max(14, *(len(e.step) + 1 for e in found))
    print(f"{'step':<{wide}}{'rows':>10}{'requests':>10}{'prompt tokens':>15}{'new tokens':>12}")
    for e in found:
        print(f"{e.step:<{wide}}{e.rows:>10,}{e.requests:>10,}{e.prompt_tokens:>15,}{e.new_tokens:>12,}")
        print(console.safe(f"  $ {e.command}"))
    print(
        f"{'total':<{wide}}{'':>10}{sum(e.requests for e in found):>10,}"
        f"{sum(e.prompt_tokens for e in found):>15,}{sum(e.new_tokens for e in found):>12,}"
    )
