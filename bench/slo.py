"""How many layers must go for a speed target: a line through measured depths, then the proof.

Cost = a + b * layers, where cost is a latency, or the time of one token or request (1 / throughput)
at a given number of requests in flight. The depth that the line names is measured; where it misses
the target, it joins the line and the next one is tried.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trsp.bench.record import environment
from trsp.bench.serve import run_serve
from trsp.bench.serve_design import ServeOptions
from trsp.bench.serve_record import ServeRecord, read_serve_record
from trsp.bench.speed_analysis import is_cost
from trsp.bench.statistics import Interval, LinearFit, linear_fit, ratio_interval
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.config_surgery import num_hidden_layers
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError

MAX_ROUNDS = 3
_TARGET = re.compile(r"\s*(?P<metric>\w+)\s*(?P<sign><=|>=)\s*(?P<limit>[0-9.eE+-]+)\s*")
# Halfway through the layers quality has broken in every published comparison of depth pruning.
_BREAKS = 0.5


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


class Depth(BaseModel):
    """What one depth costs: measured, predicted, or both; in the unit of the target's metric."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    num_hidden_layers: Annotated[int, Field(ge=1)]
    predicted: float | None
    measured: float | None
    low: float | None
    high: float | None


class SloPlan(BaseModel):
    """The answer. `num_to_remove` None: no depth meets the target; `best` is the closest one.

    Attributes:
        intercept, slope: of the cost, in ms or in seconds for one token or request.
        relative_residual: what the line misses the measured depths by; None with two.
        verified: the named depth was measured and its whole interval meets the target; None: it
            was not measured.
        remarks: one line each, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Literal[1] = 1
    kind: Literal["slo"] = "slo"
    model: str
    target: str
    concurrency: int
    num_hidden_layers: int
    num_to_remove: int | None
    intercept: float
    slope: float
    relative_residual: float | None
    depths: list[Depth]
    best: Depth
    verified: bool | None
    remarks: list[str]
    records: list[str]
    environment: dict[str, Any]

    def lines(self) -> list[str]:
        """The answer for people."""
        lines = [f"{self.model}: {self.num_hidden_layers} layers; target {self.target} at "
                 f"{self.concurrency} in flight"]  # fmt: skip
        for depth in self.depths:
            told = "not measured"
            if depth.measured is not None:
                told = f"measured {depth.measured:.4g}"
                if depth.low is not None:
                    told += f" ({depth.low:.4g} to {depth.high:.4g})"
            predicted = "-" if depth.predicted is None else f"{depth.predicted:.4g}"
            lines.append(f"  {depth.num_hidden_layers:>3} layers: {told}, line {predicted}")
        lines += self.remarks
        if self.num_to_remove is None:
            lines.append(f"NO: no number of layers meets {self.target}")
        elif self.num_to_remove == 0:
            lines.append("the dense model meets the target: nothing has to go")
        else:
            proof = {True: "measured, met", False: "measured, MISSED", None: "not measured"}
            lines.append(
                f"remove {self.num_to_remove} layers, {proof[self.verified]}; next: "
                f"trsp prune MODEL --layers {self.num_to_remove} --out DIR --data TEXT"
            )
        return lines


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


def plan_for_slo(
    model: Path,
    target: Target,
    *,
    concurrency: int,
    records: Sequence[Path],
    options: ServeOptions,
    verify: bool,
    tell: Callable[[str], None],
) -> SloPlan:
    """Answer how many layers must go, from records or from measuring, and verify the answer.

    Args:
        model: the dense model's folder; its config is enough, speed does not depend on weights.
        records: of `trsp bench serve` on this model; none: three depths are measured first.
        options: how to measure; `out` is the folder for the experiments.
    Raises:
        UserError: records of another depth, load or metric; fewer than two depths.
    """
    layers = num_hidden_layers(read_json_object(model / "config.json", max_bytes=2**22))
    if layers < 4:
        raise UserError(f"{model}: has {layers} layers; a line needs at least 4 to choose from")
    found = [read_serve_record(path) for path in records]
    names = [str(path) for path in records]

    def measure(removals: Sequence[int], folder: str) -> None:
        experiment = replace(
            options,
            dense=model,
            remove=tuple(removals),
            load_format="dummy",
            concurrencies=(concurrency,),
            shares=(),
            memories=("equal-kv",),
            out=options.out / folder,
            resume=(options.out / folder / "plan.json").exists(),
        )
        record = run_serve(experiment, tell=tell)
        found.append(record)
        names.append(str(experiment.out / "record.json"))

    if not found:
        measure((layers // 4, layers // 2), "depths")
    remarks: list[str] = []
    costs = _costs(found, target, concurrency, layers)
    fit = linear_fit(list(costs), _paired(costs))
    depth, verified = fit.layers_for(target.cost_limit), None
    for attempt in range(MAX_ROUNDS if verify else 0):
        if depth is None:
            break
        if depth not in costs:
            measure((layers - depth,), f"verify-{attempt + 1}")
            costs = _costs(found, target, concurrency, layers)
            fit = linear_fit(list(costs), _paired(costs))
        interval = _mean(costs[depth])
        verified = interval.high is not None and interval.high <= target.cost_limit
        if verified or attempt + 1 == MAX_ROUNDS:
            break
        remarks.append(
            f"{depth} layers were named by the line and measured "
            f"{target.shown(interval.estimate)}: not all of the interval meets the target"
        )
        named = fit.layers_for(target.cost_limit)
        depth = None if named is None or depth == 1 else min(named, depth - 1)
    return _answer(model, target, concurrency, layers, fit, depth, costs, verified, remarks, names)


def _answer(
    model: Path,
    target: Target,
    concurrency: int,
    layers: int,
    fit: LinearFit,
    depth: int | None,
    costs: dict[int, list[float]],
    verified: bool | None,
    remarks: list[str],
    names: list[str],
) -> SloPlan:
    best = 1 if depth is None else depth
    if depth is None:
        remarks.append(
            f"NO: one layer alone would be at {target.shown(fit.predict(1).estimate)} by this "
            "line, and what does not depend on the layers takes the rest"
        )
    elif layers - depth > _BREAKS * layers:
        remarks.append(
            f"{layers - depth} of {layers} layers is more than half: expect to need recovery "
            "training, and check quality before anything else"
        )
    if fit.slope <= 0:
        remarks.append("cost does not grow with the layers here: removing layers gains nothing")
    if fit.relative_residual is not None and fit.relative_residual > 0.05:
        remarks.append(
            f"the depths are no line: it misses them by {fit.relative_residual:.0%}; trust the "
            "measured depths only"
        )
    return SloPlan(
        model=model.resolve().name,
        target=str(target),
        concurrency=concurrency,
        num_hidden_layers=layers,
        num_to_remove=None if depth is None else layers - depth,
        intercept=fit.intercept,
        slope=fit.slope,
        relative_residual=fit.relative_residual,
        depths=[_depth(n, fit, costs, target) for n in sorted(costs, reverse=True)],
        best=_depth(best, fit, costs, target),
        verified=None if depth is None else verified,
        remarks=remarks,
        records=names,
        environment=environment(),
    )


def write_slo_plan(path: Path, plan: SloPlan) -> None:
    """Write the answer, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, plan.model_dump_json(indent=1) + "\n")


def _costs(
    records: Sequence[ServeRecord], target: Target, concurrency: int, layers: int
) -> dict[int, list[float]]:
    """Cost of each block by depth, from all valid cells under this load; dense once."""
    costs: dict[int, list[float]] = {}
    load = f"closed {concurrency}"
    for record in records:
        if record.invalid or record.partial:
            state = "partial" if record.partial else f"invalid ({record.invalid[0]})"
            raise UserError(f"a record is {state}; measure again, or leave out --record")
        dense = next(arm for arm in record.arms if arm.role == "dense")
        if dense.num_hidden_layers != layers:
            raise UserError(
                f"a record is of a model with {dense.num_hidden_layers} layers, this one has "
                f"{layers}"
            )
        for arm in record.arms:
            blocks: dict[int, list[float]] = {}
            for cell in record.cells:
                where = (cell.arm, cell.load, cell.memory)
                if where != (arm.name, load, "equal-kv") or cell.invalid:
                    continue
                if target.metric not in cell.metrics:
                    raise UserError(
                        f"{target.metric} was not measured; choose from "
                        f"{', '.join(sorted(cell.metrics))}"
                    )
                value = cell.metrics[target.metric]
                if value <= 0:
                    raise UserError(f"{target.metric} is {value} for {arm.name}: no cost of it")
                cost = value if is_cost(target.metric) else 1 / value
                blocks.setdefault(cell.block, []).append(cost)
            means = [sum(values) / len(values) for values in blocks.values()]
            if means and arm.role != "control":
                costs.setdefault(arm.num_hidden_layers, []).extend(means)
    if len(costs) < 2:
        raise UserError(
            f"{len(costs)} depths were measured under {load!r}; a line needs two. Measure the load "
            "with trsp bench serve, or leave out --record"
        )
    return costs


def _paired(costs: dict[int, list[float]]) -> list[list[float]]:
    """As many blocks of every depth: the first ones of each."""
    count = min(len(values) for values in costs.values())
    return [values[:count] for values in costs.values()]


def _mean(values: Sequence[float]) -> Interval:
    """The geometric mean over blocks and its interval."""
    return ratio_interval([math.log(value) for value in values])


def _depth(layers: int, fit: LinearFit, costs: dict[int, list[float]], target: Target) -> Depth:
    def own_unit(cost: float | None) -> float | None:
        if cost is None or cost <= 0:
            return None
        return cost if is_cost(target.metric) else 1 / cost

    interval = _mean(costs[layers]) if layers in costs else None
    ends = [] if interval is None else [own_unit(interval.low), own_unit(interval.high)]
    known = [end for end in ends if end is not None]
    return Depth(
        num_hidden_layers=layers,
        predicted=own_unit(fit.intercept + fit.slope * layers),
        measured=None if interval is None else own_unit(interval.estimate),
        low=min(known) if known else None,
        high=max(known) if known else None,
    )
