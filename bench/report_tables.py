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

TOO_FEW = f"n<{MIN_REQUESTS_FOR_P99}"
_LATENCY_GROUPS = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2el", "E2E"))
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
    metric = values.main_metric()
    columns = [
        Column("arm", words=True),
        Column("layers"),
        Column("parameters"),
        Column("on disk"),
        Column("weights in memory"),
        Column("KV bytes per token"),
        Column("KV tokens"),
        Column("load time"),
        *(
            Column(title, group=f"perplexity on {text}")
            for text in texts
            for title in ("value", "beside dense")
        ),
        *(
            Column(load_title(load), group=f"speed-up in {metric_title(metric)}")
            for load in values.main_loads()
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
        for load in values.main_loads():
            ratio = values.ratio(Place(told_memory(values), arm.name, load.name), metric)
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
    caption = f"Latency at {MEMORY_TITLES[memory]}: geometric mean over the valid cells"
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
            number(sum(cell.failed for cell in found)),
            _range([cell.client_cpu_share for cell in found], digits=2),
            _range([cell.num_preemptions for cell in found]),
        ]

    tail = ("requests done", "failed", "client CPU, cores", "preemptions")
    columns = [Column("arm", words=True), Column("cells"), *(Column(t) for t in (*titles, *tail))]
    workload = values.record.workload
    caption = (
        f"Throughput at {MEMORY_TITLES[memory]}. Goodput counts requests with TTFT up to "
        f"{number(workload.ttft_slo_ms, 4)} ms and TPOT up to {number(workload.tpot_slo_ms, 4)} ms"
    )
    return Table(caption, tuple(columns), _by_load(values, memory, cells))


def offline_table(values: Values, memory: Memory) -> Table:
    """Every metric of a backend without a server, by arm."""
    metrics = list(dict.fromkeys(name for cell in values.record.cells for name in cell.metrics))

    def figures(place: Place, load: Load) -> list[str]:
        return [_figure(values, place, load, metric) for metric in metrics]

    titles = [
        metric_title(metric) + (f", {metric_unit(metric)}" if metric_unit(metric) != "1/s" else "")
        for metric in metrics
    ]
    columns = [Column("arm", words=True), Column("cells"), *(Column(title) for title in titles)]
    caption = f"What was measured at {MEMORY_TITLES[memory]}: geometric mean over the valid cells"
    return Table(caption, tuple(columns), _by_load(values, memory, figures))


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
                _range([start.weights_gib for start in starts], unit=" GiB"),
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
    values: Values, memory: Memory, figures: Callable[[Place, Load], list[str]]
) -> tuple[Group, ...]:
    """A group of rows per load: each arm's valid cells of all, then its figures."""
    groups = []
    for load in values.loads:
        rows = []
        for arm in values.arms:
            place = Place(memory, arm.name, load.name)
            num_all = values.num_cells(place)
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


def _range(found: Sequence[float | None], *, digits: int = 3, unit: str = "") -> str:
    """The least and the most of figures, or the one they all are; a dash where one is missing."""
    known = [value for value in found if value is not None]
    if not known or len(known) < len(found):
        return DASH
    ends = dict.fromkeys(number(value, digits) for value in (min(known), max(known)))
    return " to ".join(ends) + unit


def _kv_tokens(values: Values, memory: Memory, arm: str) -> list[int]:
    return [
        start.kv_cache_tokens
        for start in values.record.starts
        if (start.arm, start.memory) == (arm, memory) and start.kv_cache_tokens is not None
    ]
