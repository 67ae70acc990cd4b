"""What the gate ops promise to the bit: the ends of the gate, the rounding, the repeat.

T tokens, D hidden size.
"""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trsp.kernels import gated_branch as gated_branch_module
from trsp.kernels import gated_branch_rmsnorm as gated_branch_rmsnorm_module
from trsp.kernels import gated_difference as gated_difference_module
from trsp.kernels import launch

# Any: each test knows which outputs and gradients it asked for.
gated_branch: Any = gated_branch_module.gated_branch
gated_branch_rmsnorm: Any = gated_branch_rmsnorm_module.gated_branch_rmsnorm
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


def weight_of(device: str, dtype: torch.dtype, hidden_size: int = D) -> Any:
    """The weight of a norm: around 1, some of it negative."""
    generator = torch.Generator().manual_seed(1)
    return (1 + torch.randn(hidden_size, generator=generator)).to(device, dtype)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_second_run_before_an_rmsnorm_is_bit_equal(
    device: str, backend: str, dtype: torch.dtype
) -> None:
    """The weight's gradient too, with rows for more than one round of the programs."""
    hidden_size = 2048
    generator = torch.Generator().manual_seed(0)
    streams = torch.randn(3, 7, hidden_size, generator=generator).to(device, dtype)

    def run() -> tuple[Tensor, ...]:
        inputs = (*streams, gate_of(0.7, device), weight_of(device, dtype, hidden_size))
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        z, normed, diff_norm, x_norm = gated_branch_rmsnorm(
            *leaves, eps=1e-6, convention="llama", norm="l2", ref_norm=True
        )
        (z.float().square().sum() + normed.float().square().sum() + diff_norm.sum()).backward()
        return z, normed, diff_norm, x_norm, *(leaf.grad for leaf in leaves)

    for first, second in zip(run(), run(), strict=True):
        assert same_bits(first, second)


@pytest.mark.parametrize("need_rest", [False, True])
def test_the_weight_s_gradient_is_summed_in_a_fixed_order(device: str, need_rest: bool) -> None:
    """Program p adds rows p, p + P, ... in turn, and then the P sums are added."""
    kernels = pytest.importorskip("trsp.kernels.gated_branch_rmsnorm_triton")
    num_rows, hidden_size = 7, 2048
    generator = torch.Generator().manual_seed(0)
    dnormed, z = torch.randn(2, num_rows, hidden_size, generator=generator).to(device)
    rstd = z.square().mean(dim=-1).rsqrt()
    gradients = kernels.gated_branch_rmsnorm_backward(
        None,
        dnormed,
        z,
        rstd,
        weight_of(device, torch.float32, hidden_size),
        None,
        None,
        None,
        None,
        gate_of(0.7, device),
        convention="gemma",
        gate_kind="residual",
        norm=None,
        branch_dtype=torch.float32 if need_rest else None,
        need_dx=need_rest,
        need_dgate=False,
        need_dweight=True,
    )
    num_programs = launch.num_row_programs(z, num_rows, launch.row_backward_launch(hidden_size))
    if device == "cpu":
        assert 1 < num_programs < num_rows
    sums = torch.zeros(num_programs, hidden_size, device=device)
    for row in range(num_rows):
        sums[row % num_programs] += dnormed[row] * (z[row] * rstd[row])
    assert same_bits(gradients[3], sums.sum(dim=0))


@pytest.mark.parametrize("gate_kind", ["residual", "output"])
@pytest.mark.parametrize("gate", [0.0, 0.7, 1.0, -0.6])
@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
def test_the_gate_before_an_rmsnorm_is_gated_branch(
    device: str, backend: str, dtype: Any, gate: float, gate_kind: str
) -> None:
    """z to the bit; a norm's last bits depend on the order of adding, which a kernel changes."""
    stream, branch = (torch.float32, torch.bfloat16) if dtype == "mixed" else (dtype, dtype)
    (x,), branches = draw(device, stream, 1), draw(device, branch, 3)[1:]
    weight, s = weight_of(device, stream), gate_of(gate, device)
    choices = {"gate_kind": gate_kind, "norm": "l1", "ref_norm": True}
    for attn_out, mlp_out in (branches, (branches[0], None)):
        z, *norms = gated_branch(x, attn_out, mlp_out, s, **choices)
        ours, _, *our_norms = gated_branch_rmsnorm(
            x, attn_out, mlp_out, s, weight, eps=1e-6, convention="llama", **choices
        )
        assert same_bits(ours, z)
        for one, other in zip(our_norms, norms, strict=True):
            if backend == "reference":
                assert same_bits(one, other)
            # Equal terms, and at most D - 1 additions of them in either order.
            torch.testing.assert_close(one, other, rtol=2 * D * 2**-24, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_of_a_gate_before_an_rmsnorm(
    device: str, backend: str, dtype: torch.dtype
) -> None:
    x, attn_out, mlp_out = draw(device, dtype, 3)
    x, attn_out, weight = hostile(x), hostile(attn_out).flip(0), weight_of(device, dtype)

    def fused(*branches: Tensor, gate: float) -> Any:
        attn, *rest = branches
        s, mlp = gate_of(gate, device), rest[0] if rest else None
        return gated_branch_rmsnorm(x, attn, mlp, s, weight, eps=1e-6, convention="gemma")[:2]

    assert same_bits(fused(attn_out, mlp_out, gate=1)[0], x + attn_out + mlp_out)
    assert same_bits(fused(attn_out, gate=1)[0], x + attn_out)
    still = fused(torch.zeros_like(x), gate=0)[1]
    attn_out[1, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    for branches in ((attn_out, mlp_out), (attn_out,)):
        z, normed = fused(*branches, gate=0)
        assert same_bits(z, x)
        assert same_bits(normed, still)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "convention"),
    [
        ("Llama", "llama"),
        ("Mistral", "llama"),
        ("Qwen3", "llama"),
        ("Gemma", "gemma"),
        ("Gemma3", "gemma"),
    ],
)
def test_the_reference_s_rmsnorm_is_that_of_transformers(
    device: str, dtype: torch.dtype, family: str, convention: Any
) -> None:
    name = family.lower()
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    x, attn_out, mlp_out = draw(device, dtype, 3)
    module = getattr(modeling, f"{family}RMSNorm")(D, eps=1e-5).to(device, dtype)
    module.weight.data = weight_of(device, dtype)
    op: Any = gated_branch_rmsnorm_module.gated_branch_rmsnorm_reference
    inputs = (x, attn_out, mlp_out, gate_of(0.7, device), module.weight)
    z, normed, _, _ = op(*inputs, eps=1e-5, convention=convention)
    assert same_bits(normed, module(z))


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", ["llama", "gemma"])
def test_an_rmsnorm_rounds_where_transformers_does(
    device: str, backend: str, convention: Any, dtype: torch.dtype, scale: float
) -> None:
    """Each element lies between what the stored z gives with sums a little too small and too large.

    At a scale of 1e-3 eps is as large as the mean square.
    """
    x, attn_out, mlp_out = draw(device, dtype, 3, scale)
    weight = weight_of(device, dtype)
    inputs = (x, attn_out, mlp_out, gate_of(0.7, device), weight)
    z, normed, _, _ = gated_branch_rmsnorm(*inputs, eps=1e-6, convention=convention)
    row = z.double() / (z.double().square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    # A sum of D squares, and five more operations, each with one rounding in fp32.
    slack = (math.log2(D) + 1 + 5) * 2**-24

    def rounded(row: Tensor) -> Tensor:
        if convention == "llama":
            return weight * row.to(dtype)
        return ((1.0 + weight.float()).double() * row).to(dtype)

    ends = torch.stack([rounded(row * (1 - slack)), rounded(row * (1 + slack))])
    if dtype == torch.float32:
        # The product with the weight rounds once more, and not as in float64.
        ends = torch.stack([ends * (1 - 2**-23), ends * (1 + 2**-23)]).flatten(0, 1)
    assert (normed >= ends.amin(dim=0)).all()
    assert (normed <= ends.amax(dim=0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", ["llama", "gemma"])
def test_a_row_of_zeros_before_an_rmsnorm(
    device: str, backend: str, convention: Any, dtype: torch.dtype
) -> None:
    x, attn_out, mlp_out, dz, dnormed = draw(device, dtype, 5)
    for stream in (x, attn_out, mlp_out):
        stream[1] = 0
    inputs = (x, attn_out, mlp_out, gate_of(0.5, device), weight_of(device, dtype))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    z, normed, diff_norm, _ = gated_branch_rmsnorm(
        *leaves, eps=1.0, convention=convention, norm="l2"
    )
    grads = [dz, dnormed, torch.ones_like(diff_norm)]
    torch.autograd.backward([z, normed, diff_norm], grads)
    assert (z[1] == 0).all()
    assert (normed[1] == 0).all()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    # rstd is 1 there and nothing lies along the row.
    gain = leaves[4].detach().float() + (1 if convention == "gemma" else 0)
    expected = dz[1].float() + dnormed[1].float() * gain
    assert same_bits(leaves[0].grad[1], expected.to(dtype))
    assert same_bits(leaves[1].grad[1], (0.5 * expected).to(dtype))
