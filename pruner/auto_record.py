"""What a search tried, what it chose and why: the record of `trsp prune --auto`, and its lines.

All losses and ratios are of the held-out slice (held_out.py); a ratio is perplexity over the dense
model's on the same slice.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Outcome = Literal["finished", "stopped halfway", "diverged"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SearchPlan(_Record):
    """At most this much will be trained.

    Attributes:
        gate_trainings: stability's and selection's; a plain run has as many as it removes layers.
        transfers: a plain run has one; one of twice the steps counts as two.
        proportion: sequences trained on, over those of a plain run to the deepest depth.
    """

    gate_trainings: int
    plain_gate_trainings: int
    transfers: int
    plain_transfers: int
    proportion: float

    def describe(self) -> str:
        return (
            f"at most {self.gate_trainings} gate trainings (a plain run: "
            f"{self.plain_gate_trainings}) and {self.transfers} transfers (a plain run: "
            f"{self.plain_transfers}; twice the steps count as two); it trains on at most "
            f"{self.proportion:.1f} times the sequences of a plain run"
        )


class StabilityTrial(_Record):
    """Spearman's correlation of the orders of layers that the two halves of the text give."""

    lambda1: float
    correlation: float


class OrderStability(_Record):
    """Spearman's correlation of the losses without each layer, on two times `num_sequences`."""

    num_sequences: int
    correlation: float

    def describe(self) -> str:
        return (
            f"two halves of the text agree with rank correlation {self.correlation:.2f} (the loss "
            f"without each layer, {self.num_sequences} sequences a half)"
        )


class DepthPoint(_Record):
    """The model without the first `layers` of the removal order.

    Attributes:
        removed: the last of these layers; None for the dense model.
        loss, raw_ratio: masked, nothing trained; `standard_error` is of the loss above the dense.
        ratio: after the best transfer at this depth, None where none finished.
    """

    layers: int
    removed: int | None
    loss: float
    raw_ratio: float
    standard_error: float
    ratio: float | None = None


class TransferTrial(_Record):
    """One transfer of the search; a loss and its ratio only where it finished.

    Attributes:
        factor, steps_factor: times the recipe's learning rate and its steps.
    """

    layers: int
    factor: float
    steps_factor: int = 1
    learning_rate: float
    outcome: Outcome
    halfway_loss: float | None
    loss: float | None
    ratio: float | None
    standard_error: float | None


class Decision(_Record):
    """One setting that the search chose, or left alone, and why."""

    setting: str
    value: str
    reason: str


class AutoRecord(_Record):
    """A finished search.

    Attributes:
        order: how stable the order is; None where gates order (`stability` tells), or too few
            layers are ordered.
        knee: the deepest depth whose raw ratio is at most 1 + raw_limit.
        settings: what the search came to, as `section.name=value`.
        stopped_at_budget: it would have tried more than max_transfers.
        seconds: of the search, the winning transfer included and the selection not, over all legs
            of a resumed run.
    """

    schema_version: Literal[1] = 1
    held_out_sequences: int
    training_sequences: int
    sequence_length: int
    max_increase: float | None
    raw_limit: float
    dense_loss: float
    stability: tuple[StabilityTrial, ...]
    order: OrderStability | None = None
    removal_order: tuple[int, ...]
    curve: tuple[DepthPoint, ...]
    knee: int
    transfers: tuple[TransferTrial, ...]
    decisions: tuple[Decision, ...]
    layers: int
    settings: tuple[str, ...]
    plan: SearchPlan
    gate_trainings: int
    max_transfers: int
    stopped_at_budget: bool
    warnings: tuple[str, ...]
    seconds: float

    def knee_line(self) -> str:
        """Where raw removal breaks, in words."""
        limit = percent(1 + self.raw_limit)
        if self.knee == len(self.curve) - 1:
            return f"without recovery perplexity stays within {limit} at every depth evaluated"
        layers = "layer" if self.knee == 1 else "layers"
        return f"beyond {self.knee} {layers} recovery is needed: raw removal costs over {limit}"

    def curve_lines(self) -> list[str]:
        """Quality against depth, one line each: layers removed, raw, after transfer."""
        lines = []
        for point in self.curve[1:]:
            after = "" if point.ratio is None else f", {percent(point.ratio)} after transfer"
            chosen = "  <- chosen" if point.layers == self.layers else ""
            lines.append(
                f"{point.layers:>3} removed (last: layer {point.removed}): "
                f"{percent(point.raw_ratio)} raw{after}{chosen}"
            )
        return lines

    def why_lines(self) -> list[str]:
        """Each decision in one line with its numbers."""
        lines = [
            f"{self.held_out_sequences} of {self.held_out_sequences + self.training_sequences} "
            f"sequences of {self.sequence_length} tokens are held out, trained on by no stage; "
            "all numbers are theirs; what differs by less than its standard error is a tie"
        ]
        if self.order is not None:
            lines.append(f"order: {self.order.describe()}")
        lines += [f"{d.setting} {d.value}: {d.reason}" for d in self.decisions]
        lines.append(self.knee_line())
        lines.append(
            f"ran {self.gate_trainings} gate trainings and "
            f"{sum(trial.steps_factor for trial in self.transfers)} transfers (at most "
            f"{self.plan.transfers} planned; twice the steps count as two); {self.seconds:.0f} s "
            "besides selection"
        )
        return lines


def percent(ratio: float) -> str:
    """1.0512 as "+5.1 %"; two digits below one percent."""
    increase = 100 * (ratio - 1)
    return f"{increase:+.2f} %" if abs(increase) < 1 else f"{increase:+.1f} %"


def console_lines(document: dict[str, Any]) -> list[str]:
    """What the command line prints of report["auto"]."""
    record = AutoRecord.model_validate(document)
    lines = [f"why      {line}" for line in record.why_lines()]
    return lines + [f"depth  {line}" for line in record.curve_lines()]


def card_lines(document: dict[str, Any]) -> list[str]:
    """The model card's section on report["auto"], Markdown."""
    record = AutoRecord.model_validate(document)
    lines = ["## Search (`--auto`)", ""]
    lines += [f"- {line}" for line in record.why_lines()]
    lines += ["", "Perplexity above the dense model's on the held-out slice:", ""]
    lines += ["| layers removed | raw | after transfer |", "|---|---|---|"]
    for point in record.curve[1:]:
        after = "" if point.ratio is None else percent(point.ratio)
        lines.append(f"| {point.layers} | {percent(point.raw_ratio)} | {after} |")
    return lines
