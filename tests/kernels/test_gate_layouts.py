"""The gate ops on any shape and stride: the result is that of plain [T, D] tensors.

T tokens, D hidden size.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trsp.kernels.gated_branch import gated_branch
from trsp.kernels.gated_difference import gated_difference

D = 40


def padded_rows(tensor: Tensor) -> Tensor:
    """A row stride of D + 3, and a first element that is not aligned to 16 bytes."""
    wide = torch.full((*tensor.shape[:-1], D + 3), torch.nan, device=tensor.device)
    wide[..., 1 : D + 1] = tensor
    return wide[..., 1 : D + 1]


def strided_columns(tensor: Tensor) -> Tensor:
    """D is not the fastest dimension."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other_token(tensor: Tensor) -> Tensor:
    """Leading dimensions that no single row stride describes."""
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


LAYOUTS = (padded_rows, strided_columns, every_other_token)


def run(op: Any, inputs: list[Tensor], dz: Tensor) -> list[Tensor]:
    """Outputs and gradients of one call in which every tensor learns."""
    *streams, gate = [tensor.detach().requires_grad_() for tensor in inputs]
    z, diff_norm, x_norm = op(*streams, gate, norm="l2", ref_norm=True)
    norm_grad = torch.arange(1.0, diff_norm.numel() + 1, device=z.device).view(diff_norm.shape)
    torch.autograd.backward([z, diff_norm], [dz, norm_grad])
    return [z, diff_norm, x_norm, *(tensor.grad for tensor in (*streams, gate))]


def problem(device: str, op: Any, *shape: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_streams = 3 if op is gated_branch else 2
    *streams, dz = torch.randn(num_streams + 1, *shape, generator=generator).to(device)
    return [*streams, torch.full((1,), 0.7, device=device)], dz


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", [gated_branch, gated_difference])
def test_strides_change_nothing(
    device: str, backend: str, op: Any, layout: Callable[[Tensor], Tensor]
) -> None:
    inputs, dz = problem(device, op, 2, 2, D)
    strided = [layout(stream) for stream in inputs[:-1]]
    assert not any(stream.is_contiguous() for stream in strided)
    ours = run(op, [*strided, inputs[-1]], layout(dz))
    for one, plain in zip(ours, run(op, inputs, dz), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, D), (3, 2, D), (1, 2, 3, D)])
@pytest.mark.parametrize("op", [gated_branch, gated_difference])
def test_leading_dimensions_are_tokens(
    device: str, backend: str, op: Any, shape: tuple[int, ...]
) -> None:
    inputs, dz = problem(device, op, 6, D)
    shaped = [stream.view(shape) for stream in inputs[:-1]]
    ours, plain = run(op, [*shaped, inputs[-1]], dz.view(shape)), run(op, inputs, dz)
    assert ours[1].shape == shape[:-1]
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.parametrize("op", [gated_branch, gated_difference])
def test_a_single_vector_is_one_token(device: str, backend: str, op: Any) -> None:
    inputs, dz = problem(device, op, D)
    ours = run(op, inputs, dz)
    plain = run(op, [*(stream.view(1, D) for stream in inputs[:-1]), inputs[-1]], dz.view(1, D))
    assert ours[1].shape == ()
    for one, other in zip(ours, plain, strict=True):
        assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D)])
@pytest.mark.parametrize("op", [gated_branch, gated_difference])
def test_an_empty_batch_launches_nothing(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch, op: Any, shape: tuple[int, ...]
) -> None:
    if backend == "triton":
        from trsp.kernels import gated_branch_triton, gated_difference_triton

        for module in (gated_branch_triton, gated_difference_triton):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, None)
    inputs, dz = problem(device, op, *shape)
    z, diff_norm, x_norm, *stream_grads, dgate = run(op, inputs, dz)
    assert z.shape == shape
    assert diff_norm.shape == x_norm.shape == shape[:-1]
    assert all(grad.shape == shape for grad in stream_grads)
    assert dgate.tolist() == [0.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 18 GB on a CUDA device")
def test_rows_beyond_two_to_the_31_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    num_tokens, hidden_size = 2**19 + 3, 4096
    x = torch.zeros(num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
    attn_out = torch.zeros_like(x)
    x[-1], attn_out[-1] = 1, 2
    attn_out.requires_grad_()
    gate = torch.full((1,), 0.5, device="cuda")
    op: Any = gated_branch
    z, diff_norm, _ = op(x, attn_out, None, gate, norm="l1")
    diff_norm.sum().backward()
    assert (z[-1] == 2).all()
    assert diff_norm[-1] == 2 * hidden_size
    assert attn_out.grad is not None
    assert (attn_out.grad[-1] == 1).all()
