"""What the kernels must reach on a GPU, as data, and which measured cases reach it.

Derived from the passes over memory that each form makes (trsp.bench.kernel_cases); tensors of 64
MiB or more, bf16, ratios within one run. "Total" is forward and backward in one timed region.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trsp.bench.kernel_arms import Arm
from trsp.bench.kernel_cases import OPS, Op

MIN_TENSOR_BYTES = 64 * 2**20
BAR_DTYPE = "bf16"
GATE_OPS: tuple[Op, ...] = ("gated_difference", "gated_branch")
FUSED_NORM: tuple[Op, ...] = ("gated_branch_rmsnorm",)

Verdict = Literal["yes", "NO", "not measured"]


@dataclass(frozen=True)
class Bar:
    """A figure of each case of `ops`, at least `bound`, or at most where `at_most`.

    `share` names a direction whose share of the copy bandwidth is meant, `against` an arm whose
    total time is divided by the fused op's; neither means saved bytes beyond one tensor, a token.
    """

    name: str
    ops: tuple[Op, ...]
    bound: float
    share: Literal["forward", "backward"] | None = None
    against: Arm | None = None
    tokens: int | None = None
    at_most: bool = False


BARS = (
    Bar("gate forward, share of copy bandwidth", GATE_OPS, 0.90, share="forward"),
    Bar("gate backward, share of copy bandwidth", GATE_OPS, 0.88, share="backward"),
    Bar("gate + RMSNorm forward, share of copy bandwidth", FUSED_NORM, 0.85, share="forward"),
    Bar("gate + RMSNorm backward, share of copy bandwidth", FUSED_NORM, 0.75, share="backward"),
    Bar("gated_branch x HF-shaped eager", ("gated_branch",), 4.2, against="eager_hf"),
    Bar("gated_difference x eager", ("gated_difference",), 3.8, against="eager_hf"),
    Bar("gate + RMSNorm x F.rms_norm", FUSED_NORM, 3.3, against="eager_f_rms_norm"),
    Bar("gate + RMSNorm x HF's norm", FUSED_NORM, 6.5, against="eager_hf_norm"),
    Bar("gate x compiled explicit", GATE_OPS, 0.95, against="compile_explicit"),
    Bar("gate x compiled natural", GATE_OPS, 1.25, against="compile_natural", tokens=8191),
    Bar("saved beyond 1 tensor, bytes a token", OPS, 12.0, at_most=True),
)


def judge_bars(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every bar with its worst case among `results` and the verdict; never "yes" unmeasured."""
    return [_judge_bar(bar, results) for bar in BARS]


def bars_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The bars that one case has a figure for, with verdicts."""
    judged = [_judge_bar(bar, [result]) for bar in BARS]
    return [bar for bar in judged if bar["met"] != "not measured"]


def applies(bar: Bar, op: str, dtype: str, tokens: int, tensor_bytes: int) -> bool:
    """Whether a case of this size is held to the bar."""
    return (
        op in bar.ops
        and dtype == BAR_DTYPE
        and tensor_bytes >= MIN_TENSOR_BYTES
        and bar.tokens in (None, tokens)
    )


def _judge_bar(bar: Bar, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = {}
    for result in results:
        size = (result["op"], result["dtype"], result["tokens"], result["tensor_bytes"])
        if applies(bar, *size) and (figure := _figure(bar, result)) is not None:
            figures[result["name"]] = figure
    verdict: Verdict = "not measured"
    worst = measured = None
    if figures:
        pick = max if bar.at_most else min
        worst = pick(figures, key=lambda name: figures[name])
        measured = figures[worst]
        reached = measured <= bar.bound if bar.at_most else measured >= bar.bound
        verdict = "yes" if reached else "NO"
    return {
        "bar": bar.name,
        "bound": bar.bound,
        "at_most": bar.at_most,
        "measured": measured,
        "worst_case": worst,
        "num_cases": len(figures),
        "met": verdict,
    }


def _figure(bar: Bar, result: dict[str, Any]) -> float | None:
    """The measured figure; None where the case was not timed, or the arm was not."""
    arms = result["arms"]
    times: dict[str, float] = {
        name: row["both"]["median_us"] for name, row in arms.items() if "both" in row
    }
    if "fused" not in times:
        return None
    if bar.share is not None:
        share: float = arms["fused"]["share_of_copy"][bar.share]
        return share
    if bar.against is not None:
        theirs = times.get(bar.against)
        return None if theirs is None else theirs / times["fused"]
    beyond: float = arms["fused"]["saved_bytes"] - result["tensor_bytes"]
    num_tokens: int = result["tokens"]
    return beyond / num_tokens
