"""The report's tables of figures: quality, latency, throughput and memory of every arm."""

from collections.abc import Callable, Sequence

from trsp.bench.report_table import Column, Group, Row, Table, merged, one_group
from trsp.bench.report_values import MIN_REQUESTS_FOR_P99, Place, Values, is_too_rare, told_memory
from trsp.bench.report_words import (
    DASH,
    MEMORY_TITLES,
    billions,
    load_title,
    metric_title,
    metric_unit,
    number,
    times,
)
from trsp.bench.serve_record import Arm, Load, Memory
from trsp.pruner.durable import format_bytes

NOT_SAID = "not said"
TOO_FEW = f"n<{MIN_REQUESTS_FOR_P99}"
_LATENCY_GROUPS = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E"))
_OVER = (
    "geometric mean over the cells that count, those of blocks in which the arm and the dense one "
    "are valid"
)
_STATISTICS = ("mean", "median", "p90", "p99")


def quality_table(values: Values) -> Table:
    """Size, quality and load time of every arm. A perplexity without a ratio does not compare."""
    texts = list(
        dict.fromkeys(
            quality.text
            for arm in values.arms
            if arm.weights == "checkpoint"
            for quality in arm.quality
        )
    )
    told = values.told()
    columns = [
        Column("arm", words=True),
        Column("layers"),
        Column("parameters"),
        Column("on disk"),
        Column("weights, computed"),
        Column("KV bytes per token"),
        Column("KV tokens"),
        Column("load time"),
        *(
            Column(title, group=f"perplexity on {text}")
            for text in texts
            for title in ("value", "beside dense")
        ),
        *(
            Column(load_title(one.load), group=f"speed-up in {metric_title(one.metric)}")
            for one in told
        ),
    ]
    rows = []
    for arm in values.arms:
        starts = [start for start in values.record.starts if start.arm == arm.name]
        equal = [start for start in starts if start.memory == "equal-kv"] or starts
        cells = [
            arm.name,
            str(arm.num_hidden_layers),
            billions(arm.num_parameters),
            DASH if arm.disk_bytes is None else format_bytes(arm.disk_bytes),
            format_bytes(arm.weight_bytes),
            f"{arm.kv_bytes_per_token:,}",
            _range([start.kv_cache_tokens for start in equal]),
            _range([start.load_seconds for start in starts], unit=" s"),
        ]
        for text in texts:
            cells += _perplexity(values, arm, text)
        for one in told:
            place = Place(told_memory(values), arm.name, one.load.name)
            ratio = values.ratio(place, one.metric)
            cells.append(DASH if ratio is None else times(ratio.estimate))
        rows.append(Row(tuple(cells), arm.role))
    return Table(
        "What each model weighs, how well it reads and how fast it is",
        tuple(columns),
        one_group(rows),
    )


def latency_table(values: Values, memory: Memory) -> Table:
    """TTFT, TPOT, ITL and end-to-end latency of each arm under each load, in milliseconds."""
    columns = [Column("arm", words=True), Column("cells")]
    for _, title in _LATENCY_GROUPS:
        columns += [Column(statistic, group=f"{title}, ms") for statistic in _STATISTICS]

    def figures(place: Place, load: Load) -> list[str]:
        return [
            _figure(values, place, load, f"{statistic}_{name}_ms")
            for name, _ in _LATENCY_GROUPS
            for statistic in _STATISTICS
        ]

    groups = _by_load(values, memory, figures)
    caption = f"Latency at {MEMORY_TITLES[memory]}: {_OVER}"
    return Table(caption, tuple(columns), groups)


def throughput_table(values: Values, memory: Memory) -> Table:
    """Requests, tokens and goodput of each arm under each load, and how the client fared."""
    metrics = (
        "request_throughput",
        "output_throughput",
        "total_token_throughput",
        "request_goodput",
    )
    titles = ("requests/s", "output tokens/s", "total tokens/s", "goodput, requests/s")

    def cells(place: Place, load: Load) -> list[str]:
        found = values.cells(place)
        return [
            *(number(values.value(place, metric), 4) for metric in metrics),
            number(sum(cell.completed for cell in found)),
            number(sum(cell.failed for cell in values.all_cells(place))),
            _range([cell.client_cpu_share for cell in found], digits=2),
            _range([cell.num_preemptions for cell in found]),
        ]

    tail = ("requests done", "failed in all cells", "client CPU, cores", "preemptions")
    columns = [Column("arm", words=True), Column("cells"), *(Column(t) for t in (*titles, *tail))]
    workload = values.record.workload
    caption = (
        f"Throughput at {MEMORY_TITLES[memory]}. Goodput counts requests with TTFT up to "
        f"{number(workload.ttft_slo_ms, 4)} ms and TPOT up to {number(workload.tpot_slo_ms, 4)} ms"
    )
    return Table(caption, tuple(columns), _by_load(values, memory, cells))


def offline_tables(values: Values, memory: Memory) -> list[Table]:
    """Every metric of a backend without a server, by arm; a table for loads of the same metrics."""
    by_metrics: dict[tuple[str, ...], list[Load]] = {}
    for load in values.loads:
        cells = [cell for cell in values.record.cells if cell.load == load.name]
        metrics = tuple(dict.fromkeys(name for cell in cells for name in cell.metrics))
        by_metrics.setdefault(metrics, []).append(load)
    return [_offline_table(values, memory, metrics, loads) for metrics, loads in by_metrics.items()]


def _offline_table(
    values: Values, memory: Memory, metrics: Sequence[str], loads: Sequence[Load]
) -> Table:
    def figures(place: Place, load: Load) -> list[str]:
        return [_figure(values, place, load, metric) for metric in metrics]

    titles = [
        metric_title(metric) + (f", {metric_unit(metric)}" if metric_unit(metric) != "1/s" else "")
        for metric in metrics
    ]
    columns = [Column("arm", words=True), Column("cells"), *(Column(title) for title in titles)]
    caption = f"{', '.join(map(load_title, loads))}: {_OVER}"
    return Table(caption, tuple(columns), _by_load(values, memory, figures, loads))


def memory_table(values: Values) -> Table:
    """What the engine says of its weights and the room in its KV cache, by memory and arm."""
    rows = []
    for memory in values.memories:
        dense = values.dense
        base = _kv_tokens(values, memory, dense.name if dense else "")
        for arm in values.arms:
            starts = [
                start
                for start in values.record.starts
                if (start.arm, start.memory) == (arm.name, memory)
            ]
            if not starts:
                continue
            tokens = _kv_tokens(values, memory, arm.name)
            share = times(min(tokens) / max(base), 2) if tokens and any(base) else DASH
            cells = (
                MEMORY_TITLES[memory],
                arm.name,
                _range([start.weights_gib for start in starts], unit=" GiB", missing=NOT_SAID),
                _range([start.num_kv_blocks for start in starts]),
                _range([start.kv_cache_tokens for start in starts]),
                share,
                _range([start.load_seconds for start in starts], unit=" s"),
                str(len(starts)),
            )
            rows.append(Row(cells, arm.role))
    titles = ("weights", "KV blocks", "KV tokens", "room beside dense", "load time", "starts")
    return Table(
        "Memory as the engine reports it; a range where its starts differ",
        (
            Column("memory", words=True),
            Column("arm", words=True),
            *(Column(title) for title in titles),
        ),
        one_group(merged(rows)),
    )


def _by_load(
    values: Values,
    memory: Memory,
    figures: Callable[[Place, Load], list[str]],
    loads: Sequence[Load] | None = None,
) -> tuple[Group, ...]:
    """A group of rows per load: each arm's cells that count of all, then its figures."""
    groups = []
    for load in values.loads if loads is None else loads:
        rows = []
        for arm in values.arms:
            place = Place(memory, arm.name, load.name)
            num_all = len(values.all_cells(place))
            if num_all:
                valid = f"{len(values.cells(place))} of {num_all}"
                rows.append(Row((arm.name, valid, *figures(place, load)), arm.role))
        if rows:
            groups.append(Group(f"{load_title(load)}, {load.num_requests:,} requests", tuple(rows)))
    return tuple(groups)


def _figure(values: Values, place: Place, load: Load, metric: str) -> str:
    if is_too_rare(metric, load):
        return TOO_FEW
    return number(values.value(place, metric), 4)


def _perplexity(values: Values, arm: Arm, text: str) -> tuple[str, str]:
    """The value and its ratio to the dense one's; random weights have neither."""
    if arm.weights == "dummy":
        return "random weights", DASH
    for quality in arm.quality:
        if quality.text == text:
            dense = values.same_protocol(quality)
            ratio = "other protocol" if dense is None else times(quality.perplexity / dense)
            return number(quality.perplexity, 4), ratio
    return DASH, DASH


def _range(
    found: Sequence[float | None], *, digits: int = 3, unit: str = "", missing: str = DASH
) -> str:
    """The least and the most of figures, or the one they all are; `missing` where one is."""
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return missing
    ends = dict.fromkeys(number(value, digits) for value in (min(known), max(known)))
    return " to ".join(ends) + unit


def _kv_tokens(values: Values, memory: Memory, arm: str) -> list[int]:
    return [
        start.kv_cache_tokens
        for start in values.record.starts
        if (start.arm, start.memory) == (arm, memory) and start.kv_cache_tokens is not None
    ]
