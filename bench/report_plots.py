"""The report's figures of one record, and why those that cannot be drawn are not."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trsp.bench.report_canvas import (
    CannotDraw,
    first_memory,
    interval_bars,
    legend_below,
    new_figure,
)
from trsp.bench.report_curves import draw_depth, draw_open_loop, draw_pareto
from trsp.bench.report_style import INK, MUTED, Plot, arm_looks, figure_style, name_in_figure
from trsp.bench.report_values import Place, Values, has_interval
from trsp.bench.report_words import (
    NO_INTERVAL,
    load_phrase,
    load_title,
    memory_sentence,
    metric_title,
)
from trsp.bench.serve_record import Load, Memory, Ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FOREST_METRICS = {
    "serve": ("output_throughput", "median_tpot_ms", "median_ttft_ms"),
    "latency": ("avg_latency_ms", "p90_latency_ms"),
    "throughput": ("tokens_per_second", "requests_per_second"),
    "transformers": ("generation_throughput", "prompt_throughput"),
}


def draw_plots(values: Values) -> tuple[list[Plot], list[str]]:
    """Draw every figure the record holds the numbers for.

    Returns:
        the figures, and one line for each that could not be drawn.
    """
    drawings: tuple[tuple[str, Callable[[Values], Plot]], ...] = (
        ("Speed-up and its interval", draw_forest),
        ("Throughput against interactivity", draw_pareto),
        ("Speed against quality", draw_quality),
        ("Latency against depth", draw_depth),
        ("Time to first token against load", draw_open_loop),
    )
    plots, missing = [], []
    with figure_style():
        for title, draw in drawings:
            try:
                plots.append(draw(values))
            except CannotDraw as reason:
                missing.append(f"The figure \u201c{title}\u201d {reason}")
    return plots, missing


def draw_forest(values: Values) -> Plot:
    """Every arm's speed-up with its interval, its bound, and the line at 1."""
    memory = first_memory(values)
    metrics = [
        metric
        for metric in _FOREST_METRICS[values.record.backend]
        if any(ratio.metric == metric for ratio in values.ratios)
    ]
    names = [arm.name for arm in values.arms if arm.role != "dense"]
    rows = [
        (load, name)
        for load in values.loads_of("closed", "batch") or values.loads_of("open")
        for name in names
        if any(values.ratio(Place(memory, name, load.name), metric) for metric in metrics)
    ]
    if not rows:
        raise CannotDraw("needs speed-ups over the dense model")
    shown = {
        row: [metric for metric in metrics if _ratio(values, memory, row, metric)] for row in rows
    }
    # Where each load has one metric alone, panels would be half empty.
    alone = len(metrics) > 1 and all(len(found) == 1 for found in shown.values())
    titles = [""] if alone else [name_in_figure(metric_title(metric)) for metric in metrics]
    figure, panels = new_figure(
        values,
        len(titles),
        width=max(6.6, 2.2 + 3.2 * len(titles)),
        height=1.3 + 0.3 * len(rows),
        share_y=True,
    )
    looks = arm_looks(values)
    # A gap before each load, so that its arms are seen together.
    in_order = list(dict.fromkeys(load.name for load, _ in rows))
    heights = [place + 0.6 * in_order.index(load.name) for place, (load, _) in enumerate(rows)]
    lone = False
    for panel, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        axes.axvline(1, color=INK, linewidth=1)
        for height, row in zip(heights, rows, strict=True):
            metric = shown[row][0] if alone else metrics[panel]
            ratio = _ratio(values, memory, row, metric)
            if ratio is not None:
                _forest_row(axes, height, ratio, looks[row[1]])
                lone = lone or not has_interval(ratio)
        # A speed-up has no unit, whatever it is one of.
        axes.set_title(title)
        axes.set_xlabel("speed-up")
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.1)
        axes.tick_params(axis="y", length=0)
    panels[0].set_ylim(max(heights) + 0.8, min(heights) - 0.8)
    panels[0].set_yticks(heights, [_row_label(row, shown[row] if alone else ()) for row in rows])
    return Plot(
        "speedup",
        "Speed-up and its interval",
        "Right of the line at 1 is better than the dense model; a bar that touches the line shows "
        "no difference. The upright stroke is the bound: the most that bytes and operations "
        "allow. Grey is the dense model against itself, the noise floor. "
        + (f"A hollow point without a bar: {NO_INTERVAL}. " if lone else "")
        + memory_sentence(memory, values.record.backend),
        figure,
    )


def draw_quality(values: Values) -> Plot:
    """Speed-up against the perplexity's ratio to the dense one."""
    memory = first_memory(values)
    told = next(iter(values.told()), None)
    points: list[tuple[str, float, Ratio, str]] = []
    for arm in values.pruned:
        quality = values.quality_ratio(arm)
        place = told and Place(memory, arm.name, told.load.name)
        ratio = values.ratio(place, told.metric) if told and place else None
        if quality is not None and ratio is not None:
            points.append((arm.name, quality[1], ratio, quality[0].text))
    if told is None or not points:
        raise CannotDraw(
            "needs a speed-up of a pruned model and its perplexity, measured as the dense one's"
        )
    figure, (axes,) = new_figure(values, 1, width=6.6, height=4.6)
    looks = arm_looks(values)
    axes.axhline(1, color=MUTED, linewidth=0.9)
    axes.axvline(1, color=MUTED, linewidth=0.9)
    axes.plot([1], [1], color=INK, marker="o", markersize=8, linestyle="", label="dense")
    for name, times_dense, ratio, _ in points:
        colour, marker = looks[name]
        axes.errorbar(
            [times_dense],
            [ratio.estimate],
            yerr=interval_bars(ratio),
            color=colour,
            marker=marker,
            markersize=8,
            capsize=4,
            linestyle="",
            label=name_in_figure(name),
        )
    texts = dict.fromkeys(text for *_, text in points)
    axes.set_xlabel(f"perplexity beside the dense model's ({name_in_figure(', '.join(texts))})")
    axes.set_ylabel(f"speed-up in {name_in_figure(metric_title(told.metric))}")
    axes.margins(0.12)
    legend_below(figure, axes)
    return Plot(
        "quality",
        "Speed against quality",
        "Up is faster, right is worse text: at 1 the perplexity is the dense model's. "
        + _bars_sentence([ratio for *_, ratio, _ in points], load_phrase(told.load))
        + memory_sentence(memory, values.record.backend),
        figure,
    )


def _ratio(values: Values, memory: Memory, row: tuple[Load, str], metric: str) -> Ratio | None:
    return values.ratio(Place(memory, row[1], row[0].name), metric)


def _row_label(row: tuple[Load, str], metrics: Sequence[str]) -> str:
    """Arm and load, or arm and the metric that stands for the load."""
    load, name = row
    about = metric_title(metrics[0]) if metrics else load_title(load)
    return f"{name_in_figure(name)}, {name_in_figure(about)}"


def _bars_sentence(ratios: list[Ratio], load: str) -> str:
    lone = sum(not has_interval(ratio) for ratio in ratios)
    if lone == len(ratios):
        return f"The speed-up is {load}; {NO_INTERVAL}. "
    text = f"The bars are the intervals of the speed-up {load}"
    return f"{text}; a point without a bar is of {NO_INTERVAL}. " if lone else f"{text}. "


def _forest_row(axes: "Axes", height: float, ratio: Ratio, look: tuple[str, str]) -> None:
    """A point with its interval, hollow without one, and the stroke of its bound."""
    bars = interval_bars(ratio)
    axes.errorbar(
        [ratio.estimate],
        [height],
        xerr=bars,
        color=look[0],
        marker=look[1],
        markersize=6,
        markerfacecolor=look[0] if bars else "white",
        capsize=3,
        linestyle="",
    )
    if ratio.bound is not None:
        axes.plot(
            [ratio.bound], [height], color=INK, marker="|", markersize=13, markeredgewidth=1.6
        )
