"""How many layers must go: the depths, the line through them, and what to beware of."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from trsp.bench.record import environment
from trsp.bench.slo_records import Costs
from trsp.bench.slo_target import Target
from trsp.bench.speed_analysis import is_cost
from trsp.bench.statistics import Interval, LinearFit, ratio_interval
from trsp.pruner.bounded_json import read_json_object
from trsp.pruner.durable import atomic_write
from trsp.pruner.errors import UserError

# Halfway through the layers quality has broken in every published comparison of depth pruning.
_BREAKS = 0.5


class Depth(BaseModel):
    """What one depth costs: measured, predicted, or both; in the unit of the target's metric.

    An interval is absent (both ends None) with one block, and where nothing was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    num_hidden_layers: Annotated[int, Field(ge=1)]
    predicted: float | None
    predicted_low: float | None
    predicted_high: float | None
    measured: float | None
    low: float | None
    high: float | None

    def line(self) -> str:
        """One line for people."""
        measured = "not measured" if self.measured is None else (
            f"measured {_told(self.measured, self.low, self.high)}"
        )  # fmt: skip
        predicted = "no cost" if self.predicted is None else (
            _told(self.predicted, self.predicted_low, self.predicted_high)
        )  # fmt: skip
        return f"{self.num_hidden_layers:>3} layers: {measured}; line {predicted}"


class SloPlan(BaseModel):
    """The answer. `num_to_remove` None: no depth meets the target; `best` is the closest one.

    Attributes:
        intercept, slope: of the cost, in ms or in seconds for one token or request, with their
            intervals over blocks; None with one block.
        relative_residual: what the line misses the measured depths by; None with two.
        verified: the named depth was measured and its whole interval meets the target; None: it
            was not measured, or in one block, which has no interval.
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
    intercept_low: float | None
    intercept_high: float | None
    slope: float
    slope_low: float | None
    slope_high: float | None
    relative_residual: float | None
    depths: list[Depth]
    best: Depth
    verified: bool | None
    remarks: list[str]
    records: list[str]
    environment: dict[str, Any]

    def lines(self) -> list[str]:
        """The answer for people, the verdict last."""
        unit = "ms" if "<=" in self.target else "s for one"
        a = _told(self.intercept, self.intercept_low, self.intercept_high)
        b = _told(self.slope, self.slope_low, self.slope_high)
        return [
            f"{self.model}: {self.num_hidden_layers} layers; target {self.target} at "
            f"{self.concurrency} in flight",
            *(f"  {depth.line()}" for depth in self.depths),
            f"line: {a} + {b} x layers, {unit}",
            *self.remarks,
            self._verdict(),
        ]

    def _verdict(self) -> str:
        if self.num_to_remove is None:
            return f"NO: no number of layers meets {self.target}"
        proof = {True: "measured, met", False: "measured, MISSED", None: "not verified"}
        told = proof[self.verified]
        if self.num_to_remove == 0:
            return f"the dense model meets the target: nothing has to go ({told})"
        if self.verified is False:
            return (
                f"NO depth is verified: {self.num_to_remove} layers less were {told}; go on with "
                "--record of all that was measured"
            )
        return (
            f"remove {self.num_to_remove} layers, {told}; next: "
            f"trsp prune MODEL --layers {self.num_to_remove} --out DIR --data TEXT"
        )


def _told(estimate: float, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return f"{estimate:.4g} (no interval)"
    return f"{estimate:.4g} ({low:.4g} to {high:.4g})"


def answer(
    model: Path,
    target: Target,
    concurrency: int,
    layers: int,
    fit: LinearFit,
    depth: int | None,
    costs: Costs,
    verified: bool | None,
    remarks: list[str],
    names: list[str],
) -> SloPlan:
    """The answer from the last line; `depth` None: not even one layer meets the target."""
    # Where noise makes cost fall with depth, the deepest is the closest.
    cheapest = 1 if fit.slope > 0 else layers
    best = _depth(cheapest if depth is None else depth, fit, costs, target)
    remarks = [*remarks, *_remarks(target, layers, fit, depth, best, costs)]
    nothing = (0.0,) * len(fit.block_slopes)
    intercept = replace(fit, slope=0.0, block_slopes=nothing).predict(1)
    slope = replace(fit, intercept=0.0, block_intercepts=nothing).predict(1)
    return SloPlan(
        model=model.resolve().name,
        target=str(target),
        concurrency=concurrency,
        num_hidden_layers=layers,
        num_to_remove=None if depth is None else layers - depth,
        intercept=fit.intercept,
        intercept_low=intercept.low,
        intercept_high=intercept.high,
        slope=fit.slope,
        slope_low=slope.low,
        slope_high=slope.high,
        relative_residual=fit.relative_residual,
        depths=[_depth(n, fit, costs, target) for n in sorted({*costs, best.num_hidden_layers},
                                                              reverse=True)],
        best=best,
        verified=None if depth is None else verified,
        remarks=remarks,
        records=names,
        environment=environment(),
    )  # fmt: skip


def _remarks(
    target: Target, layers: int, fit: LinearFit, depth: int | None, best: Depth, costs: Costs
) -> list[str]:
    """What people must know before they use the answer."""
    found = []
    if depth is None:
        cost, how = fit.predict(best.num_hidden_layers).estimate, "would be at"
        if best.num_hidden_layers in costs:
            cost, how = mean_cost(costs[best.num_hidden_layers]).estimate, "was measured at"
        text = f"the best possible, {best.num_hidden_layers} of {layers} layers, {how} "
        text += target.shown(cost)
        if fit.slope > 0:
            text += "; what does not depend on the layers takes the rest"
        found.append(text)
    elif layers - depth > _BREAKS * layers:
        found.append(
            f"{layers - depth} of {layers} layers is more than half: expect to need recovery "
            "training, and check quality before anything else"
        )
    if depth is not None:
        whose = "what was measured" if depth in costs else "the line"
        high = (mean_cost(costs[depth]) if depth in costs else fit.predict(depth)).high
        if high is not None and high > target.cost_limit:
            found.append(
                f"{depth} layers: the interval of {whose} reaches {target.shown(high)}, which does "
                "not meet the target"
            )
    if fit.slope <= 0:
        found.append("cost does not grow with the layers here: removing layers gains nothing")
    if fit.relative_residual is not None and fit.relative_residual > 0.05:
        found.append(
            f"the depths are no line: it misses them by {fit.relative_residual:.0%}; trust the "
            "measured depths only"
        )
    return found


def refuse_foreign_out(path: Path) -> None:
    """Refuse to replace anything but an answer of this program.   Raises: UserError."""
    if not path.exists():
        return
    text = f"--out {path}: exists and is no answer of trsp plan --slo; choose another --out"
    if not path.is_file():
        raise UserError(text)
    try:
        kind = read_json_object(path, max_bytes=2**24).get("kind")
    except UserError as error:
        raise UserError(text) from error
    if kind != "slo":
        raise UserError(text)


def write_slo_plan(path: Path, plan: SloPlan) -> None:
    """Write the answer, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, plan.model_dump_json(indent=1) + "\n")


def mean_cost(values: Sequence[float]) -> Interval:
    """The geometric mean over blocks and its interval."""
    return ratio_interval([math.log(value) for value in values])


def _depth(layers: int, fit: LinearFit, costs: Costs, target: Target) -> Depth:
    def ends(interval: Interval | None) -> tuple[float | None, float | None, float | None]:
        """Estimate, low and high in the metric's own unit; a cost of 0 or less has none."""
        if interval is None or interval.estimate <= 0:
            return None, None, None
        estimate = own_unit(interval.estimate)
        if interval.low is None or interval.high is None or interval.low <= 0:
            return estimate, None, None
        low, high = sorted((own_unit(interval.low), own_unit(interval.high)))
        return estimate, low, high

    def own_unit(cost: float) -> float:
        return cost if is_cost(target.metric) else 1 / cost

    measured = ends(mean_cost(costs[layers]) if layers in costs else None)
    predicted = ends(fit.predict(layers))
    return Depth(
        num_hidden_layers=layers,
        predicted=predicted[0],
        predicted_low=predicted[1],
        predicted_high=predicted[2],
        measured=measured[0],
        low=measured[1],
        high=measured[2],
    )
