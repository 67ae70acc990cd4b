"""The correctness gate before any time: right ops pass in every dtype, planted faults do not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trsp.bench.kernel_arms import arm_forward, arm_gradients
from trsp.bench.kernel_cases import OPS, KernelCase, Problem, dtypes_of, make_problem
from trsp.bench.kernel_truth import disagreements, judge

pytestmark = pytest.mark.filterwarnings("ignore:gated_difference measures")
NUM_TOKENS, D = 130, 200
Values = dict[str, Tensor]


def computed(case: KernelCase) -> tuple[Problem, Values, Values]:
    problem = make_problem(case, NUM_TOKENS, "cpu")
    outputs = arm_forward("fused", problem)
    gradients = arm_gradients("fused", problem, outputs)
    return problem, {name: tensor.detach() for name, tensor in outputs.items()}, gradients


def wrong(problem: Problem, outputs: Values, gradients: Values) -> list[str]:
    # Chunks of 32 rows, the last of them short.
    return judge(problem, outputs, gradients, chunk_elements=32 * D).wrong


@pytest.mark.parametrize("gate_kind", ["residual", "output"])
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared", None])
@pytest.mark.parametrize(("op", "dtype"), [(op, dtype) for op in OPS for dtype in dtypes_of(op)])
def test_right_ops_pass(op: Any, dtype: str, norm: Any, gate_kind: Any) -> None:
    conventions: tuple[Any, ...] = (
        ("llama", "gemma") if op == "gated_branch_rmsnorm" else ("llama",)
    )
    for convention in conventions:
        case = KernelCase(op, dtype, D, norm, gate_kind, convention=convention)
        assert wrong(*computed(case)) == []


@pytest.mark.parametrize(
    ("op", "name", "factor"),
    [
        *[(op, name, 1.03) for op in OPS for name in ("z", "diff_norm", "x_norm", "dx")],
        *[(op, "dgate", 0.0) for op in OPS],
        ("gated_difference", "dy", 1.03),
        ("gated_branch", "dattn_out", 1.03),
        ("gated_branch", "dmlp_out", 0.0),
        ("gated_branch_rmsnorm", "dmlp_out", 1.03),
        ("gated_branch_rmsnorm", "dweight", 1.03),
        ("gated_branch_rmsnorm", "normed", 1.03),
    ],
)
def test_a_planted_factor_is_found(op: Any, name: str, factor: float) -> None:
    problem, outputs, gradients = computed(KernelCase(op, hidden_size=D))
    held, key = (outputs, name) if name in outputs else (gradients, name.removeprefix("d"))
    held[key] = held[key] * factor
    assert wrong(problem, outputs, gradients) == [name] or (
        name == "z" and "z" in wrong(problem, outputs, gradients)
    )


@pytest.mark.parametrize("op", OPS)
def test_one_wrong_element_in_the_last_row_is_found(op: Any) -> None:
    problem, outputs, gradients = computed(KernelCase(op, hidden_size=D))
    outputs["z"][-1, -1] = torch.nan
    assert "z" in wrong(problem, outputs, gradients)


def test_a_lost_gradient_of_the_norm_is_found() -> None:
    problem, outputs, gradients = computed(KernelCase("gated_branch", hidden_size=D))
    gradients["attn_out"] = (0.7 * problem.dz.float()).to(torch.bfloat16)
    assert wrong(problem, outputs, gradients) == ["dattn_out"]


def test_a_missing_value_is_wrong() -> None:
    problem, outputs, gradients = computed(KernelCase("gated_branch", hidden_size=D))
    del outputs["x_norm"]
    assert wrong(problem, outputs, gradients) == ["x_norm"]


def test_an_arm_that_computes_something_else_is_found() -> None:
    _, outputs, gradients = computed(KernelCase("gated_branch", hidden_size=D))
    ours = (outputs, gradients)
    assert disagreements(ours, ours, dgate_scale=1.0) == []
    other = ({**outputs, "z": outputs["z"] * 1.1}, {**gradients, "gate": gradients["gate"] + 1})
    assert disagreements(ours, other, dgate_scale=1.0) == ["gate", "z"]


def test_what_an_arm_leaves_out_is_found() -> None:
    _, outputs, gradients = computed(KernelCase("gated_branch", hidden_size=D))
    fewer = {name: tensor for name, tensor in outputs.items() if name != "x_norm"}
    without_gate = {name: tensor for name, tensor in gradients.items() if name != "gate"}
    found = disagreements((outputs, gradients), (fewer, without_gate), dgate_scale=1.0)
    assert found == ["gate (missing)", "x_norm (missing)"]
