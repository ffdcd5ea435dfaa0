"""The summary line at the end of a stage."""

import sys
from typing import Any

import orjson

from cai_cli.common import console


def print_summary(summary: dict[str, Any], *, as_json: bool, stdout_is_data: bool) -> None:
    """The closing line on stderr, or with `--json` the summary as one object (on stdout unless rows went there)."""
    if as_json:
        line = orjson.dumps(summary).decode()
        print(line, file=sys.stderr if stdout_is_data else sys.stdout)
        return
    parts = [f"{summary['in']:,} in = {summary['out']:,} out"]
    for name in ("rejected", "skipped"):
        reasons = ", ".join(f"{count:,} {why}" for why, count in summary.get(f"{name}_reasons", {}).items())
        parts.append(f"{summary[name]:,} {name}" + (f" ({reasons})" if reasons else ""))
    if used := summary.get("usage"):
        parts[-1] += f"; {used['prompt_tokens']:,} prompt + {used['new_tokens']:,} new tokens"
        parts[-1] += "" if used["cost"] is None else f" for {used['cost']:,.4f}"
    target = "" if stdout_is_data or not summary["output"] else f" -> {summary['output']}"
    console.say(f"{summary['stage']}: {' + '.join(parts)} in {summary['seconds']:,.1f} s{target}")
