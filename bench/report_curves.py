"""The report's curves: throughput against interactivity, latency against depth and against load."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trsp.bench.report_canvas import (
    CannotDraw,
    arm_line,
    first_memory,
    fit_axis,
    from_zero,
    legend_below,
    new_figure,
    panel_title,
)
from trsp.bench.report_style import INK, MUTED, Plot, arm_looks, name_in_figure
from trsp.bench.report_values import Place, Values
from trsp.bench.report_words import is_rate, memory_sentence
from trsp.bench.serve_record import Arm, Load

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]

_DEPTH_METRICS = {
    "serve": ("median_e2el_ms", "median_tpot_ms", "median_ttft_ms"),
    "latency": ("avg_latency_ms", "p90_latency_ms"),
    "throughput": ("tokens_per_second", "requests_per_second"),
    "transformers": ("generation_latency_s", "prompt_latency_s"),
}
# Loads look like no arm: an arm's colour must not seem to be meant.
_LOAD_LOOKS = (("#5b3a8e", "o"), ("#8c6d00", "s"))


def draw_pareto(values: Values) -> Plot:
    """Tokens/s of the whole server against tokens/s of one user, over the closed loads."""
    memory = first_memory(values)
    loads = [load for load in values.loads_of("closed") if load.concurrency is not None]

    def point(arm: Arm, load: Load) -> tuple[float, float] | None:
        place = Place(memory, arm.name, load.name)
        tpot = values.value(place, "median_tpot_ms")
        rate = values.value(place, "output_throughput")
        return (1000 / tpot, rate) if tpot and tpot > 0 and rate else None

    curves = _curves(values, loads, point)
    if _longest(curves) < 2:
        raise CannotDraw("needs two closed loads with output throughput and median TPOT")
    figure, (axes,) = new_figure(values, 1, width=6.6, height=4.6)
    looks = arm_looks(values)
    for name, points in curves.items():
        arm_line(axes, values, name, [(x, y) for x, y, _ in points], looks[name])
        if name in values.controls:
            continue
        for x, y, load in points:
            axes.annotate(
                str(load.concurrency),
                (x, y),
                xytext=(7, 5),
                textcoords="offset points",
                fontsize=8.5,
                color=MUTED,
            )
    axes.set_xlabel("tokens/s of one user (1000 / median TPOT in ms)")
    axes.set_ylabel("output tokens/s of the server")
    from_zero(axes)
    axes.margins(x=0.08)
    legend_below(figure, axes)
    return Plot(
        "pareto",
        "Throughput against interactivity",
        "Up is more work done by the same machine, right is a faster answer for each user; a curve "
        "further up and right is better. The number at a point is how many requests are in flight. "
        + memory_sentence(memory, values.record.backend),
        figure,
    )


def draw_depth(values: Values) -> Plot:
    """Latency (or throughput) against the number of layers, each block a point."""
    memory = first_memory(values)
    loads = values.main_loads()
    metrics = [
        metric
        for metric in _DEPTH_METRICS[values.record.backend]
        if any(
            values.value(Place(memory, arm.name, load.name), metric) is not None
            for arm in values.arms
            for load in loads
        )
    ]
    depths = sorted({arm.num_hidden_layers for arm in values.arms})
    if not metrics or len(depths) < 2:
        raise CannotDraw("needs a figure at two different numbers of layers")
    width = max(6.6, 3.9 * len(metrics))
    figure, panels = new_figure(values, len(metrics), width=width, height=4.2)
    for axes, metric in zip(panels, metrics, strict=True):
        for load, look in zip(loads, _LOAD_LOOKS, strict=False):
            _depth_line(axes, values, Place(memory, "", load.name), metric, look)
        for load in loads:
            _proportional_line(axes, values, Place(memory, "", load.name), metric)
        axes.set_title(panel_title(metric))
        axes.set_xlabel("layers")
        axes.set_xticks(depths)
        axes.margins(x=0.12)
        from_zero(axes)
    legend_below(figure, *panels)
    title = "Throughput" if is_rate(metrics[0]) else "Latency"
    return Plot(
        "depth",
        f"{title} against depth",
        "Each small point is one block, hollow ones are the dense model again; lines join the "
        "means. The dotted line is where the dense model's figure would go if it followed the "
        "number of layers alone, which embeddings, output head and the engine's own work prevent. "
        + memory_sentence(memory, values.record.backend),
        figure,
    )


def draw_open_loop(values: Values) -> Plot:
    """p90 of TTFT, and goodput, against arrivals as a share of the dense model's capacity."""
    memory = first_memory(values)
    loads = [load for load in values.loads_of("open") if load.share is not None]
    curves = {}
    for metric in ("p90_ttft_ms", "request_goodput"):

        def point(arm: Arm, load: Load, metric: str = metric) -> tuple[float, float] | None:
            value = values.value(Place(memory, arm.name, load.name), metric)
            return None if value is None else (load.share or 0.0, value)

        found = _curves(values, loads, point)
        if found:
            curves[metric] = found
    if _longest(curves.get("p90_ttft_ms", {})) < 2:
        raise CannotDraw("needs two open loads with the 90th percentile of TTFT")
    figure, panels = new_figure(values, len(curves), width=max(6.6, 5.2 * len(curves)), height=4.4)
    looks = arm_looks(values)
    for axes, (metric, of_arms) in zip(panels, curves.items(), strict=True):
        for name, points in of_arms.items():
            arm_line(axes, values, name, [(x, y) for x, y, _ in points], looks[name])
        axes.set_title(panel_title(metric))
        axes.set_xlabel("arrivals, share of the dense model's capacity")
        axes.set_xticks([load.share or 0.0 for load in loads])
        axes.margins(x=0.08)
        heights = [y for points in of_arms.values() for _, y, _ in points]
        if metric == "p90_ttft_ms" and max(heights) > values.record.workload.ttft_slo_ms / 2:
            axes.axhline(
                values.record.workload.ttft_slo_ms, color=MUTED, linewidth=1.2, linestyle=":"
            )
        fit_axis(axes, heights)
    legend_below(figure, panels[0])
    return Plot(
        "open-loop",
        "Time to first token against load",
        "Requests arrive at random; the further right, the closer to what the dense model can "
        "serve. A curve that turns up later takes more load before users wait. The dotted line, "
        f"where in view, is the bound of goodput. {memory_sentence(memory, values.record.backend)}",
        figure,
    )


def _curves(
    values: Values,
    loads: Sequence[Load],
    point: Callable[[Arm, Load], tuple[float, float] | None],
) -> dict[str, list[tuple[float, float, Load]]]:
    """The points of each arm that has any, in the order of the loads."""
    found: dict[str, list[tuple[float, float, Load]]] = {}
    for arm in values.arms:
        for load in loads:
            here = point(arm, load)
            if here is not None:
                found.setdefault(arm.name, []).append((*here, load))
    return found


def _longest(curves: dict[str, list[tuple[float, float, Load]]]) -> int:
    return max(map(len, curves.values()), default=0)


def _depth_line(
    axes: "Axes", values: Values, place: Place, metric: str, look: tuple[str, str]
) -> None:
    """Means over depth joined by a line, and blocks as points; nothing where nothing counts."""
    means: Points = []
    colour, marker = look
    for arm in values.arms:
        here = Place(place.memory, arm.name, place.load)
        blocks = values.by_block(here, metric)
        axes.plot(
            [arm.num_hidden_layers] * len(blocks),
            blocks,
            color=colour,
            linestyle="",
            marker=marker,
            markersize=4.5,
            alpha=0.75,
            markerfacecolor="white" if arm.role == "control" else colour,
        )
        mean = values.value(here, metric)
        if mean is not None and arm.role != "control":
            means.append((float(arm.num_hidden_layers), mean))
    if means:
        means.sort()
        label = name_in_figure(values.load_title(place.load))
        axes.plot([x for x, _ in means], [y for _, y in means], color=colour, label=label)


def _proportional_line(axes: "Axes", values: Values, place: Place, metric: str) -> None:
    """Where the dense model's figure would go if it followed the number of layers alone."""
    dense = values.dense
    start = dense and values.value(Place(place.memory, dense.name, place.load), metric)
    if dense is None or not start:
        return
    least = min(arm.num_hidden_layers for arm in values.arms)
    depths = list(range(least, dense.num_hidden_layers + 1))
    power = -1 if is_rate(metric) else 1
    line = [start * (depth / dense.num_hidden_layers) ** power for depth in depths]
    label = "by the number of layers alone"
    axes.plot(depths, line, color=INK, linestyle=":", linewidth=1, zorder=1, label=label)
