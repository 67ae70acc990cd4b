"""The gate ops inside autograd: what is saved, what is skipped, and who else may be around.

T tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trsp.kernels import gated_branch as gated_branch_module
from trsp.kernels import gated_difference as gated_difference_module

# Any: each test knows which outputs and gradients it asked for.
gated_branch: Any = gated_branch_module.gated_branch
gated_branch_reference: Any = gated_branch_module.gated_branch_reference
gated_difference: Any = gated_difference_module.gated_difference
gated_difference_reference: Any = gated_difference_module.gated_difference_reference

T, D = 3, 40
DIFFERENCE_WARNING = "gated_difference measures"
pytestmark = pytest.mark.filterwarnings(f"ignore:{DIFFERENCE_WARNING}")


def leaves(
    device: str, num_tensors: int, dtype: torch.dtype = torch.float32, learns: str = ""
) -> list[Any]:
    """Random [T, D] tensors; the n-th wants a gradient where `learns` has a 1 at n."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(T, D, generator=generator) for _ in range(num_tensors)]
    learns = learns or "1" * num_tensors
    return [
        tensor.to(device, dtype).requires_grad_(flag == "1")
        for tensor, flag in zip(tensors, learns, strict=True)
    ]


def gate_on(device: str, learns: bool = True) -> Any:
    return torch.full((1,), 0.7, device=device, requires_grad=learns)


@pytest.mark.parametrize(
    ("gate_learns", "norm", "gate_kind", "num_branches", "expected"),
    [
        (True, "l1", "residual", 2, 1),
        (True, "l2", "residual", 2, 1),
        (False, "l2", "residual", 2, 1),
        (True, None, "residual", 2, 1),
        (True, "l2", "residual", 1, 1),
        (False, None, "residual", 2, 0),
        (False, None, "output", 2, 0),
        (True, "l2", "output", 2, 2),
    ],
)
def test_gated_branch_saves_one_tensor_and_a_few_bytes_a_token(
    device: str,
    backend: str,
    saved_by: Callable[..., list[Tensor]],
    gate_learns: bool,
    norm: Any,
    gate_kind: Any,
    num_branches: int,
    expected: int,
) -> None:
    x, attn_out, mlp_out = leaves(device, 3, torch.bfloat16)
    mlp = mlp_out if num_branches == 2 else None
    gate = gate_on(device, gate_learns)
    saved = saved_by(lambda: gated_branch(x, attn_out, mlp, gate, gate_kind=gate_kind, norm=norm))
    rows = [tensor for tensor in saved if tensor.shape == (T, D)]
    rest = sum(tensor.nbytes for tensor in saved if tensor.shape != (T, D))
    assert len(rows) == expected
    assert all(tensor.dtype == torch.bfloat16 for tensor in rows)
    assert rest <= 12 * T + gate.nbytes
    if num_branches == 1:
        assert rows[0].data_ptr() == attn_out.data_ptr()


@pytest.mark.parametrize(
    ("gate_learns", "norm", "gate_kind", "expected"),
    [
        (True, "l2", "residual", "xy"),
        (False, "l1", "residual", "xy"),
        (True, None, "residual", "xy"),
        (True, None, "output", "y"),
        (False, None, "residual", ""),
        (False, None, "output", ""),
    ],
)
def test_gated_difference_saves_its_inputs_or_nothing(
    device: str,
    backend: str,
    saved_by: Callable[..., list[Tensor]],
    gate_learns: bool,
    norm: Any,
    gate_kind: Any,
    expected: str,
) -> None:
    x, y = leaves(device, 2)
    gate = gate_on(device, gate_learns)
    saved = saved_by(lambda: gated_difference(x, y, gate, gate_kind=gate_kind, norm=norm))
    pointers = [tensor.data_ptr() for tensor in saved if tensor.shape == (T, D)]
    assert pointers == [{"x": x, "y": y}[name].data_ptr() for name in expected]


def test_nothing_is_recorded_without_grad_or_without_a_learner(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd is not entered at all: entering it writes d, whether or not someone asks."""
    monkeypatch.setattr(gated_branch_module._GatedBranch, "apply", None)
    monkeypatch.setattr(gated_difference_module._GatedDifference, "apply", None)
    x, attn_out, mlp_out = leaves(device, 3)
    with torch.no_grad():
        for z, diff_norm, _ in (
            gated_branch(x, attn_out, mlp_out, gate_on(device)),
            gated_difference(x, attn_out, gate_on(device)),
        ):
            assert not z.requires_grad
            assert not diff_norm.requires_grad
    frozen = leaves(device, 3, learns="000")
    assert gated_branch(*frozen, gate_on(device, learns=False))[0].grad_fn is None
    assert gated_difference(*frozen[:2], gate_on(device, learns=False))[0].grad_fn is None


@pytest.mark.parametrize("learns", ["1000", "0100", "0010", "0001", "0111", "1101"])
@pytest.mark.parametrize("gate_kind", ["residual", "output"])
def test_gated_branch_gives_each_learner_what_it_would_get_among_all(
    device: str, backend: str, gate_kind: Any, learns: str
) -> None:
    def gradients(flags: str) -> list[Any]:
        inputs = leaves(device, 3, learns=flags[:3])
        gate = gate_on(device, flags[3] == "1")
        z, diff_norm, _ = gated_branch(*inputs, gate, gate_kind=gate_kind, norm="l2")
        loss = z.square().sum()
        if diff_norm.requires_grad:
            loss = loss + diff_norm.sum()
        loss.backward()
        return [tensor.grad for tensor in (*inputs, gate)]

    for flag, grad, among_all in zip(learns, gradients(learns), gradients("1111"), strict=True):
        if flag == "0":
            assert grad is None
        else:
            assert torch.equal(grad, among_all)


@pytest.mark.parametrize("learns", ["100", "010", "001", "110"])
@pytest.mark.parametrize("gate_kind", ["residual", "output"])
def test_gated_difference_gives_each_learner_what_it_would_get_among_all(
    device: str, backend: str, gate_kind: Any, learns: str
) -> None:
    def gradients(flags: str) -> list[Any]:
        inputs = leaves(device, 2, learns=flags[:2])
        gate = gate_on(device, flags[2] == "1")
        z, diff_norm, _ = gated_difference(*inputs, gate, gate_kind=gate_kind, norm="l2")
        loss = z.square().sum()
        if diff_norm.requires_grad:
            loss = loss + diff_norm.sum()
        loss.backward()
        return [tensor.grad for tensor in (*inputs, gate)]

    for flag, grad, among_all in zip(learns, gradients(learns), gradients("111"), strict=True):
        if flag == "0":
            assert grad is None
        else:
            assert torch.equal(grad, among_all)


def test_a_norm_of_frozen_branches_has_no_gradient(device: str, backend: str) -> None:
    x, attn_out, mlp_out = leaves(device, 3, learns="100")
    z, diff_norm, _ = gated_branch(x, attn_out, mlp_out, gate_on(device), norm="l2")
    assert z.requires_grad
    assert not diff_norm.requires_grad


@pytest.mark.parametrize("gate_kind", ["residual", "output"])
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_a_loss_of_one_output_only(device: str, backend: str, norm: Any, gate_kind: Any) -> None:
    """The other output's gradient is None, not a tensor of zeros: dz and norm_grad add up."""
    weights = torch.arange(1.0, T + 1, device=device)

    def gradients(op: Any, num_tensors: int, outputs: str) -> list[Tensor]:
        inputs = [*leaves(device, num_tensors), gate_on(device)]
        z, diff_norm, _ = op(*inputs, gate_kind=gate_kind, norm=norm)
        losses = {"z": (z * weights[:, None]).sum(), "n": (diff_norm * weights).sum()}
        sum(losses[name] for name in outputs).backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]

    for op, num_tensors in ((gated_branch, 3), (gated_difference, 2)):
        parts = zip(gradients(op, num_tensors, "z"), gradients(op, num_tensors, "n"), strict=True)
        whole = gradients(op, num_tensors, "zn")
        for (of_z, of_norm), both in zip(parts, whole, strict=True):
            torch.testing.assert_close(of_z + of_norm, both, rtol=1e-6, atol=1e-6)


def test_gradients_of_stride_zero(device: str, backend: str) -> None:
    """What `z.sum()` and `diff_norm.mean()` send back is one number with all strides 0."""

    def gradients(expanded: bool) -> list[Tensor]:
        inputs = [*leaves(device, 3), gate_on(device)]
        z, diff_norm, _ = gated_branch(*inputs, norm="l2")
        dz, norm_grad = torch.full((), 0.3, device=device), torch.full((), 0.1, device=device)
        grads = [dz.expand(T, D), norm_grad.expand(T)]
        if not expanded:
            grads = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
        assert (grads[0].stride() == (0, 0)) == expanded
        torch.autograd.backward([z, diff_norm], grads)
        return [tensor.grad for tensor in inputs]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(ours, plain)


def test_x_norm_carries_no_gradient(device: str, backend: str) -> None:
    x, y = leaves(device, 2)
    _, diff_norm, x_norm = gated_difference(x, y, gate_on(device), norm="l2", ref_norm=True)
    assert not x_norm.requires_grad
    (diff_norm / x_norm).sum().backward()
    expected = (x - y) / ((x - y).norm(dim=-1) * x.norm(dim=-1)).unsqueeze(-1)
    torch.testing.assert_close(x.grad, expected.detach())
    attn_out, x = leaves(device, 2)
    _, diff_norm, x_norm = gated_branch(x, attn_out, None, gate_on(device), ref_norm=True)
    assert not x_norm.requires_grad
    (diff_norm / x_norm).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("op", [gated_branch, gated_difference])
def test_a_second_derivative_is_refused(device: str, backend: str, op: Any) -> None:
    inputs = leaves(device, 3 if op is gated_branch else 2)
    z, diff_norm, _ = op(*inputs, gate_on(device), norm="l2")
    (grad,) = torch.autograd.grad(z.square().sum() + diff_norm.sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_the_gate_s_gradient_reaches_the_model_s_vector(device: str, backend: str) -> None:
    gates: Any = torch.tensor([0.2, 0.7, 1.0], device=device, requires_grad=True)
    x, attn_out, mlp_out = leaves(device, 3, learns="000")
    z, _, _ = gated_branch(x, attn_out, mlp_out, gates[1:2], norm=None)
    z.sum().backward()
    expected = (attn_out + mlp_out).double().sum()
    torch.testing.assert_close(gates.grad[1].double(), expected, rtol=1e-5, atol=1e-5)
    assert gates.grad[0] == gates.grad[2] == 0


def _block(weight: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    z, branch_norm, _ = gated_branch(x, x @ weight, torch.sin(x), gate, norm="l2")
    z, difference_norm, _ = gated_difference(z, z @ weight, gate, norm="l1")
    return z, branch_norm + difference_norm


def test_activation_checkpointing_changes_nothing(device: str, backend: str) -> None:
    def run(checkpointed: bool) -> list[Tensor]:
        (x,), gate = leaves(device, 1), gate_on(device)
        weight = (torch.arange(D * D, device=device).view(D, D).sin() / D).requires_grad_()
        if checkpointed:
            z, penalty = checkpoint(_block, weight, x, gate, use_reentrant=False)
        else:
            z, penalty = _block(weight, x, gate)
        assert penalty.requires_grad
        (z.square().sum() + penalty.mean()).backward()
        return [z, penalty, x.grad, weight.grad, gate.grad]

    for ours, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, plain)


def test_autocast_keeps_the_residual_stream_in_fp32(device: str, backend: str) -> None:
    (x,), gate = leaves(device, 1), gate_on(device)
    attention, mlp = (torch.nn.Linear(D, D, device=device) for _ in range(2))
    with torch.autocast(device, torch.bfloat16):
        attn_out = attention(x)
        mlp_out = mlp(x)
        assert attn_out.dtype == torch.bfloat16
        z, diff_norm, x_norm = gated_branch(x, attn_out, mlp_out, gate, norm="l2", ref_norm=True)
        loss = z.square().mean() + (diff_norm / x_norm).mean()
    assert z.dtype == diff_norm.dtype == x_norm.dtype == torch.float32
    plain, _, _ = gated_branch(x, attn_out, mlp_out, gate, norm="l2")
    assert torch.equal(z, plain)
    loss.backward()
    learners = (x, gate, *attention.parameters(), *mlp.parameters())
    assert all(t.grad.dtype == torch.float32 and (t.grad != 0).any() for t in learners)


def _both_ops(x: Tensor, attn_out: Tensor, mlp_out: Tensor, gate: Tensor) -> Any:
    z, branch_norm, _ = gated_branch(x, attn_out, mlp_out, gate, norm="l2", ref_norm=True)
    z, difference_norm, x_norm = gated_difference(z, z + attn_out, gate, ref_norm=True)
    return z.square().sum() + branch_norm.sum() + (difference_norm / x_norm).sum()


def test_torch_compile_takes_the_reference_in_one_graph(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the warning of `gated_difference` is given while it traces."""
    monkeypatch.delenv("TRSP_KERNELS", raising=False)
    monkeypatch.setattr(gated_difference_module, "_cancellation_warned", False)
    torch.compiler.reset()

    def run(function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [*leaves(device, 3, torch.bfloat16), gate_on(device)]
        loss = function(*inputs)
        loss.backward()
        return [loss, *(tensor.grad for tensor in inputs)]

    compiled = torch.compile(_both_ops, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match=DIFFERENCE_WARNING):
        ours = run(compiled)
    for one, plain in zip(ours, run(_both_ops), strict=True):
        torch.testing.assert_close(one, plain)


def test_a_forced_kernel_is_refused_under_torch_compile(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    torch.compiler.reset()
    compiled: Any = torch.compile(_both_ops, backend="aot_eager")
    with pytest.raises(ValueError, match=r"impossible here: torch.compile is tracing"):
        compiled(*leaves(device, 3), gate_on(device))


@pytest.mark.parametrize("gate_kind", ["residual", "output"])
@pytest.mark.parametrize("norm", [None, "l1", "l2", "l2_squared"])
@pytest.mark.parametrize("form", ["two branches", "one branch", "difference"])
def test_gradcheck_of_the_reference(form: str, norm: Any, gate_kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    num_streams = 3 if form == "two branches" else 2
    inputs = [
        torch.randn(2, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(num_streams)
    ]
    gate = torch.full((1,), 0.6, dtype=torch.float64, requires_grad=True)

    def differentiable_outputs(*arguments: Tensor) -> tuple[Tensor, ...]:
        *streams, s = arguments
        if form == "difference":
            triple = gated_difference_reference(*streams, s, gate_kind=gate_kind, norm=norm)
        else:
            branches = streams if form == "two branches" else (*streams, None)
            triple = gated_branch_reference(*branches, s, gate_kind=gate_kind, norm=norm)
        return tuple(tensor for tensor in triple if tensor is not None)

    assert torch.autograd.gradcheck(differentiable_outputs, [*inputs, gate])


def test_cancellation_is_warned_of_once(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(gated_difference_module, "_cancellation_warned", False)
    half, full = leaves(device, 2, torch.bfloat16), leaves(device, 2)
    gate = gate_on(device)

    def warned() -> list[str]:
        texts = [str(warning.message) for warning in recwarn]
        recwarn.clear()
        return [text for text in texts if text.startswith(DIFFERENCE_WARNING)]

    gated_difference(*full, gate, norm="l2")
    gated_difference(*half, gate, norm=None)
    assert warned() == []
    gated_difference(*half, gate, norm="l2")
    assert len(warned()) == 1
    gated_difference(*half, gate, norm="l2")
    assert warned() == []
