"""A speed target in words: a metric of vLLM's serving client, and the limit it has to keep."""

import re
from dataclasses import dataclass

from trsp.bench.speed_analysis import is_cost
from trsp.pruner.errors import UserError

_TARGET = re.compile(r"\s*(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<limit>[0-9.eE+-]+)\s*")
# What vLLM's serving client measures; a p99 of fewer requests than these is not one.
_METRIC = re.compile(
    r"(mean|median|p90|p99)_(ttft|tpot|itl|e2el)_ms"
    r"|(request|output|total_token)_throughput|request_goodput"
)
_MIN_REQUESTS_FOR_P99 = 1000


@dataclass(frozen=True)
class Target:
    """`metric` of vLLM's client must be at most (latencies) or at least (throughputs) `limit`."""

    metric: str
    limit: float

    @property
    def cost_limit(self) -> float:
        """The most that the cost may be: milliseconds, or seconds for one of a throughput."""
        return self.limit if is_cost(self.metric) else 1 / self.limit

    def shown(self, cost: float) -> str:
        """A cost in the metric's own unit."""
        return f"{self.metric} {cost if is_cost(self.metric) else 1 / cost:.4g}"

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if is_cost(self.metric) else '>='}{self.limit:g}"


def parse_target(text: str) -> Target:
    """`median_tpot_ms<=20` or `output_throughput>=500`.

    Raises:
        UserError: not of that form, not a positive number, or the sign asks for the wrong side.
    """
    match = _TARGET.fullmatch(text)
    try:
        limit = float(match["limit"]) if match else 0.0
    except ValueError:
        limit = 0.0
    if match is None or not 0 < limit < float("inf"):
        raise UserError(
            f"--slo {text!r}: write a metric of vLLM's client, <= or >= and a positive number, as "
            "in 'median_tpot_ms<=20' or 'output_throughput>=500'"
        )
    target = Target(match["metric"], limit)
    if (match["sign"] == "<=") != is_cost(target.metric):
        wanted = "at most (<=)" if is_cost(target.metric) else "at least (>=)"
        raise UserError(f"--slo {text!r}: {target.metric} is to be {wanted} a limit")
    return target


def require_measurable(target: Target, num_requests: int | None) -> None:
    """Refuse a metric that hours of measuring would not bring.   Raises: UserError."""
    if _METRIC.fullmatch(target.metric) is None:
        raise UserError(
            f"--slo {target}: vLLM's client measures no {target.metric}; choose median_ttft_ms, "
            "median_tpot_ms, median_itl_ms, median_e2el_ms (or mean_, p90_, p99_), "
            "request_throughput, output_throughput, total_token_throughput, request_goodput"
        )
    if target.metric.startswith("p99_") and (num_requests or 0) < _MIN_REQUESTS_FOR_P99:
        raise UserError(f"--slo {target}: a p99 needs --num-requests {_MIN_REQUESTS_FOR_P99}")
