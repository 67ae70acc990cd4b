"""Every arm computes the measured case, so that their times may be compared."""

from typing import Any

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from trsp.bench.kernel_arms import (
    ArmUnavailableError,
    arm_forward,
    arm_gradients,
    arms_of,
    forget_compiled_code,
    hf_rmsnorm,
    saved_bytes,
)
from trsp.bench.kernel_cases import DTYPES, OPS, KernelCase, dtypes_of, make_problem

pytestmark = pytest.mark.filterwarnings("ignore:gated_difference measures")
NUM_TOKENS, D = 7, 40

CASES = [
    KernelCase(op, "fp32", D, norm, gate_kind, num_branches, convention)
    for op in OPS
    for norm in ("l1", "l2", "l2_squared", None)
    for gate_kind in ("residual", "output")
    for num_branches in ((2,) if op == "gated_difference" else (1, 2))
    for convention in (("llama", "gemma") if op == "gated_branch_rmsnorm" else ("llama",))
]


def values(arm: Any, case: KernelCase) -> dict[str, torch.Tensor]:
    problem = make_problem(case, NUM_TOKENS, "cpu")
    outputs = arm_forward(arm, problem)
    gradients = arm_gradients(arm, problem, outputs)
    return {**outputs, **{f"d{name}": tensor for name, tensor in gradients.items()}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_eager_arms_compute_what_the_op_computes(case: KernelCase) -> None:
    ours = values("fused", case)
    eager = [arm for arm in arms_of(case) if arm.startswith("eager")]
    assert len(eager) == 2
    for arm in eager:
        theirs = values(arm, case)
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(
                tensor, ours[name], rtol=1e-4, atol=1e-5, msg=f"{arm} {name}"
            )


@pytest.mark.parametrize("arm", ["compile_natural", "compile_explicit"])
def test_compiled_arms_compute_what_the_op_computes(arm: Any) -> None:
    case = KernelCase("gated_branch_rmsnorm", "fp32", D)
    forget_compiled_code()
    ours, theirs = values("fused", case), values(arm, case)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, ours[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("convention", "norm"), [("llama", LlamaRMSNorm), ("gemma", GemmaRMSNorm)])
def test_the_norm_is_that_of_transformers_to_the_bit(convention: Any, norm: Any) -> None:
    module = norm(D, eps=1e-6).to(torch.bfloat16)
    torch.nn.init.normal_(module.weight)
    z = torch.randn(NUM_TOKENS, D, dtype=torch.bfloat16)
    assert torch.equal(hf_rmsnorm(z, module.weight, convention), module(z))


@pytest.mark.parametrize(
    ("op", "beyond_one_tensor"),
    [("gated_difference", 4), ("gated_branch", 4), ("gated_branch_rmsnorm", 8)],
)
def test_the_fused_op_saves_one_tensor(op: Any, beyond_one_tensor: int) -> None:
    problem = make_problem(KernelCase(op, hidden_size=D), NUM_TOKENS, "cpu")
    one_tensor = problem.dz.nbytes
    assert saved_bytes("fused", problem) == one_tensor + beyond_one_tensor * NUM_TOKENS


def test_an_eager_arm_is_seen_to_save_more() -> None:
    problem = make_problem(KernelCase("gated_branch", hidden_size=D), NUM_TOKENS, "cpu")
    assert saved_bytes("eager_hf", problem) > 2 * saved_bytes("fused", problem)


def test_an_arm_of_another_op_is_refused() -> None:
    problem = make_problem(KernelCase("gated_branch", hidden_size=D), NUM_TOKENS, "cpu")
    with pytest.raises(ValueError, match="eager_hf_norm does not compute gated_branch"):
        arm_forward("eager_hf_norm", problem)


def test_absent_liger_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    problem = make_problem(KernelCase("gated_branch_rmsnorm", hidden_size=D), NUM_TOKENS, "cpu")
    with pytest.raises(ArmUnavailableError, match="pip install --no-deps liger-kernel"):
        arm_forward("liger", problem)


def test_liger_is_not_offered_where_it_differs_in_more_than_it_must() -> None:
    assert "liger" in arms_of(KernelCase("gated_branch_rmsnorm"))
    assert "liger" not in arms_of(KernelCase("gated_branch_rmsnorm", "mixed"))
    assert "liger" not in arms_of(KernelCase("gated_branch_rmsnorm", gate_kind="output"))
    assert "liger" not in arms_of(KernelCase("gated_branch_rmsnorm", convention="gemma"))


def test_an_op_without_a_mixed_dtype_is_never_measured_in_another_one() -> None:
    assert {op: set(DTYPES) - set(dtypes_of(op)) for op in OPS} == {
        "gated_difference": {"mixed"},
        "gated_branch": set(),
        "gated_branch_rmsnorm": set(),
    }
    with pytest.raises(ValueError, match="gated_difference is not measured in mixed"):
        KernelCase("gated_difference", "mixed")
