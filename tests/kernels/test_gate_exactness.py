"""What both gate ops promise to the bit: the ends of the gate, the rounding, the repeat.

T tokens, D hidden size.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from trsp.kernels import gated_branch as gated_branch_module
from trsp.kernels import gated_difference as gated_difference_module

# Any: each test knows which outputs and gradients it asked for.
gated_branch: Any = gated_branch_module.gated_branch
gated_difference: Any = gated_difference_module.gated_difference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
T, D = 4, 100
pytestmark = [
    pytest.mark.filterwarnings("ignore:gated_difference measures"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def draw(device: str, dtype: torch.dtype, num_tensors: int, scale: float = 1.0) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(num_tensors, T, D, generator=generator) * scale
    return [tensor.to(device, dtype) for tensor in tensors]


def gate_of(value: float, device: str) -> Tensor:
    return torch.tensor([float(value)], device=device)


def bits(tensor: Tensor) -> Tensor:
    """The stored bits: unlike values, they tell -0 from 0 and compare NaN."""
    return tensor.contiguous().view(torch.uint8)


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(bits(first), bits(second))


def hostile(x: Tensor) -> Tensor:
    """x with the values that arithmetic on y - x and 0 * y does not give back."""
    special = torch.tensor([0.0, -0.0, 1e-6, 6e4, -6e4], device=x.device, dtype=x.dtype)
    x = x.clone()
    x.view(-1)[: special.numel()] = special
    return x


@pytest.mark.parametrize("norm", [None, "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_one_is_the_unmodified_layer(
    device: str, backend: str, dtype: torch.dtype, norm: str | None
) -> None:
    x, attn_out, mlp_out = draw(device, dtype, 3)
    x, attn_out = hostile(x), hostile(attn_out).flip(0)
    one = gate_of(1, device)
    assert same_bits(gated_branch(x, attn_out, mlp_out, one, norm=norm)[0], x + attn_out + mlp_out)
    assert same_bits(gated_branch(x, attn_out, None, one, norm=norm)[0], x + attn_out)
    # y far below x: y - x cannot hold it.
    y = hostile(attn_out) * 1e-6
    assert same_bits(gated_difference(x, y, one, norm=norm)[0], y)
    assert same_bits(gated_difference(x, y, one, gate_kind="output", norm=norm)[0], y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_zero_is_the_layer_s_input(device: str, backend: str, dtype: torch.dtype) -> None:
    x, attn_out, mlp_out = draw(device, dtype, 3)
    x, mlp_out = hostile(x), hostile(mlp_out)
    # A removed layer that overflows is still removed.
    attn_out[1, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    zero = gate_of(0, device)
    assert same_bits(gated_branch(x, attn_out, mlp_out, zero)[0], x)
    assert same_bits(gated_branch(x, attn_out, None, zero)[0], x)
    assert same_bits(gated_difference(x, x + attn_out, zero)[0], x)


def test_gate_one_over_an_fp32_residual_stream(device: str, backend: str) -> None:
    (x,) = draw(device, torch.float32, 1)
    attn_out, mlp_out = draw(device, torch.bfloat16, 2)
    z, _, _ = gated_branch(x, attn_out, mlp_out, gate_of(1, device))
    assert same_bits(z, x + attn_out + mlp_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_reference_agree_to_the_bit(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """z and the gradients that no sum enters; a norm's last bit depends on the order of adding."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    streams, gate = draw(device, dtype, 3), gate_of(0.7, device)
    dz, norm_grad = draw(device, dtype, 1)[0].flip(0), torch.arange(T, device=device) - 1.5

    def run(op: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        z, diff_norm, _ = op(*leaves, gate, norm="l1")
        grads = torch.autograd.grad([z, diff_norm], leaves, [dz, norm_grad])
        return z, *grads

    for kernel, reference, inputs in (
        (gated_branch, gated_branch_module.gated_branch_reference, streams),
        (gated_difference, gated_difference_module.gated_difference_reference, streams[:2]),
    ):
        for ours, theirs in zip(run(kernel, *inputs), run(reference, *inputs), strict=True):
            assert same_bits(ours, theirs)


def test_rounds_to_nearest_even(device: str, backend: str) -> None:
    """Every bf16 number and its neighbours in fp32, ties and subnormals among them."""
    patterns = torch.arange(65536, dtype=torch.int32).view(16, 4096) << 16
    near = (patterns + torch.tensor([0, 0x7FFF, 0x8000, 0x8001]).repeat(1024)).int()
    dz = near.view(torch.float32).nan_to_num(nan=1.0).to(device)
    x = torch.zeros_like(dz)
    attn_out = torch.zeros(16, 4096, device=device, dtype=torch.bfloat16, requires_grad=True)
    z, _, _ = gated_branch(x, attn_out, None, gate_of(1, device), norm=None)
    (dbranch,) = torch.autograd.grad(z, attn_out, dz)
    assert same_bits(dbranch, dz.to(torch.bfloat16))


def test_widens_every_bf16_number(device: str, backend: str) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(16, 4096)
    attn_out = patterns.view(torch.bfloat16).nan_to_num(nan=1.0).to(device)
    x = torch.zeros(16, 4096, device=device)
    z, _, _ = gated_branch(x, attn_out, None, gate_of(1, device), norm=None)
    assert torch.equal(z, attn_out.float())


def test_norm_of_branches_does_not_cancel(device: str, backend: str) -> None:
    """At 1e-3 of x a bf16 y - x is mostly 0; a + m has all its bits, and so has its gradient."""
    (x,) = draw(device, torch.bfloat16, 1)
    attn_out, mlp_out = (t.requires_grad_() for t in draw(device, torch.bfloat16, 2, scale=1e-3))
    d = (attn_out.double() + mlp_out.double()).detach()
    truth = d.norm(dim=-1)
    through_y = ((x + attn_out + mlp_out).double() - x.double()).norm(dim=-1)
    assert ((through_y - truth).abs() > 0.05 * truth).all()
    _, diff_norm, _ = gated_branch(x, attn_out, mlp_out, gate_of(0.5, device), norm="l2")
    torch.testing.assert_close(diff_norm.double(), truth, rtol=1e-6, atol=0)
    diff_norm.sum().backward()
    # d is stored in bf16 and the gradient again.
    direction = d / truth.unsqueeze(-1)
    torch.testing.assert_close(attn_out.grad.double(), direction, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_a_layer_that_moves_nothing_gets_no_penalty_gradient(
    device: str, backend: str, norm: str
) -> None:
    x, attn_out, dz = draw(device, torch.float32, 3)
    attn_out[1] = 0
    branch = attn_out.clone().requires_grad_()
    z, diff_norm, _ = gated_branch(x, branch, None, gate_of(0.5, device), norm=norm)
    torch.autograd.backward([z, diff_norm], [dz, torch.ones_like(diff_norm)])
    assert diff_norm[1] == 0
    assert same_bits(branch.grad[1], 0.5 * dz[1])
    assert branch.grad.isfinite().all()

    y = (x + attn_out).requires_grad_()
    x.requires_grad_()
    z, diff_norm, _ = gated_difference(x, y, gate_of(0.5, device), norm=norm)
    torch.autograd.backward([z, diff_norm], [dz, torch.ones_like(diff_norm)])
    assert diff_norm[1] == 0
    assert same_bits(x.grad[1], 0.5 * dz[1])
    assert same_bits(y.grad[1], 0.5 * dz[1])
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_a_large_dz_does_not_round_the_penalty_away(device: str, backend: str, norm: str) -> None:
    """At gate 1 x's gradient is -c, whatever dz: dz - (dz + c) would give 0 here."""
    x, y, dz = draw(device, torch.float32, 3)
    x, y = x.requires_grad_(), y.requires_grad_()
    one = gate_of(1, device)
    z, diff_norm, _ = gated_difference(x, y, one, norm=norm)
    weights = torch.full_like(diff_norm, 1e-3)
    together = torch.autograd.grad([z, diff_norm], x, [dz * 1e8, weights])[0]
    alone = torch.autograd.grad(gated_difference(x, y, one, norm=norm)[1], x, weights)[0]
    assert (alone != 0).all()
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_second_run_is_bit_equal(device: str, backend: str, dtype: torch.dtype) -> None:
    streams = draw(device, dtype, 3)

    def run(op: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.clone().requires_grad_() for tensor in (*inputs, gate_of(0.7, device))]
        z, diff_norm, x_norm = op(*leaves, norm="l2", ref_norm=True)
        (z.float().square().sum() + diff_norm.sum()).backward()
        return z, diff_norm, x_norm, *(leaf.grad for leaf in leaves)

    for op, inputs in ((gated_branch, streams), (gated_difference, streams[:2])):
        for first, second in zip(run(op, *inputs), run(op, *inputs), strict=True):
            assert same_bits(first, second)
