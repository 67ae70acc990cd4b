"""The report's tables of speed-ups: those that are told, those that failed, and all by block."""

from collections.abc import Sequence

from trsp.bench.report_table import Column, Group, Row, Table, merged
from trsp.bench.report_values import (
    Values,
    blocks_of,
    excludes_one,
    has_interval,
    is_negative,
    is_unexplained,
)
from trsp.bench.report_words import (
    DASH,
    MEMORY_TITLES,
    interval,
    metric_title,
    metric_unit,
    number,
    times,
    told_verdict,
)
from trsp.bench.serve_record import Ratio

COLUMNS = (
    Column("load", words=True),
    Column("metric", short=True),
    Column("dense"),
    Column("arm"),
    Column("speed-up"),
    Column("interval"),
    Column("bound"),
    Column("part of possible gain"),
    Column("verdict", words=True),
)


def speed_table(values: Values) -> Table:
    """Speed-ups in the metrics that are told, the noise floor first."""
    groups = []
    for arm in [*(arm for arm in values.arms if arm.role == "control"), *values.pruned]:
        for memory in values.memories:
            title = f"{arm.name}: {arm.num_hidden_layers} layers, {MEMORY_TITLES[memory]}"
            if arm.role == "control":
                title = (
                    f"Noise floor, {MEMORY_TITLES[memory]}. {arm.name} is the dense model against "
                    "itself: smaller differences than these mean nothing"
                )
            chosen = [
                ratio
                for ratio in values.ratios
                if (ratio.arm, ratio.memory) == (arm.name, memory) and values.is_told(ratio)
            ]
            groups.append(Group(title, _speed_rows(values, chosen)))
    return Table(
        f"Speed-up over the dense model. Above 1 the arm is better. {values.record.confidence:.0%} "
        f"interval over each speed-up's valid blocks, {values.record.num_blocks} where all are; "
        "the bound is the most that bytes and operations allow, the possible gain is what it is "
        "above 1",
        COLUMNS,
        tuple(group for group in groups if group.rows),
    )


def negative_table(values: Values) -> Table:
    """Speed-ups that failed to show, by arm, a pruned one's in every metric."""
    groups = []
    for arm in values.arms:
        for memory in values.memories:
            chosen = [
                ratio
                for ratio in values.ratios
                if (ratio.arm, ratio.memory) == (arm.name, memory)
                and _kind(values, ratio) == "negative"
                and (arm.role != "control" or values.is_told(ratio))
            ]
            groups.append(
                Group(f"{arm.name}, {MEMORY_TITLES[memory]}", _speed_rows(values, chosen))
            )
    return Table(
        "Intervals that contain or lie below 1, results that nothing explains, and a control whose "
        "interval misses 1",
        COLUMNS,
        tuple(group for group in groups if group.rows),
    )


def negative_sentence(values: Values) -> str:
    """What stands where no speed-up failed to show; it claims no more than the intervals do."""
    if not values.ratios:
        return "No speed-up was measured."
    if values.record.invalid:
        return "Nothing is claimed: the experiment is invalid."
    pruned = [ratio for ratio in values.ratios if ratio.arm not in values.controls]
    judged = [ratio for ratio in pruned if has_interval(ratio)]
    if not judged:
        return "Nothing is claimed: one block, no interval."
    capped = any(bounded_by_arrivals(values, ratio) for ratio in judged)
    text = "None: every speed-up's interval lies above 1, and none is unexplained."
    if capped:
        text = (
            "None: every speed-up's interval lies above 1, save where arrivals set the pace, and "
            "none is unexplained."
        )
    if len(judged) < len(pruned):
        without = len(pruned) - len(judged)
        text += f" {without} of {len(pruned)} rest on one block, no interval, and are not judged."
    return text


def blocks_table(values: Values) -> Table:
    """Every ratio of the record with the speed-up of each of its blocks."""
    numbers = values.block_numbers()
    groups = []
    for arm in values.arms:
        for memory in values.memories:
            rows = [
                Row(
                    (
                        values.load_title(ratio.load),
                        metric_title(ratio.metric),
                        times(ratio.estimate),
                        interval(ratio),
                        times(ratio.bound),
                        str(len(by_number)),
                        *(times(by_number.get(block)) for block in numbers),
                        told_verdict(ratio),
                    ),
                    _kind(values, ratio),
                )
                for ratio in values.ratios
                if (ratio.arm, ratio.memory) == (arm.name, memory)
                for by_number in [blocks_of(ratio)]
            ]
            if rows:
                title = f"{arm.name}, {MEMORY_TITLES[memory]}"
                groups.append(Group(title, merged(rows)))
    columns = (
        Column("load", words=True),
        Column("metric", short=True),
        *(Column(title) for title in ("speed-up", "interval", "bound", "blocks")),
        *(Column(str(block + 1), group="speed-up of block") for block in numbers),
        Column("verdict", words=True),
    )
    caption = (
        "Every speed-up, block by block: each speed-up's valid blocks, a dash where a block does "
        "not count for it"
    )
    return Table(caption, columns, tuple(groups))


def bounded_by_arrivals(values: Values, ratio: Ratio) -> bool:
    """Whether arrivals cap a figure: no arm of an open loop can serve more than what comes."""
    load = values.load(ratio.load)
    capped = ratio.metric.endswith(("_throughput", "_goodput"))
    return load is not None and load.kind == "open" and capped


def _speed_rows(values: Values, ratios: Sequence[Ratio]) -> tuple[Row, ...]:
    """Rows in the order of the record's loads."""
    order = {load.name: place for place, load in enumerate(values.loads)}
    return merged(
        Row(
            (
                values.load_title(ratio.load),
                metric_title(ratio.metric),
                _with_unit(ratio.dense, ratio.metric),
                _with_unit(ratio.pruned, ratio.metric),
                times(ratio.estimate),
                interval(ratio),
                times(ratio.bound),
                DASH if ratio.achieved_over_bound is None else f"{ratio.achieved_over_bound:.0%}",
                told_verdict(ratio),
            ),
            _kind(values, ratio),
        )
        for ratio in sorted(ratios, key=lambda ratio: order.get(ratio.load, len(order)))
    )


def _kind(values: Values, ratio: Ratio) -> str:
    if ratio.arm in values.controls:
        return "negative" if excludes_one(ratio) else "control"
    if bounded_by_arrivals(values, ratio):
        slower = ratio.high is not None and (ratio.high < 1 or is_unexplained(ratio))
        return "negative" if slower else ""
    return "negative" if is_negative(ratio) else ""


def _with_unit(value: float, metric: str) -> str:
    unit = metric_unit(metric)
    return number(value, 4) + (f" {unit}" if unit in ("ms", "s") else "")
