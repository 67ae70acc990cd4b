"""What the report's figures share: panels, the line of an arm, bars of intervals, the legend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trsp.bench.report_style import WARNING, name_in_figure
from trsp.bench.report_values import Values, told_memory
from trsp.bench.report_words import metric_title, metric_unit
from trsp.bench.serve_record import Memory, Ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A span of figures wider than this hides the small ones unless the axis is logarithmic.
_WIDE_SPAN = 15


class CannotDraw(Exception):  # noqa: N818 - no error: the record lacks something
    """The record lacks what a figure shows; the text says what."""


def first_memory(values: Values) -> Memory:
    """The memory that figures are drawn at: equal KV blocks where they were measured.

    Raises:
        CannotDraw: nothing was measured.
    """
    if not values.memories:
        raise CannotDraw("nothing was measured")
    return told_memory(values)


def new_figure(
    values: Values, num_panels: int, *, width: float, height: float, share_y: bool = False
) -> tuple["Figure", list["Axes"]]:
    """A figure with panels side by side, sizes in inches; what limits its numbers stands above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, num_panels, sharey=share_y, squeeze=False)[0]
    record = values.record
    limits = ["INVALID"] if record.invalid else []
    limits += ["PARTIAL"] if record.partial else []
    limits += [record.label] if record.label else []
    if limits:
        text = name_in_figure("; ".join(limits), longest=80)
        figure.suptitle(text, x=0.99, ha="right", fontsize=9, color=WARNING)
    return figure, list(panels)


def arm_line(
    axes: "Axes",
    values: Values,
    name: str,
    points: Sequence[tuple[float, float]],
    look: tuple[str, str],
) -> None:
    """An arm's points joined by a line; the control's is thin, dashed and hollow."""
    control = name in values.controls
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=look[0],
        marker=look[1],
        label=name_in_figure(name),
        linestyle="--" if control else "-",
        linewidth=1.1 if control else 1.8,
        markerfacecolor="white" if control else look[0],
        zorder=2 if control else 3,
    )


def interval_bars(ratio: Ratio) -> list[list[float]] | None:
    """The lengths of the two arms of an error bar; None without an interval."""
    if ratio.low is None or ratio.high is None:
        return None
    return [[max(0.0, ratio.estimate - ratio.low)], [max(0.0, ratio.high - ratio.estimate)]]


def panel_title(metric: str) -> str:
    """A metric's name with its unit of time."""
    unit = metric_unit(metric)
    return name_in_figure(metric_title(metric)) + (f", {unit}" if unit in ("ms", "s") else "")


def from_zero(axes: "Axes") -> None:
    """Let the vertical axis begin at 0, so that heights compare as they are."""
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)


def fit_axis(axes: "Axes", heights: Sequence[float]) -> None:
    """Begin the vertical axis at 0, or make it logarithmic where the figures differ too much."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    positive = [height for height in heights if height > 0]
    if len(positive) < len(heights) or max(positive) <= _WIDE_SPAN * min(positive):
        from_zero(axes)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_below(figure: "Figure", *panels: "Axes") -> None:
    """The legend under all panels, each name once, four columns at most."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        columns = min(4, len(named))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)
