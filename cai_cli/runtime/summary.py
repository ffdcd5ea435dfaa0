"""The summary at the end of every stage: one line for a person, or one JSON object with `--json`."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from cai_cli.common import console
from cai_cli.common.errors import CaiError
from cai_cli.data.reply_ends import cut_off_share
from cai_cli.runtime.output_files import is_stream

TRAINING_METRICS = {  # shown in the line, where a stage has them
    "loss": "training loss",
    "held_out_loss": "held-out loss",
    "accuracy": "held-out accuracy",
    "reward": "training reward",
    "pm_score": "held-out score",
    "judge_score": "held-out score of the judge",
    "judge_spread": "spread of the judge's scores within a prompt (nats)",
    "judge_failed_share": "requests to the judge that failed",
    "no_reward_share": "replies without a reward",
}
SHOWN_COLUMNS = 12  # of those that were left out


def print_summary(summary: Mapping[str, Any], *, as_json: bool, stdout_is_data: bool = False) -> None:
    """Print the summary of a data stage or a training stage.

    Args:
        summary: What `StageRun.complete` or `TrainingJob.run` returns, with more keys where a stage adds some.
        as_json: Print it as one JSON object, on stdout unless rows went there; otherwise as one line on stderr.
        stdout_is_data: Whether the rows of the stage went to stdout.
    """
    if as_json:
        error = _all_rejected(summary)
        whole = {**summary, "error": error.as_json()} if error else summary
        print(orjson.dumps(whole).decode(), file=sys.stderr if stdout_is_data else sys.stdout)
        return
    target = "" if stdout_is_data or not summary["output"] else f" -> {summary['output']}"
    parts = (_by_input, _dropped, _ends, _usage, _training)
    details = "; ".join([counted(summary), *(text for part in parts for text in part(summary))])
    console.say(f"{summary['stage']}: {details} in {summary['seconds']:,.1f} s{target}")


def refuse_all_rejected(summary: Mapping[str, Any]) -> None:
    """Fail a run that rejected rows and kept none; called after everything is printed.

    Raises:
        CaiError: `all-rejected`.
    """
    if error := _all_rejected(summary):
        error.in_summary = True
        raise error


def _all_rejected(summary: Mapping[str, Any]) -> CaiError | None:
    if not summary["rejected"] or summary.get("out", summary.get("used")):
        return None
    output = str(summary["output"])
    where = f"`cai show {output}.rejected.jsonl --limit 1` prints a row with its whole reason"
    if is_stream(output):
        where = "stderr has the rows"
    return CaiError(
        f"{summary['stage']}: all {summary['rejected']:,} rows were rejected and the output is empty",
        hint=f"the summary counts the reasons; {where}",
        code="all-rejected",
    )


def counted(counts: Mapping[str, Any]) -> str:
    """`12 in = 10 out + 2 rejected (2 empty reply) + 0 skipped`."""
    if "used" in counts:
        held_out = f" ({counts['train']:,} trained on + {counts['held_out']:,} held out)" if counts["held_out"] else ""
        parts = [f"{counts['in']:,} in = {counts['used']:,} used{held_out}"]
    else:
        parts = [f"{counts['in']:,} in = {counts['out']:,} out"]
    for name in ("rejected", "skipped"):
        reasons = ", ".join(f"{count:,} {why}" for why, count in counts.get(f"{name}_reasons", {}).items())
        parts.append(f"{counts[name]:,} {name}" + (f" ({reasons})" if reasons else ""))
    return " + ".join(parts)


def _by_input(summary: Mapping[str, Any]) -> Iterator[str]:
    """`used by input: revisions (24), also 1 (179)`, where rows of several inputs are mixed."""
    if counts := summary.get("used_by_input"):
        yield "used by input: " + ", ".join(f"{name} ({count:,})" for name, count in counts.items())


def _dropped(summary: Mapping[str, Any]) -> Iterator[str]:
    """`read as: ShareGPT (120)` and `left out: score_chosen (120), messages (120)`, the most frequent columns."""
    if names := summary.get("read_as"):
        yield "read as: " + ", ".join(f"{name} ({count:,})" for name, count in names.items())
    if names := summary.get("dropped"):
        shown = ", ".join(f"{name} ({count:,})" for name, count in list(names.items())[:SHOWN_COLUMNS])
        more = f" and {len(names) - SHOWN_COLUMNS:,} more" if len(names) > SHOWN_COLUMNS else ""
        yield f"left out: {shown}{more}"


def _ends(summary: Mapping[str, Any]) -> Iterator[str]:
    if text := cut_off_share(summary.get("reply_ends", {})):
        yield text


def _usage(summary: Mapping[str, Any]) -> Iterator[str]:
    if used := summary.get("usage"):
        cost = "" if used["cost"] is None else f" for {used['cost']:,.4f}"
        yield f"{used['prompt_tokens']:,} prompt + {used['new_tokens']:,} new tokens{cost}"


def _training(summary: Mapping[str, Any]) -> Iterator[str]:
    if "steps" not in summary:
        return
    changes = [
        f"{words} {_before(summary.get(f'{name}_before'))}{_value(summary[name])}"
        for name, words in TRAINING_METRICS.items()
        if summary.get(name) is not None
    ]
    if changes:
        yield ", ".join(changes)
    kept = summary.get("kept_step", summary["steps"])
    if kept != summary["steps"]:
        yield f"kept step {kept:,}" + ("" if kept else ", the start model")
    yield f"{summary['steps']:,} steps"


def _before(metric: Any) -> str:
    return "" if metric is None else f"{_value(metric)} -> "


def _value(metric: Any) -> str:
    """A number, or the point estimate of a metric that has an interval."""
    return f"{metric['value'] if isinstance(metric, dict) else metric:.4g}"
