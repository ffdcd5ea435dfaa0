"""Charts as inline SVG, each with a table of its numbers.

matplotlib draws them in placeholder colours, which are then replaced by the page's CSS variables, so that one chart
serves light and dark mode. Text stays text.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from textwrap import wrap
from typing import Any

from cai_cli.common.console import safe

INK, RULE, FLAG, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808")
VARIABLES = {
    INK: "var(--soft)",
    RULE: "var(--rule)",
    FLAG: "var(--flag)",
    PAPER: "var(--paper)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(SERIES, start=1)},
}
STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # the name of a model must not be read as a formula
    "font.size": 10,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
}
SIZE = (3.9, 2.3)  # inches at 72 points: the width of a phone, so that text is not scaled down there


@dataclass(frozen=True)
class Chart:
    """A chart and its numbers.

    Attributes:
        id: Unique on the page.
        title: Its caption.
        svg: The drawing.
        columns: Names of the columns of its table.
        rows: Rows of its table.
        note: How to read it, in one sentence.
        legend: Name -> number of its colour.
    """

    id: str
    title: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    legend: Mapping[str, int] = field(default_factory=dict)


def adjustment(intervals: int) -> str:
    """Return whether intervals are adjusted for multiple comparisons, as the end of a sentence.

    Examples:
        >>> adjustment(6), adjustment(1)
        (', simultaneous over 6', ', not adjusted for multiple comparisons')
    """
    return f", simultaneous over {intervals:,}" if intervals > 1 else ", not adjusted for multiple comparisons"


@dataclass(frozen=True)
class Series:
    """One line. With `low` and `high`, each as long as `y`, its interval is drawn."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def _draw(id: str, paint: Callable[[Any], None], size: tuple[float, float] = SIZE) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {**STYLE, "svg.hashsalt": id}  # ids that no other chart of the page has
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # matplotlib's font may lack a glyph, the browser's has it
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes)
        out = StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _page_svg(out.getvalue())


def _page_svg(svg: str) -> str:
    """Return the <svg> element alone, scalable, in the colours and font of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg)
    svg = re.sub(r'<g id="[^"]*"\s*/>', "", svg)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def lines(
    id: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    flags: Sequence[float] = (),
    share: bool = False,
    note: str = "",
) -> Chart:
    """Return a line chart of one or more series.

    Args:
        id: Unique on the page.
        title: Caption.
        series: The lines.
        x_label: Name of the x axis.
        flags: Values of x to mark with a vertical dashed line.
        share: Whether y is a share, drawn from 0 to 1.
        note: How to read the chart.
    """

    def paint(axes: Any) -> None:
        for at in flags:
            axes.axvline(at, color=FLAG, linewidth=1.2, linestyle=(0, (3, 2)))
        for line, colour in zip(series, SERIES, strict=False):
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.16, linewidth=0)
            few = len(line.x) <= 30
            axes.plot(line.x, line.y, color=colour, marker="o" if few else None, markersize=3.2)
        axes.set_xlabel(x_label)
        axes.margins(x=0.03, y=0.12)
        if share:
            axes.set_ylim(-0.02, 1.02)
        _whole_ticks(axes, [x for line in series for x in line.x])

    columns = [x_label, *(name for line in series for name in _columns(line))]
    legend = {line.name: i for i, line in enumerate(series, start=1)} if len(series) > 1 else {}
    return Chart(id, title, _draw(id, paint), columns, _table(series, columns), note, legend)


def _table(series: Sequence[Series], columns: Sequence[str]) -> list[list[Any]]:
    """Return one row for each x, with None where a series has no point there."""
    table = {x: dict[str, float]() for x in sorted({x for line in series for x in line.x})}
    for line in series:
        for column, values in zip(_columns(line), (line.y, line.low, line.high), strict=False):
            for x, value in zip(line.x, values, strict=True):
                table[x][column] = value
    return [[x, *(values.get(column) for column in columns[1:])] for x, values in table.items()]


def _columns(line: Series) -> list[str]:
    return [line.name, f"{line.name}, low", f"{line.name}, high"] if line.low else [line.name]


def _whole_ticks(axes: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    if len(set(values)) == 1:
        axes.set_xlim(values[0] - 1, values[0] + 1)
    if all(float(v).is_integer() for v in values):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def histogram(
    id: str, title: str, groups: Mapping[str, Sequence[int]], edges: Sequence[float], *, x_label: str, note: str = ""
) -> Chart:
    """Return a histogram with the bars of several groups side by side."""

    def paint(axes: Any) -> None:
        width = (edges[1] - edges[0]) * 0.86 / len(groups)
        for i, counts in enumerate(groups.values()):
            left = [edge + (edges[1] - edges[0]) * 0.07 + i * width for edge in edges[:-1]]
            axes.bar(left, counts, width=width, align="edge", color=SERIES[i], linewidth=0)
        axes.set_xlabel(x_label)
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.get_major_locator().set_params(integer=True)

    rows = [[edges[i], edges[i + 1], *(counts[i] for counts in groups.values())] for i in range(len(edges) - 1)]
    legend = {name: i for i, name in enumerate(groups, start=1)} if len(groups) > 1 else {}
    return Chart(id, title, _draw(id, paint), ["from", "to", *groups], rows, note, legend)


@dataclass(frozen=True)
class Bin:
    """A bin of `n` predictions: their mean, and the share that came true, with its 95% interval where there is one."""

    predicted: float
    value: float
    n: int
    low: float | None = None
    high: float | None = None


def reliability(id: str, title: str, bins: Sequence[Bin], *, x_label: str, note: str = "") -> Chart:
    """Return a reliability diagram: predicted probability against observed share; the diagonal is perfect."""

    def paint(axes: Any) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=1, linestyle=(0, (3, 3)))
        axes.plot([b.predicted for b in bins], [b.value for b in bins], color=SERIES[0], marker="o", markersize=4)
        for b in bins:
            if b.low is not None and b.high is not None:
                axes.plot([b.predicted, b.predicted], [b.low, b.high], color=SERIES[0], linewidth=1.2)
        axes.set_xlabel(x_label)
        axes.set_xlim(0.47, 1.03)
        axes.set_ylim(min([0.45, *(b.value if b.low is None else b.low for b in bins)]) - 0.05, 1.05)

    rows = [[b.predicted, b.value, b.low, b.high, b.n] for b in bins]
    return Chart(id, title, _draw(id, paint), ["predicted", "observed", "low", "high", "n"], rows, note)


@dataclass(frozen=True)
class ScatterPoint:
    """A named value with its interval on each axis: (value, low, high)."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def scatter(
    id: str, title: str, points: Sequence[ScatterPoint], *, x_label: str, y_label: str, note: str = ""
) -> Chart:
    """Return a scatter plot of points with intervals on both axes; each has a number, and the legend its name."""

    def paint(axes: Any) -> None:
        axes.grid(visible=True, axis="both")
        for i, (point, colour) in enumerate(zip(points, _colours(len(points)), strict=True), start=1):
            (x, x_low, x_high), (y, y_low, y_high) = point.x, point.y
            axes.errorbar(
                [x], [y], xerr=[[x - x_low], [x_high - x]], yerr=[[y - y_low], [y_high - y]],
                color=colour, marker="o", markersize=6, elinewidth=1.4,
            )  # fmt: skip
            side = ((6, 5), (-12, -13), (6, -13), (-12, 5))[i % 4]  # so that labels of similar models do not overlap
            axes.annotate(str(i), (x, y), xytext=side, textcoords="offset points", color=INK, weight="bold")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(0.2)

    columns = ["model", *(f"{axis}{end}" for axis in (x_label, y_label) for end in ("", ", low", ", high"))]
    rows = [[s.name, *s.x, *s.y] for s in points]
    legend = {f"{i} {point.name}": (i - 1) % len(SERIES) + 1 for i, point in enumerate(points, start=1)}
    return Chart(id, title, _draw(id, paint, (SIZE[0], 3.2)), columns, rows, note, legend)


def _colours(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def forest(id: str, title: str, estimates: Mapping[str, Mapping[str, float]], *, x_label: str, note: str = "") -> Chart:
    """Return a forest plot: one line for each estimate, with its value and 95% interval."""
    named = [(wrap(safe(name), 52, break_on_hyphens=False) or [""], e) for name, e in estimates.items()]
    height = sum(1 + 0.4 * (len(lines) - 1) for lines, _ in named)

    def paint(axes: Any) -> None:
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        place = height
        for lines, estimate in named:
            place -= 1 + 0.4 * (len(lines) - 1)
            axes.plot([estimate["low"], estimate["high"]], [place, place], color=SERIES[0], linewidth=1.6)
            axes.plot([estimate["value"]], [place], color=SERIES[0], marker="o", markersize=5)
            # The name is above its line, where it has the full width of the chart.
            at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (0, 5)}
            name = axes.annotate("\n".join(lines), (0, place), **at, fontsize="small", linespacing=1.1)
            name.set_in_layout(False)  # otherwise a long name narrows the axes
        axes.set_yticks([])
        axes.set_ylim(-0.7, height - 0.1)
        axes.set_xlabel(x_label)

    rows = [[name, e["value"], e["low"], e["high"], e["n"]] for name, e in estimates.items()]
    svg = _draw(id, paint, (SIZE[0], 0.8 + 0.4 * height))
    return Chart(id, title, svg, ["metric", "value", "low", "high", "n"], rows, note)
