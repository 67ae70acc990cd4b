"""How the report words things: names of metrics and loads, numbers, ratios, intervals."""

import math
import re

from trsp.bench.serve_record import Backend, Load, Memory, Ratio

TIMES = "\u00d7"
DASH = "\u2013"
NO_INTERVAL = "one block, no interval"
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
    if is_batch(load):
        return f"batch of {load.concurrency}"
    return load.name


def is_batch(load: Load) -> bool:
    """Whether a load is one batch of a size and no more: its name says nothing else."""
    return load.kind == "batch" and load.name == f"batch {load.concurrency}"


def load_phrase(load: Load) -> str:
    """What a load is, inside a sentence."""
    if load.kind == "closed" and load.concurrency is not None:
        return f"with {load.concurrency} request{'' if load.concurrency == 1 else 's'} in flight"
    if load.kind == "open" and load.share is not None:
        return f"at {load.share:.0%} of the dense model's capacity"
    if is_batch(load):
        return f"in batches of {load.concurrency}"
    return f"under the load \u201c{load.name}\u201d"


def memory_sentence(memory: Memory, backend: Backend) -> str:
    """What every caption of a figure ends with; transformers has no KV cache of a set size."""
    if backend == "transformers":
        return "Measured with the KV cache that each batch needs."
    return f"Measured at {MEMORY_TITLES[memory]}."


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: thousands grouped, `digits` significant; a dash for None."""
    if value is None:
        return DASH
    if value == 0 or isinstance(value, int):
        return f"{value:,.0f}"
    # 999.96 with four digits is 1,000, not 1,000.0.
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{min(decimals, 6)}f}"


def times(value: float | None, decimals: int = 3) -> str:
    """A ratio with the sign for times; a dash for None."""
    return DASH if value is None else f"{value:.{decimals}f}{TIMES}"


def interval(ratio: Ratio, decimals: int = 3) -> str:
    """The interval of a ratio, or why there is none."""
    if ratio.low is None or ratio.high is None:
        return NO_INTERVAL
    return f"{ratio.low:.{decimals}f} to {ratio.high:.{decimals}f}"


def told_verdict(ratio: Ratio) -> str:
    """The verdict of a speed-up; of one block there is none."""
    return NO_INTERVAL if ratio.low is None or ratio.high is None else ratio.verdict


def billions(count: int) -> str:
    """A number of parameters: 8.03 B, 12.3 M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{number(count / size)} {unit}"
    return str(count)
