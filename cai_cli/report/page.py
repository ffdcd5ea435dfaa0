"""Renders a run as one HTML page with jinja2: autoescaped, without control characters or bidirectional overrides.

The page loads nothing: its Content-Security-Policy allows one inline script, by its hash, and no requests.
"""

import base64
import csv
import io
from collections.abc import Iterator, Sequence
from datetime import datetime
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from cai_cli import __version__
from cai_cli.common.console import safe
from cai_cli.data.schema import Preference
from cai_cli.evaluate.outcome import points
from cai_cli.metrics.intervals import with_interval
from cai_cli.report import (
    adherence,
    benchmarks,
    by_round,
    charts,
    curves,
    examples,
    first_screen,
    labels,
    refusals,
    summary,
)
from cai_cli.report.charts import Chart
from cai_cli.report.collect import TRAINING, RunFiles, StepFiles, is_estimate

# Size limit of each list, in bytes of HTML: with all lists full the page stays under 5 MB.
CHAIN_BYTES, COMPARISON_BYTES, SAMPLE_BYTES, ADHERENCE_BYTES = 1_600_000, 700_000, 900_000, 600_000
USAGE = ("requests", "prompt_tokens", "new_tokens", "cost")
HERE = Path(__file__).parent


def render(run: RunFiles) -> str:
    """Return the HTML page of a run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"number": number, "csv": csv_link, "svg": Markup, "share": share, "shares": shares,
                            "estimate": with_interval, "interval": interval,
                            "duration": duration, "points": points,
                            "probability": lambda p: f"{100 * p:.1f}%"}  # fmt: skip
    script, style = ((HERE / "templates" / name).read_text(encoding="utf-8") for name in ("script.js", "style.css"))
    return environment.get_template("page.html.j2").render(
        **_sections(run),
        run=run,
        name=run.folder.resolve().name,
        version=__version__,
        script=Markup(script),  # noqa: S704 - our own file, like the style  # nosec B704
        style=Markup(style),  # noqa: S704  # nosec B704
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )


def _finalize(value: object) -> object:
    """Replace control characters and bidirectional overrides in the text of a `{{ }}` by \\xNN."""
    if isinstance(value, Markup):
        return value
    return safe(value) if isinstance(value, str) else value


def _sections(run: RunFiles) -> dict[str, Any]:
    """Return the variables of the template. Every file is read in one pass; `run.problems` is complete afterwards."""
    labelled = [(step, labels.LabelCharts()) for step in run.steps_of("label-prefs", "pairs")]
    compared = examples.comparisons(
        chain.from_iterable(_observed(run, step, label_charts) for step, label_charts in labelled),
        examples.Budget(COMPARISON_BYTES),
        [step.output.name for step, _ in labelled],
    )
    audits = _audits(labelled)
    return {
        "first": first_screen.first_screen(run),
        "counts": [(step, summary.row_counts(step)) for step in run.steps],
        "seconds": sum(first_screen.elapsed(step) or 0 for step in run.steps),
        "costs": _costs(run),
        "missing": summary.missing(run),
        "key_metrics": summary.key_metrics(run, audits[0]["metrics"] if compared.total and len(audits) == 1 else None),
        "constitutions": summary.constitutions(run),
        "chains": examples.chains(run, examples.Budget(CHAIN_BYTES)),
        "compared": compared,
        "audits": audits,
        "training": [_training(run, step) for step in run.steps_of(*TRAINING)],
        "scatters": [*_scatters(run), *refusals.plane(run.evaluations)],
        "wins": _win_rates(run),
        "sweeps": _sweeps(run),
        "by_round": by_round.steps_by_round(
            run, {step.name: charts.label_audit.audit() for step, charts in labelled if charts.label_audit.rows}
        ),
        "adherence": adherence.matrices(run, examples.Budget(ADHERENCE_BYTES)),
        "published": benchmarks.published(run),
        "matrices": by_round.matrices(run.comparisons),
        "evaluations": {name: summary.metric_rows(metrics) for name, metrics in run.evaluations.items()},
        "forests": _forests(run),
        "samples": examples.side_by_side(run, examples.Budget(SAMPLE_BYTES)),
    }


def _training(run: RunFiles, step: StepFiles) -> dict[str, Any]:
    """Return the section of one trained model."""
    rows = run.training_log(step)
    of_model, optimiser = curves.curves(step, rows)
    calibration = curves.calibration(step)
    return {
        "step": step,
        "metrics": summary.metric_rows(step.metrics),
        "charts": [*of_model, calibration] if calibration else of_model,
        "optimiser": optimiser,
        "flags": curves.flags(rows),
        "note": step.metrics.get("note"),
        "last": rows[-1]["step"] if rows else None,
    }


def _observed(run: RunFiles, step: StepFiles, label_charts: labels.LabelCharts) -> Iterator[Preference]:
    """Yield the labels of a step and add each to its charts, then add the rejected pairs."""
    for row in run.rows(step, Preference):
        label_charts.add(row)
        yield row
    for rejected in run.rejected(step):
        label_charts.add(rejected)


def _audits(labelled: Sequence[tuple[StepFiles, labels.LabelCharts]]) -> list[dict[str, Any]]:
    """Return the audit of every step with labels; `name` is the step, or empty where there is only one."""
    audits = []
    for place, (step, label_charts) in enumerate(labelled, 1):
        if label_charts.label_audit.rows:
            name, id = (step.name, f"labels-{place}") if len(labelled) > 1 else ("", "labels")
            metrics = label_charts.label_audit.audit()
            audits.append({"name": name, "metrics": metrics, "charts": label_charts.charts(metrics, id=id, step=name)})
    return audits


def _costs(run: RunFiles) -> tuple[list[str], list[list[Any]]]:
    """Return the table of costs: seconds of every step, and tokens and their price where an engine counts them."""
    counted = [name for name in USAGE if any(name in step.usage for step in run.steps)]
    rows = [[step.name, step.stage, step.seconds, *(step.usage.get(name) for name in counted)] for step in run.steps]
    return ["step", "command", "seconds", *(name.replace("_", " ") for name in counted)], rows


def _scatters(run: RunFiles) -> list[Chart]:
    """Return a scatter plot of the Elo ratings of each comparison."""
    plots = []
    for name, compared in run.comparisons.items():
        axes = [{r.model: (r.value, r.low, r.high) for r in ratings}
                for ratings in (compared.ratings.helpful, compared.ratings.harmless)]  # fmt: skip
        points = [
            charts.ScatterPoint(m, axes[0][m], axes[1][m]) for m in compared.models if m in axes[0] and m in axes[1]
        ]
        if points:
            title, note = f"Elo ratings ({_short(name)})", "Higher is better on both axes. The bars are 95% intervals"
            note = f"{note}{charts.adjustment(compared.simultaneous.ratings)}. Win rates tell which model is better."
            labels_of_axes = {"x_label": "helpfulness Elo", "y_label": "harmlessness Elo"}
            plots.append(charts.scatter(name, title, points, **labels_of_axes, note=note))
    return plots


def _win_rates(run: RunFiles) -> list[Chart]:
    """Return a forest plot of the win rates of each comparison."""
    plots = []
    for name, compared in run.comparisons.items():
        rates = {f"{w.a} over {w.b}" + (f", {w.kind}" if w.kind else ""): w.model_dump() for w in compared.win_rates}
        if rates:
            title = f"Win rates ({_short(name)})"
            note = "An interval that contains 0.5 shows no significant difference. "
            note += f"The intervals are 95% intervals{charts.adjustment(compared.simultaneous.win_rates)}."
            plots.append(charts.forest(f"{name}-wins", title, rates, x_label="win rate and 95% interval", note=note))
    return plots


def _short(name: str) -> str:
    """Return the name of a file of results without its endings."""
    return name.removesuffix(".sweep.json").removesuffix(".compare.json").removesuffix(".jsonl")


def _sweeps(run: RunFiles) -> list[Chart]:
    plots = []
    for name, sweep in run.sweeps.items():
        points = sorted(sweep.points, key=lambda point: point.at)
        line = charts.Series(sweep.figure, *([getattr(p, a) for p in points] for a in ("at", "value", "low", "high")))
        title = f"{sweep.figure} by {sweep.setting} ({_short(name)})"
        note = f"The band shows 95% intervals{charts.adjustment(sweep.simultaneous)}."
        plots.append(charts.lines(name, title, [line], x_label=sweep.setting, note=note))
    return plots


def _forests(run: RunFiles) -> dict[str, Chart]:
    """Return a forest plot for every evaluation with 2 to 40 estimates."""
    plots = {}
    for name, metrics in run.evaluations.items():
        estimates = {k: v for k, v in metrics.items() if is_estimate(v)}
        if 2 <= len(estimates) <= 40:
            note = "95% intervals, not adjusted for multiple comparisons: of twenty, one may miss its value."
            title, x_label = f"Metrics of {name}", "value and 95% interval"
            plots[name] = charts.forest(name, title, estimates, x_label=x_label, note=note)
    return plots


# --- filters of the template --------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """Return a number as a person reads it; an estimate with its interval and n.

    Examples:
        >>> number(12345), number(0.1234), number({"value": 0.5, "low": 0.25, "high": 0.75, "n": 8})
        ('12,345', '0.123', '0.5 (95%: 0.25 to 0.75, n = 8)')
    """
    if value is None:
        return "–"
    if is_estimate(value):
        return f"{number(value['value'])} (95%: {number(value['low'])} to {number(value['high'])}, n = {value['n']:,})"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def share(value: float) -> str:
    """Return a share in percent."""
    return f"{100 * value:.0f}%"


def duration(seconds: float) -> str:
    """Return a duration in seconds, or from one minute on in minutes.

    Examples:
        >>> duration(41.7), duration(150)
        ('42 s', '2.5 min')
    """
    return f"{seconds:.0f} s" if seconds < 59.5 else f"{seconds / 60:,.1f} min"


def interval(estimate: Any) -> str:
    """Return the 95% interval and n of a share."""
    return f"95%: {share(estimate['low'])} to {share(estimate['high'])}, n = {estimate['n']:,}"


def shares(estimate: Any) -> str:
    """Return a share with its interval, or a dash for None."""
    return f"{share(estimate['value'])} ({interval(estimate)})" if estimate else "–"


def csv_link(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as a `data:` link to a CSV file; no text cell can be read as a formula."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([_no_formula(c) for c in columns])
    writer.writerows([[_no_formula(cell) for cell in row] for row in rows])
    return "data:text/csv;charset=utf-8," + quote(out.getvalue())


def _no_formula(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
