"""gated_branch_rmsnorm inside autograd: what is saved, what is skipped, who else may be around.

T tokens, D hidden size. The tensors are those of the measured cases.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trsp.bench.kernel_cases import KernelCase, make_problem
from trsp.kernels import gated_branch_rmsnorm as gated_branch_rmsnorm_module

# Any: each test knows which outputs and gradients it asked for.
gated_branch_rmsnorm: Any = gated_branch_rmsnorm_module.gated_branch_rmsnorm
gated_branch_rmsnorm_reference: Any = gated_branch_rmsnorm_module.gated_branch_rmsnorm_reference

T, D = 3, 40
CHOICES: dict[str, Any] = {"eps": 1e-6, "convention": "llama"}
OUTPUTS = ("z", "normed", "diff_norm")


def learners(device: str, flags: str = "11111", dtype: str = "fp32") -> list[Any]:
    """x, attn_out, mlp_out, gate, weight; the n-th wants a gradient where `flags` has a 1."""
    case = KernelCase("gated_branch_rmsnorm", dtype=dtype, hidden_size=D)
    inputs = make_problem(case, T, device).inputs.values()
    return [tensor.requires_grad_(flag == "1") for tensor, flag in zip(inputs, flags, strict=True)]


def output_grads(device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    dz, dnormed = torch.randn(2, T, D, generator=generator).to(device)
    norm_grad = torch.randn(T, generator=generator).to(device)
    return dict(zip(OUTPUTS, (dz, dnormed, norm_grad), strict=True))


def learn(inputs: list[Tensor], names: tuple[str, ...] = OUTPUTS, **choices: Any) -> list[Any]:
    """The gradient of every input from those of the named outputs, where they have one."""
    grads = output_grads(inputs[0].device.type)
    outputs = dict(zip(OUTPUTS, gated_branch_rmsnorm(*inputs, **CHOICES | choices), strict=False))
    roots = [name for name in names if outputs[name].requires_grad]
    torch.autograd.backward([outputs[name] for name in roots], [grads[name] for name in roots])
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize(
    ("flags", "norm", "gate_kind", "num_branches", "expected"),
    [
        ("11111", "l1", "residual", 2, ["z", "d"]),
        ("11111", "l2", "residual", 2, ["z", "d"]),
        ("11101", "l2", "residual", 2, ["z", "d"]),
        ("11111", None, "residual", 2, ["z", "d"]),
        ("11111", "l2", "residual", 1, ["z", "attn_out"]),
        ("11101", None, "residual", 2, ["z"]),
        ("11101", None, "output", 2, ["z"]),
        ("00001", "l2", "residual", 2, ["z"]),
        ("10000", "l2", "residual", 2, ["z"]),
        ("11111", "l2", "output", 2, ["z", "d", "x"]),
    ],
)
def test_saves_two_tensors_and_eight_bytes_a_token(
    device: str,
    backend: str,
    saved_by: Callable[..., list[Tensor]],
    flags: str,
    norm: Any,
    gate_kind: Any,
    num_branches: int,
    expected: list[str],
) -> None:
    x, attn_out, mlp_out, gate, weight = learners(device, flags, "bf16")
    mlp = mlp_out if num_branches == 2 else None
    results: list[Any] = []

    def call() -> None:
        choices = {"gate_kind": gate_kind, "norm": norm, "ref_norm": norm is not None}
        results.extend(gated_branch_rmsnorm(x, attn_out, mlp, gate, weight, **CHOICES, **choices))

    saved = saved_by(call)
    rows = [tensor for tensor in saved if tensor.shape == (T, D)]
    rest = [tensor for tensor in saved if tensor.shape != (T, D)]
    assert all(tensor.dtype == torch.bfloat16 for tensor in rows)
    known = {"x": x, "attn_out": attn_out, "z": results[0]}
    pointers = {tensor.data_ptr(): name for name, tensor in known.items()}
    assert [pointers.get(tensor.data_ptr(), "d") for tensor in rows] == [*expected]
    # The weight itself, not a copy; besides it the gate, 1 / rms and for l2 the norm.
    others = [tensor for tensor in rest if tensor.data_ptr() != weight.data_ptr()]
    assert len(others) < len(rest)
    assert sum(tensor.nbytes for tensor in others) <= 8 * T + gate.nbytes


def test_nothing_is_recorded_without_grad_or_without_a_learner(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_branch_rmsnorm_module._GatedBranchRMSNorm, "apply", None)
    with torch.no_grad():
        z, normed, diff_norm, _ = gated_branch_rmsnorm(*learners(device), **CHOICES)
    assert not any(tensor.requires_grad for tensor in (z, normed, diff_norm))
    outputs = gated_branch_rmsnorm(*learners(device, "00000"), **CHOICES, ref_norm=True)
    assert all(tensor.grad_fn is None for tensor in outputs)


@pytest.mark.parametrize("flags", ["10000", "01000", "00100", "00010", "00001", "01100", "11011"])
@pytest.mark.parametrize("gate_kind", ["residual", "output"])
def test_gives_each_learner_what_it_would_get_among_all(
    device: str, backend: str, gate_kind: Any, flags: str
) -> None:
    grads = learn(learners(device, flags), gate_kind=gate_kind, norm="l2")
    among_all = learn(learners(device), gate_kind=gate_kind, norm="l2")
    if "1" not in flags[1:3]:
        # Frozen branches: their norm has no gradient, and so no share in x's or the gate's.
        among_all = learn(learners(device), ("z", "normed"), gate_kind=gate_kind, norm="l2")
    for flag, grad, expected in zip(flags, grads, among_all, strict=True):
        if flag == "0":
            assert grad is None
        else:
            assert torch.equal(grad, expected)


def test_who_learns_decides_which_outputs_can_be_learned_from(device: str, backend: str) -> None:
    for flags, expected in {
        "10000": (True, True, False),
        "01000": (True, True, True),
        "00010": (True, True, False),
        "00001": (False, True, False),
    }.items():
        outputs = gated_branch_rmsnorm(*learners(device, flags), **CHOICES, ref_norm=True)
        assert tuple(output.requires_grad for output in outputs[:3]) == expected
        assert not outputs[3].requires_grad


@pytest.mark.parametrize("gate_kind", ["residual", "output"])
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_gradients_of_the_outputs_add_up(
    device: str, backend: str, norm: Any, gate_kind: Any
) -> None:
    """An output outside the loss has the gradient None, not a tensor of zeros."""
    choices = {"norm": norm, "gate_kind": gate_kind}

    def gradients(names: tuple[str, ...]) -> list[Tensor]:
        inputs = learners(device)
        grads = learn(inputs, names, **choices)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)]

    alone = {name: gradients((name,)) for name in OUTPUTS}
    combinations = [names for n in (2, 3) for names in itertools.combinations(OUTPUTS, n)]
    for names in combinations:
        parts = zip(*(alone[name] for name in names), strict=True)
        for part, whole in zip(parts, gradients(names), strict=True):
            torch.testing.assert_close(sum(part), whole, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("gate_kind", ["residual", "output"])
def test_without_dnormed_it_is_gated_branch(device: str, backend: str, gate_kind: Any) -> None:
    """To the bit, and the weight has no gradient; a residual gate hands x the very dz."""
    from trsp.kernels.gated_branch import gated_branch

    choices = {"norm": "l2", "gate_kind": gate_kind}
    *ours, dweight = learn(learners(device), ("z", "diff_norm"), **choices)
    inputs, grads = learners(device)[:4], output_grads(device)
    z, diff_norm, _ = gated_branch(*inputs, **choices)
    torch.autograd.backward([z, diff_norm], [grads["z"], grads["diff_norm"]])
    assert dweight is None
    # The norm of d, summed in another order by a kernel, divides the gradient.
    exact = backend == "reference"
    for one, tensor in zip(ours, inputs, strict=True):
        if exact or tensor is inputs[0]:
            assert torch.equal(one, tensor.grad)
        torch.testing.assert_close(one, tensor.grad, rtol=1e-6, atol=1e-6)


def test_x_norm_carries_no_gradient(device: str, backend: str) -> None:
    x, *rest = learners(device)
    _, _, diff_norm, x_norm = gated_branch_rmsnorm(x, *rest, **CHOICES, norm="l2", ref_norm=True)
    assert not x_norm.requires_grad
    (diff_norm / x_norm).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("output", [0, 1, 2])
def test_a_second_derivative_is_refused(device: str, backend: str, output: int) -> None:
    inputs = learners(device)
    loss = gated_branch_rmsnorm(*inputs, **CHOICES, norm="l2")[output].square().sum()
    (grad,) = torch.autograd.grad(loss, inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _block(projection: Tensor, x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    z, normed, first, _ = gated_branch_rmsnorm(
        x, x @ projection, torch.sin(x), gate, weight, **CHOICES, norm="l2"
    )
    z, normed, second, _ = gated_branch_rmsnorm(
        z, normed @ projection, None, gate, weight, **CHOICES
    )
    return z + normed, first + second


def test_activation_checkpointing_changes_nothing(device: str, backend: str) -> None:
    def run(checkpointed: bool) -> list[Tensor]:
        x, _, _, gate, weight = learners(device)
        projection = (torch.arange(D * D, device=device).view(D, D).sin() / D).requires_grad_()
        arguments = (projection, x, gate, weight)
        if checkpointed:
            out, penalty = checkpoint(_block, *arguments, use_reentrant=False)
        else:
            out, penalty = _block(*arguments)
        (out.square().sum() + penalty.mean()).backward()
        return [out, penalty, *(tensor.grad for tensor in arguments)]

    for ours, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, plain)


def test_autocast_keeps_the_residual_stream_in_fp32(device: str, backend: str) -> None:
    x, _, _, gate, weight = learners(device)
    attention, mlp = (torch.nn.Linear(D, D, device=device) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        inputs = (x, attention(x), mlp(x), gate, weight)
        assert inputs[1].dtype == torch.bfloat16
        outputs = gated_branch_rmsnorm(*inputs, **CHOICES, norm="l2", ref_norm=True)
        z, normed, diff_norm, x_norm = outputs
        loss = (z * normed).mean() + (diff_norm / x_norm).mean()
    assert all(output.dtype == torch.float32 for output in outputs)
    for ours, plain in zip(
        outputs, gated_branch_rmsnorm(*inputs, **CHOICES, norm="l2"), strict=True
    ):
        assert plain is None or torch.equal(ours, plain)
    loss.backward()
    for tensor in (x, gate, weight, *attention.parameters(), *mlp.parameters()):
        assert tensor.grad.dtype == torch.float32
        assert (tensor.grad != 0).any()


def _loss(*inputs: Tensor) -> Any:
    z, normed, diff_norm, x_norm = gated_branch_rmsnorm(
        *inputs, **CHOICES, norm="l2", ref_norm=True
    )
    return (z * normed).sum() + (diff_norm / x_norm).sum()


def test_torch_compile_takes_the_reference_in_one_graph(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRSP_KERNELS", raising=False)
    torch.compiler.reset()

    def run(function: Callable[..., Any]) -> list[Tensor]:
        inputs = learners(device)
        loss = function(*inputs)
        loss.backward()
        return [loss, *(tensor.grad for tensor in inputs)]

    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    for one, plain in zip(run(compiled), run(_loss), strict=True):
        torch.testing.assert_close(one, plain)


def test_a_forced_kernel_is_refused_under_torch_compile(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    torch.compiler.reset()
    compiled: Any = torch.compile(_loss, backend="aot_eager")
    with pytest.raises(ValueError, match=r"impossible here: torch.compile is tracing"):
        compiled(*learners(device))


@pytest.mark.parametrize("convention", ["llama", "gemma"])
@pytest.mark.parametrize("gate_kind", ["residual", "output"])
@pytest.mark.parametrize("norm", [None, "l1", "l2", "l2_squared"])
@pytest.mark.parametrize("num_branches", [1, 2])
def test_gradcheck_of_the_reference(
    num_branches: int, norm: Any, gate_kind: Any, convention: Any
) -> None:
    generator = torch.Generator().manual_seed(0)
    streams = torch.randn(num_branches + 1, 2, 2, 3, generator=generator, dtype=torch.float64)
    vectors = [torch.full((1,), 0.6), torch.tensor([0.3, -1.2, 2.0])]
    inputs = [tensor.double().requires_grad_() for tensor in (*streams, *vectors)]

    def differentiable_outputs(x: Tensor, attn_out: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        *mlp, gate, weight = rest
        outputs = gated_branch_rmsnorm_reference(
            *(x, attn_out, mlp[0] if mlp else None, gate, weight),
            eps=0.1,
            convention=convention,
            gate_kind=gate_kind,
            norm=norm,
        )
        return tuple(tensor for tensor in outputs if tensor is not None)

    assert torch.autograd.gradcheck(differentiable_outputs, inputs)
