"""How the report words things: names of metrics and loads, numbers, ratios, intervals."""

import math
import re

from trsp.bench.serve_record import Backend, Load, Memory, Ratio

TIMES = "\u00d7"
DASH = "\u2013"
_LATENCIES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E latency"}
_METRICS = {
    "request_throughput": ("requests/s", "1/s"),
    "output_throughput": ("output tokens/s", "1/s"),
    "total_token_throughput": ("total tokens/s", "1/s"),
    "request_goodput": ("goodput, requests/s", "1/s"),
    "requests_per_second": ("requests/s", "1/s"),
    "tokens_per_second": ("tokens/s", "1/s"),
    "avg_latency_ms": ("mean latency", "ms"),
    "prompt_latency_s": ("prompt latency", "s"),
    "prompt_throughput": ("prompt tokens/s", "1/s"),
    "generation_latency_s": ("generation latency", "s"),
    "generation_throughput": ("generated tokens/s", "1/s"),
}
MEMORY_TITLES: dict[Memory, str] = {
    "equal-kv": "equal KV blocks",
    "equal-memory": "equal GPU memory",
}
BACKEND_TITLES: dict[Backend, str] = {
    "serve": "Server under load",
    "latency": "Offline latency",
    "throughput": "Offline throughput",
    "transformers": "transformers, generate()",
}


def metric_title(metric: str) -> str:
    """A metric's name as people say it; an unknown one as it is."""
    if metric in _METRICS:
        return _METRICS[metric][0]
    found = re.fullmatch(r"(mean|median|std|p\d+)_(ttft|tpot|itl|e2el)_ms", metric)
    if found:
        return f"{found[1]} {_LATENCIES[found[2]]}"
    found = re.fullmatch(r"(p\d+)_latency_ms", metric)
    return f"{found[1]} latency" if found else metric


def metric_unit(metric: str) -> str:
    """`ms`, `s`, `1/s`; empty for a metric without or of unknown unit."""
    if metric in _METRICS:
        return _METRICS[metric][1]
    return "ms" if metric.endswith("_ms") else ""


def is_rate(metric: str) -> bool:
    """Whether a metric is of something per second: more is better."""
    return metric_unit(metric) == "1/s"


def load_title(load: Load) -> str:
    """What a load is, as a heading says it."""
    if load.kind == "closed" and load.concurrency is not None:
        return f"{load.concurrency} in flight"
    if load.kind == "open" and load.share is not None:
        return f"open loop, {load.share:.0%} of dense capacity"
    return load.name


def load_phrase(load: Load) -> str:
    """What a load is, inside a sentence."""
    if load.kind == "closed" and load.concurrency is not None:
        return f"with {load.concurrency} request{'' if load.concurrency == 1 else 's'} in flight"
    if load.kind == "open" and load.share is not None:
        return f"at {load.share:.0%} of the dense model's capacity"
    return f"under the load \u201c{load.name}\u201d"


def memory_sentence(memory: Memory) -> str:
    """What every caption of a figure ends with."""
    return f"Measured at {MEMORY_TITLES[memory]}."


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: thousands grouped, `digits` significant; a dash for None."""
    if value is None:
        return DASH
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 6)}f}"


def times(value: float | None, decimals: int = 3) -> str:
    """A ratio with the sign for times; a dash for None."""
    return DASH if value is None else f"{value:.{decimals}f}{TIMES}"


def interval(ratio: Ratio, decimals: int = 3) -> str:
    """The interval of a ratio, or why there is none."""
    if ratio.low is None or ratio.high is None:
        return "none: one block"
    return f"{ratio.low:.{decimals}f} to {ratio.high:.{decimals}f}"


def billions(count: int) -> str:
    """A number of parameters: 8.03 B, 12.3 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return str(count)
