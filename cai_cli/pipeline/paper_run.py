"""The cost of the paper's own run, estimated as by `cai run --dry-run`: the table of docs/scale.md."""

from dataclasses import replace
from typing import Any

from cai_cli.pipeline import registry
from cai_cli.pipeline.estimate import StepEstimate, estimate_step, format_hours
from cai_cli.runtime import cost
from cai_cli.runtime.cost import RowFlow, TokenCounts

# Numbers of prompts are from sections 3.2, 4.1 and 4.2 of the paper. It gives no mean lengths; these are assumed.
RED_TEAM, GENERATED, HELPFUL, RL_RED_TEAM, RL_HELPFUL = 182_831, 140_335, 135_296, 491_142, 474_300
PROMPT, REPLY = 60, 120  # tokens
RL_BATCH = 512  # prompts in one step, with four replies each; the run is one pass over the prompts


def paper_run() -> list[StepEstimate]:
    """One estimate for each step of the paper's run, with the defaults of `cai` where the paper gives no value."""
    reply = {"max_new_tokens": REPLY}
    prompts = RL_RED_TEAM + RL_HELPFUL
    given, rl_prompts = RowFlow(RED_TEAM, 1, PROMPT, 0), RowFlow(prompts, 1, PROMPT, 0)
    estimates: list[StepEstimate] = []

    def step(name: str, command: str, flow: RowFlow, **options: Any) -> RowFlow:
        stage = registry.STAGES[command]
        required = {field: "-" for field, (info, _) in stage.config.options().items() if info.is_required()}
        step_estimate, after = estimate_step(name, stage, flow, stage.config.build(required | options), command)
        estimates.append(step_estimate)
        return after

    step("new red-team prompts", "red-team", given, n=GENERATED, max_new_tokens=PROMPT)
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
    rl = {"pm": "-", "steps": steps, "prompts_per_step": RL_BATCH, "samples_per_prompt": 4}
    step("RL-CAI", "rl", rl_prompts, **rl, **reply)
    return estimates


def paper_table() -> str:
    """`paper_run` as the Markdown table of docs/scale.md."""
    estimates = paper_run()
    sizes = "".join(f" GPU-h {name} |" for name in cost.MODELS)
    lines = [
        f"| step | command | rows | read | written | trained |{sizes} file |",
        "|---|---|" + "---:|" * (5 + len(cost.MODELS)),
    ]

    def line(name: str, command: str, rows: str, tokens: TokenCounts, file: str) -> str:
        counts = (tokens.prompt_tokens, tokens.new_tokens, tokens.trained_tokens)
        cells = [name, command, rows, *(f"{count / 1e6:,.0f} M" if count else "" for count in counts)]
        cells += [format_hours(tokens.gpu_hours(size)) for size in cost.MODELS.values()]
        return f"| {' | '.join([*cells, file])} |"

    for e in estimates:
        size = f"{e.bytes / 1e9:,.2f} GB" if e.bytes else ""
        lines.append(line(e.step, f"`cai {e.command}`", f"{e.rows:,}", e.tokens, size))
    everything = f"{sum(e.bytes for e in estimates) / 1e9:,.2f} GB"
    lines.append(line("all", "", "", cost.total([e.tokens for e in estimates]), everything))
    return "\n".join(lines)
