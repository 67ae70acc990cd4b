"""The gate ops on any shape and stride: the result is that of plain [T, D] tensors.

T tokens, D hidden size.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trsp.kernels.gated_branch import gated_branch
from trsp.kernels.gated_branch_rmsnorm import gated_branch_rmsnorm
from trsp.kernels.gated_difference import gated_difference

D = 40
OPS = (gated_branch, gated_branch_rmsnorm, gated_difference)


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


def every_third_element(vector: Tensor) -> Tensor:
    return vector.repeat_interleave(3)[::3]


LAYOUTS = (padded_rows, strided_columns, every_other_token)


Problem = tuple[list[Tensor], list[Tensor], list[Tensor]]


def problem(device: str, op: Any, *shape: int) -> Problem:
    """The op's streams, its vectors (gate, weight of the norm), and gradients of shape [..., D]."""
    generator = torch.Generator().manual_seed(0)
    num_streams = 2 if op is gated_difference else 3
    tensors = torch.randn(num_streams + 2, *shape, generator=generator).to(device)
    vectors = [torch.full((1,), 0.7, device=device)]
    grads = [*tensors[num_streams:]]
    if op is gated_branch_rmsnorm:
        vectors.append(torch.linspace(-1, 2, shape[-1], device=device))
    else:
        grads.pop()
    return [*tensors[:num_streams]], vectors, grads


def run(op: Any, streams: list[Tensor], vectors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of one call in which every tensor learns."""
    inputs = [tensor.detach().requires_grad_() for tensor in (*streams, *vectors)]
    choices = {"eps": 1e-6, "convention": "llama"} if op is gated_branch_rmsnorm else {}
    *outputs, diff_norm, x_norm = op(*inputs, **choices, norm="l2", ref_norm=True)
    norm_grad = torch.arange(1.0, diff_norm.numel() + 1, device=grads[0].device)
    torch.autograd.backward([*outputs, diff_norm], [*grads, norm_grad.view(diff_norm.shape)])
    return [*outputs, diff_norm, x_norm, *(tensor.grad for tensor in inputs)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_strides_change_nothing(
    device: str, backend: str, op: Any, layout: Callable[[Tensor], Tensor]
) -> None:
    streams, vectors, grads = problem(device, op, 2, 2, D)
    strided = [layout(stream) for stream in streams]
    assert not any(stream.is_contiguous() for stream in strided)
    ours = run(op, strided, vectors, [layout(grad) for grad in grads])
    for one, plain in zip(ours, run(op, streams, vectors, grads), strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, D), (3, 2, D), (1, 2, 3, D)])
@pytest.mark.parametrize("op", OPS)
def test_leading_dimensions_are_tokens(
    device: str, backend: str, op: Any, shape: tuple[int, ...]
) -> None:
    streams, vectors, grads = problem(device, op, 6, D)
    shaped = [[tensor.view(shape) for tensor in tensors] for tensors in (streams, grads)]
    ours = run(op, shaped[0], vectors, shaped[1])
    assert ours[len(grads)].shape == shape[:-1]
    for one, other in zip(ours, run(op, streams, vectors, grads), strict=True):
        assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.parametrize("op", OPS)
def test_a_single_vector_is_one_token(device: str, backend: str, op: Any) -> None:
    streams, vectors, grads = problem(device, op, D)
    ours = run(op, streams, vectors, grads)
    rows = [[tensor.view(1, D) for tensor in tensors] for tensors in (streams, grads)]
    assert ours[len(grads)].shape == ()
    for one, other in zip(ours, run(op, rows[0], vectors, rows[1]), strict=True):
        assert torch.equal(one.flatten(), other.flatten())


@pytest.mark.parametrize("layout", [every_third_element, padded_rows])
def test_a_strided_weight_changes_nothing(
    device: str, backend: str, layout: Callable[[Tensor], Tensor]
) -> None:
    op = gated_branch_rmsnorm
    streams, (gate, weight), grads = problem(device, op, 3, D)
    ours = run(op, streams, [gate, layout(weight)], grads)
    for one, plain in zip(ours, run(op, streams, [gate, weight], grads), strict=True):
        assert torch.equal(one, plain)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_stride_zero(device: str, backend: str, op: Any) -> None:
    """What `sum().backward()` sends back: one number with all strides 0, or one row for all."""
    streams, vectors, grads = problem(device, op, 3, D)
    for small in ([grad[:1, :1] for grad in grads], [grad[:1] for grad in grads]):
        expanded = [grad.expand(3, D) for grad in small]
        plain = [grad.contiguous() for grad in expanded]
        assert all(grad.stride(0) == 0 for grad in expanded)
        for one, other in zip(
            run(op, streams, vectors, expanded), run(op, streams, vectors, plain), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D)])
@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_launches_nothing(
    device: str, backend: str, monkeypatch: pytest.MonkeyPatch, op: Any, shape: tuple[int, ...]
) -> None:
    if backend == "triton":
        from trsp.kernels import (
            gated_branch_rmsnorm_triton,
            gated_branch_triton,
            gated_difference_triton,
        )

        for module in (gated_branch_triton, gated_branch_rmsnorm_triton, gated_difference_triton):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, None)
    streams, vectors, grads = problem(device, op, *shape)
    results = run(op, streams, vectors, grads)
    outputs, (diff_norm, x_norm, *learned) = results[: len(grads)], results[len(grads) :]
    assert all(output.shape == shape for output in outputs)
    assert diff_norm.shape == x_norm.shape == shape[:-1]
    assert all(grad.shape == shape for grad in learned[: len(streams)])
    for grad, vector in zip(learned[len(streams) :], vectors, strict=True):
        assert torch.equal(grad, torch.zeros_like(vector))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the test below")
@pytest.mark.filterwarnings("ignore:gated_difference measures")
@pytest.mark.parametrize("op", OPS)
def test_row_offsets_beyond_31_bits(backend: str, tmp_path: Path, op: Any) -> None:
    """Three rows far apart in a file that is 8 GiB long and, but for them, empty."""
    stride, dtype = 2**30 + 8, torch.bfloat16
    # As much before the first row as after it: an offset that wraps around reads zeros there.
    file = tmp_path / "rows"
    memory = torch.from_file(str(file), shared=True, size=4 * stride + 8 * D, dtype=dtype)
    file.unlink()
    streams, vectors, _ = problem("cpu", op, 3, D)
    vectors = [vector.to(dtype) if vector.numel() > 1 else vector for vector in vectors]
    near = [stream.to(dtype) for stream in streams]
    far = [
        memory.as_strided((3, D), (stride, 1), 2 * stride + index * 2 * D)
        for index in range(len(near))
    ]
    for there, here in zip(far, near, strict=True):
        there.copy_(here)
    choices = {"eps": 1e-6, "convention": "llama"} if op is gated_branch_rmsnorm else {}
    for one, other in zip(
        op(*far, *vectors, **choices), op(*near, *vectors, **choices), strict=True
    ):
        assert one is other is None or torch.equal(one, other)


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
