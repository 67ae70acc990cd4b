"""The report's figures of a comparison: quality against depth, and against compute.

A table has every method; a figure of thirty lines has none. So the named families are drawn, the
best of each, and lines that are left go to the next best.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trsp.bench.compare_methods import FOLDS, LAYER_CHOICES, REFERENCE
from trsp.bench.compare_record import CompareRecord
from trsp.bench.compare_summary import Row, TextSummary
from trsp.bench.report_canvas import CannotDraw
from trsp.bench.report_style import INK, WARNING, Plot, figure_style, name_in_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# TRSP's first, the floor's last: Okabe and Ito's, as everywhere in the report.
_TRSP = ("#0072b2", "s")
_RANDOM = ("#8a929c", "D")
_OTHERS = (
    ("#d55e00", "^"),
    ("#009e73", "v"),
    ("#cc79a7", "P"),
    ("#e69f00", "X"),
    ("#56b4e9", "h"),
)
_MOST_LINES = 2 + len(_OTHERS)
# Perplexities further apart than this hide the small ones unless the axis is logarithmic.
_WIDE_SPAN = 3.0
# Below this share of the largest cost a logarithmic axis would show little but emptiness.
_LEAST_COST = 1e-3
# Other methods that lose so many times what the drawn ones lose are told of, not shown.
_FRAME = 2.0


@dataclass(frozen=True)
class Drawn:
    """A method with its colour, marker and name in the legend; `role`: why it is drawn."""

    method: str
    label: str
    role: str
    colour: str
    marker: str
    trained: bool


def draw_comparison(record: CompareRecord, rows: Sequence[Row]) -> tuple[list[Plot], list[str]]:
    """Draw what the record has the numbers for.

    Returns:
        the figures, and one line for each that could not be drawn.
    """
    plots, missing = [], []
    drawn = choose_methods(record, rows)
    with figure_style():
        try:
            plots.append(_draw_depth(record, rows, drawn))
        except CannotDraw as reason:
            missing.append(f"The figure \u201cQuality against depth\u201d {reason}")
        for number, text in enumerate(record.protocols, 1):
            try:
                plots.append(_draw_compute(record, rows, drawn, text, number))
            except CannotDraw as reason:
                told = f"The figure \u201cQuality against compute, {text}\u201d {reason}"
                missing.append(told)
    return plots, missing


def choose_methods(record: CompareRecord, rows: Sequence[Row]) -> list[Drawn]:
    """The methods that are drawn: all where they are few, else the best of each family.

    The best has the lowest mean log perplexity beside the dense model's over depths and texts;
    those that lack a depth come after those that do not.
    """
    scores = _scores(record, rows)
    ranked = sorted(scores, key=lambda name: scores[name])
    chosen: dict[str, str] = {}
    for role, members in _families(ranked):
        best = next((name for name in members if name not in chosen), None)
        if best is not None:
            chosen[best] = role
    # The floor keeps its grey: the colours of the others are for the others.
    room = _MOST_LINES - (REFERENCE not in chosen) - ("random" not in chosen)
    for name in ranked:
        if len(chosen) < room:
            chosen.setdefault(name, "next best")
    labels = {row.method: row.label for row in rows}
    looks = iter(_OTHERS)
    drawn: list[Drawn] = []
    used: set[str] = set()
    for method, role in chosen.items():
        colour, marker = {REFERENCE: _TRSP, "random": _RANDOM}.get(method) or next(looks)
        label = _unlike(name_in_figure(labels[method], longest=40), used)
        drawn.append(Drawn(method, label, role, colour, marker, "+" in method))
    return drawn


def _families(ranked: Sequence[str]) -> list[tuple[str, list[str]]]:
    """The families that are always drawn, the best member of each first."""
    trained = [name for name in ranked if "+" in name and name != REFERENCE]
    paper = [name for name in trained if name.startswith("paper_")]
    tuned = [name for name in trained if name not in paper]
    return [
        ("the product", [name for name in ranked if name == REFERENCE]),
        (
            "the best baseline without training",
            [name for name in ranked if name in (*LAYER_CHOICES, *FOLDS) and name != "random"],
        ),
        (
            "TRSP's selection alone",
            [name for name in ranked if name == REFERENCE.partition("+")[0]],
        ),
        ("the best at the same tokens", [name for name in tuned if "@" not in name]),
        ("the best at the same FLOPs", [name for name in tuned if name.endswith("@flops")]),
        ("the best of the paper's mode", paper),
        ("chance", [name for name in ranked if name == "random"]),
    ]


def _scores(record: CompareRecord, rows: Sequence[Row]) -> dict[str, tuple[int, float]]:
    """Depths that a method lacks, then its mean log ratio; the smaller the better."""
    logs: dict[str, list[float]] = {}
    for row in rows:
        for of in (row.texts or {}).values():
            logs.setdefault(row.method, []).append(math.log(of.to_dense.estimate))
    wanted = len(record.num_removed) * len(record.protocols)
    return {name: (wanted - len(all_), sum(all_) / len(all_)) for name, all_ in logs.items()}


def _draw_depth(record: CompareRecord, rows: Sequence[Row], drawn: Sequence[Drawn]) -> Plot:
    """Perplexity beside the dense model's against layers removed, a panel for each text."""
    depths = sorted({row.num_removed for row in rows if row.texts})
    if len(depths) < 2:
        raise CannotDraw("needs two depths with perplexities")
    figure, panels = _new_figure(record, len(record.protocols))
    # Points of one depth stand side by side, or intervals would hide each other.
    apart = 0.05 * min(b - a for a, b in itertools.pairwise(depths))
    for axes, text in zip(panels, record.protocols, strict=True):
        seen: dict[str, list[TextSummary]] = {}
        for place, one in enumerate(drawn):
            shift = apart * (place - (len(drawn) - 1) / 2)
            points = _points(rows, one.method, text)
            seen[one.method] = [of for _, of in points]
            _line(axes, one, [row.num_removed + shift for row, _ in points], points)
        _fit_quality(axes, _without_far_chance(seen))
        axes.set_title(name_in_figure(text, longest=40))
        axes.set_xlabel(f"layers gone, of {record.dense.num_hidden_layers}")
        axes.set_xticks(depths)
    panels[0].set_ylabel("perplexity, \u00d7 the dense model's")
    _legend(figure, panels)
    return Plot(
        "depth",
        "Quality against depth",
        "Lower is better; the line at 1 is the dense model. Dashed lines are methods without "
        "training. Points of one depth stand side by side to be seen; where chance leaves the "
        f"frame, the table has it. {_bars(record)} {_chosen(rows, drawn)}",
        figure,
    )


def _draw_compute(
    record: CompareRecord, rows: Sequence[Row], drawn: Sequence[Drawn], text: str, number: int
) -> Plot:
    """Perplexity beside the dense model's against operations, a panel for each depth."""
    depths = [
        count
        for count in record.num_removed
        if any(row.texts and row.num_removed == count for row in rows)
    ]
    if not depths:
        raise CannotDraw("needs perplexities")
    figure, panels = _new_figure(record, len(depths))
    names = {one.method for one in drawn}
    for axes, count in zip(panels, depths, strict=True):
        here = [row for row in rows if row.num_removed == count and row.texts is not None]
        seen = []
        for one in drawn:
            points = _points(here, one.method, text)
            seen += [of for _, of in points]
            _line(axes, one, [row.flops / 1e12 for row, _ in points], points, joined=False)
        top = 1 + _FRAME * max([0.0, *(of.to_dense.estimate - 1 for of in seen)])
        others = [pair for row in here if row.method not in names
                  for pair in _points([row], row.method, text)]  # fmt: skip
        shown = [pair for pair in others if pair[1].to_dense.estimate <= top]
        if shown:
            axes.plot(
                [row.flops / 1e12 for row, _ in shown],
                [of.to_dense.estimate for _, of in shown],
                color="#b6bec8",
                marker="o",
                markersize=5,
                linestyle="",
                zorder=1.5,
                label="the others, by name in the table",
            )
        above = len(others) - len(shown)
        _fit_quality(axes, [*seen, *(of for _, of in shown)])
        _fit_cost(axes, [row.flops / 1e12 for row in here])
        gone = f"{count} of {record.dense.num_hidden_layers} layers gone"
        axes.set_title(f"{gone}; {above} more above the frame" if above else gone)
        axes.set_xlabel("TFLOP, choosing and training")
    for axes in panels[::2]:
        axes.set_ylabel("perplexity, \u00d7 the dense model's")
    _legend(figure, panels)
    return Plot(
        f"compute-{number}",
        f"Quality against compute, {text}",
        "Down is better, left is cheaper; the line at 1 is the dense model. Hollow points are "
        f"methods without training. {_bars(record)} {_chosen(rows, drawn)}",
        figure,
    )


def _without_far_chance(seen: dict[str, list[TextSummary]]) -> list[TextSummary]:
    """What the frame is for: all drawn, but for chance where it would flatten the rest."""
    others = [of for method, found in seen.items() if method != "random" for of in found]
    top = 1 + _FRAME * max([0.0, *(of.to_dense.estimate - 1 for of in others)])
    near = [of for of in seen.get("random", ()) if of.to_dense.estimate <= top or not others]
    return [*others, *near]


def _points(rows: Sequence[Row], method: str, text: str) -> list[tuple[Row, TextSummary]]:
    return [(row, row.texts[text]) for row in rows if row.method == method and row.texts]


def _line(
    axes: "Axes",
    one: Drawn,
    places: Sequence[float],
    points: Sequence[tuple[Row, TextSummary]],
    *,
    joined: bool = True,
) -> None:
    """A method's points with the intervals that there are."""
    if not points:
        return
    ratios = [of.to_dense for _, of in points]
    for place, ratio in zip(places, ratios, strict=True):
        if ratio.low is not None and ratio.high is not None:
            bars = [[max(0.0, ratio.estimate - ratio.low)], [max(0.0, ratio.high - ratio.estimate)]]
            axes.errorbar([place], [ratio.estimate], yerr=bars, color=one.colour, capsize=3,
                          linewidth=1.1, linestyle="", zorder=2.5)  # fmt: skip
    axes.plot(
        places,
        [ratio.estimate for ratio in ratios],
        color=one.colour,
        marker=one.marker,
        markerfacecolor=one.colour if one.trained else "white",
        linestyle="" if not joined else "-" if one.trained else "--",
        linewidth=2.4 if one.method == REFERENCE else 1.5,
        zorder=3.5 if one.method == REFERENCE else 3,
        label=one.label,
    )


def _new_figure(record: CompareRecord, count: int) -> tuple["Figure", list["Axes"]]:
    """Two panels beside each other at most, under what limits their numbers."""
    from matplotlib.figure import Figure

    wide, high = min(2, count), math.ceil(count / 2)
    figure = Figure(figsize=(5.6 * wide + (1.0 if wide == 1 else 0), 3.5 * high + 1.0),
                    layout="constrained")  # fmt: skip
    grid = figure.subplots(high, wide, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    limits = [] if record.complete else ["INCOMPLETE"]
    limits += ["one seed"] if len(record.seeds) == 1 else []
    if limits:
        figure.suptitle("; ".join(limits), x=0.99, ha="right", fontsize=9, color=WARNING)
    return figure, grid[:count]


def _legend(figure: "Figure", panels: Sequence["Axes"]) -> None:
    """The legend under all panels, each name once, in as many columns as the longest fits."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    if named:
        # Inches, of a wide letter and of the sample of a line with its gaps.
        needed = 0.085 * max(map(len, named)) + 0.6
        columns = max(1, min(4, int(figure.get_size_inches()[0] / needed)))
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def _fit_quality(axes: "Axes", seen: Sequence[TextSummary]) -> None:
    """Frame the means, not intervals of any length; a logarithmic axis where they span much."""
    axes.axhline(1, color=INK, linewidth=1, zorder=1)
    means = [1.0, *(of.to_dense.estimate for of in seen)]
    ends = [end for of in seen for end in (of.to_dense.low, of.to_dense.high) if end is not None]
    low, high = min(means), max(means)
    # An interval of two seeds can be a hundred times as long as what it is about.
    reach = max(0.05, math.log(high / low))
    bottom = max(min([*ends, low]), low * math.exp(-0.5 * reach))
    top = min(max([*ends, high]), high * math.exp(0.5 * reach))
    edge = (top / bottom) ** 0.06
    if high > _WIDE_SPAN * low:
        axes.set_yscale("log")
        _set_ticks(axes.yaxis, _log_ticks(bottom, top))
    axes.set_ylim(bottom / edge, top * edge)


def _fit_cost(axes: "Axes", costs: Sequence[float]) -> None:
    """A logarithmic axis, linear to 0 below a thousandth of the largest cost."""
    most = max(costs, default=0.0)
    if most <= 0:
        return
    least = min(cost for cost in costs if cost >= _LEAST_COST * most)
    ticks = _log_ticks(least / 1.3, most * 1.3)
    if least == min(costs):
        axes.set_xscale("log")
        axes.set_xlim(least / 1.3, most * 1.3)
    else:
        axes.set_xscale("symlog", linthresh=least * 0.8, linscale=0.25)
        axes.set_xlim(-0.2 * least, most * 1.3)
        ticks = [0.0, *ticks]
    _set_ticks(axes.xaxis, ticks)


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within the ends, as many as can be read."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, (last - first) // 6)
    subs = (1, 2, 5) if last - first < 4 else (1,)
    found = [sub * 10.0**power for power in range(first, last + 1, step) for sub in subs]
    found = [tick for tick in found if low <= tick <= high]
    if len(found) > 2:
        return found
    from matplotlib.ticker import MaxNLocator

    steps = MaxNLocator(nbins=4).tick_values(low, high)
    return [float(tick) for tick in steps if low <= tick <= high]


def _set_ticks(axis: "Axis", ticks: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _unlike(label: str, used: set[str]) -> str:
    """A label that no other line has: the legend shows each label once."""
    number, free = 1, label
    while free in used:
        number += 1
        free = f"{label} ({number})"
    used.add(free)
    return free


def _bars(record: CompareRecord) -> str:
    if len(record.seeds) == 1:
        return "One seed: there are no intervals."
    return (
        f"Bars are 95% intervals over {len(record.seeds)} seeds; one that leaves the frame has its "
        "ends in the table."
    )


def _chosen(rows: Sequence[Row], drawn: Sequence[Drawn]) -> str:
    methods = {row.method for row in rows}
    if len(drawn) == len(methods):
        return "Every method is drawn."
    told = "; ".join(f"{one.label}: {one.role}" for one in drawn)
    return f"{len(drawn)} of {len(methods)} methods are drawn, the tables have all. {told}."
