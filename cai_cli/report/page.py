"""Data -> one HTML page: jinja2 with autoescape, every text stripped of what could steer a reader's screen.

The page loads nothing: its policy allows the one inline script by its hash and no request at all.
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
from cai_cli.report import charts, curves, examples, labels, summary
from cai_cli.report.charts import Chart
from cai_cli.report.collect import TRAINING, RunFiles, StepFiles, is_figure

# How much of the page each list may take, in bytes: with five lists full it stays under 5 MB.
CHAIN_BYTES, COMPARISON_BYTES, SAMPLE_BYTES = 1_600_000, 700_000, 900_000
USAGE = ("requests", "prompt_tokens", "new_tokens", "cost")
HERE = Path(__file__).parent


def render(run: RunFiles) -> str:
    """The whole page."""
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
                            "interval": interval, "probability": lambda p: f"{100 * p:.1f}%"}  # fmt: skip
    script, style = ((HERE / "templates" / name).read_text(encoding="utf-8") for name in ("script.js", "style.css"))
    return environment.get_template("page.html.j2").render(
        **_sections(run),
        run=run,
        name=run.folder.resolve().name,
        version=__version__,
        script=Markup(script),  # noqa: S704 - our own file, as is the style  # nosec B704
        style=Markup(style),  # noqa: S704  # nosec B704
        script_hash=base64.b64encode(sha256(script.encode()).digest()).decode(),
    )


def _finalize(value: object) -> object:
    """What a `{{ }}` puts on the page: text without control characters and bidirectional overrides, shown as \\xNN."""
    if isinstance(value, Markup):
        return value
    return safe(value) if isinstance(value, str) else value


def _sections(run: RunFiles) -> dict[str, Any]:
    """What the template draws, read in one pass a file. Problems met on the way are complete only after it."""
    counted = [(step, labels.Audit()) for step in run.of("label-prefs")]
    compared = examples.comparisons(
        chain.from_iterable(_counted(run, step, audit) for step, audit in counted),
        examples.Budget(COMPARISON_BYTES),
        [step.output.name for step, _ in counted],
    )
    audits = _audits(counted)
    training = []
    for step in run.of(*TRAINING):
        rows = run.metrics(step)
        learned, optimiser = curves.curves(step, rows)
        calibrated = curves.calibration(step)
        training.append(
            {
                "step": step,
                "figures": summary.figure_rows(step.figures),
                "charts": [*learned, calibrated] if calibrated else learned,
                "optimiser": optimiser,
                "flags": curves.flags(rows),
                "note": step.figures.get("note"),
                "last": rows[-1]["step"] if rows else None,
            }
        )
    return {
        "flows": [(step, summary.flow(step)) for step in run.steps],
        "seconds": sum(step.seconds or 0 for step in run.steps),
        "costs": _costs(run),
        "missing": summary.missing(run),
        "headlines": summary.headlines(run, audits[0]["figures"] if compared.total and len(audits) == 1 else None),
        "constitutions": summary.constitutions(run),
        "chains": examples.chains(run, examples.Budget(CHAIN_BYTES)),
        "compared": compared,
        "audits": audits,
        "training": training,
        "planes": _planes(run),
        "wins": _wins(run),
        "sweeps": _sweeps(run),
        "evaluations": {name: summary.figure_rows(found) for name, found in run.evaluations.items()},
        "forests": _forests(run),
        "samples": examples.side_by_side(run, examples.Budget(SAMPLE_BYTES)),
    }


def _counted(run: RunFiles, step: StepFiles, audit: labels.Audit) -> Iterator[Preference]:
    """The labels of a step, counted as they pass; the rejected pairs after them."""
    for row in run.rows(step, Preference):
        audit.add(row)
        yield row
    for refused in run.rejected(step):
        audit.add(refused)


def _audits(counted: Sequence[tuple[StepFiles, labels.Audit]]) -> list[dict[str, Any]]:
    """The audit of every step that labelled something, with the step's `name` where there are several steps."""
    found = []
    for place, (step, audit) in enumerate(counted, 1):
        if audit.label_audit.rows:
            name, id = (step.name, f"labels-{place}") if len(counted) > 1 else ("", "labels")
            figures = audit.label_audit.audit()
            found.append({"name": name, "figures": figures, "charts": audit.charts(figures, id=id, of=name)})
    return found


def _costs(run: RunFiles) -> tuple[list[str], list[list[Any]]]:
    """Seconds of every step, and where an engine counts them its tokens and what they cost."""
    counted = [name for name in USAGE if any(name in step.usage for step in run.steps)]
    rows = [[step.name, step.stage, step.seconds, *(step.usage.get(name) for name in counted)] for step in run.steps]
    return ["step", "command", "seconds", *(name.replace("_", " ") for name in counted)], rows


def _planes(run: RunFiles) -> list[Chart]:
    found = []
    for name, compared in run.comparisons.items():
        axes = [{r.model: (r.value, r.low, r.high) for r in ratings}
                for ratings in (compared.ratings.helpful, compared.ratings.harmless)]  # fmt: skip
        spots = [charts.Spot(m, axes[0][m], axes[1][m]) for m in compared.models if m in axes[0] and m in axes[1]]
        if spots:
            title, note = f"Elo on two axes ({_short(name)})", "Up and right is better; the bars are 95% intervals."
            found.append(
                charts.plane(name, title, spots, x_label="helpfulness Elo", y_label="harmlessness Elo", note=note)
            )
    return found


def _wins(run: RunFiles) -> list[Chart]:
    """Of every comparison the win rates; one half says that neither is better."""
    found = []
    for name, compared in run.comparisons.items():
        rates = {f"{w.a} over {w.b}" + (f", {w.kind}" if w.kind else ""): w.model_dump() for w in compared.win_rates}
        if rates:
            title, note = f"Win rates ({_short(name)})", "An interval that holds 0.5 shows no difference."
            found.append(charts.forest(f"{name}-wins", title, rates, x_label="win rate and 95% interval", note=note))
    return found


def _short(name: str) -> str:
    """The name of a file of figures without what all have."""
    return name.removesuffix(".sweep.json").removesuffix(".compare.json").removesuffix(".jsonl")


def _sweeps(run: RunFiles) -> list[Chart]:
    found = []
    for name, sweep in run.sweeps.items():
        p = sorted(sweep.points, key=lambda point: point.at)
        line = charts.Series(sweep.figure, *([getattr(x, a) for x in p] for a in ("at", "value", "low", "high")))
        found.append(
            charts.lines(name, f"{sweep.figure} by {sweep.setting} ({_short(name)})", [line], x_label=sweep.setting)
        )
    return found


def _forests(run: RunFiles) -> dict[str, Chart]:
    """A picture for every evaluation that holds two or more figures with intervals."""
    found = {}
    for name, figures in run.evaluations.items():
        intervals = {k: v for k, v in figures.items() if is_figure(v)}
        if 2 <= len(intervals) <= 40:
            found[name] = charts.forest(name, f"Figures of {name}", intervals, x_label="value and 95% interval")
    return found


# --- filters of the template --------------------------------------------------------------------------------------


def number(value: Any) -> str:
    """A number as a person reads it; a figure with its interval and n."""
    if value is None:
        return "–"
    if is_figure(value):
        return f"{number(value['value'])} (95%: {number(value['low'])} to {number(value['high'])}, n = {value['n']:,})"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def share(value: float) -> str:
    return f"{100 * value:.0f}%"


def interval(figure: Any) -> str:
    """The 95% interval and n of a share."""
    return f"95%: {share(figure['low'])} to {share(figure['high'])}, n = {figure['n']:,}"


def shares(figure: Any) -> str:
    """A share with its interval; a dash where there is none."""
    return f"{share(figure['value'])} ({interval(figure)})" if figure else "–"


def csv_link(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A `data:` link to a table as CSV; no cell of text can be taken for a formula."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([_plain(c) for c in columns])
    writer.writerows([[_plain(cell) for cell in row] for row in rows])
    return "data:text/csv;charset=utf-8," + quote(out.getvalue())


def _plain(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
