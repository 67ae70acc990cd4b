"""Where an op runs: TRSP_KERNELS, what each choice needs, and the launch table."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trsp.kernels import launch
from trsp.kernels.gated_branch import gated_branch, gated_branch_reference
from trsp.kernels.gated_branch_rmsnorm import gated_branch_rmsnorm
from trsp.kernels.gated_difference import gated_difference

X = torch.ones(2, 8)
GATE = torch.ones(1)
CALLS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda x: gated_branch(x, x, None, GATE),
    lambda x: gated_branch_rmsnorm(x, x, None, GATE, x[0], eps=1e-6, convention="llama"),
    lambda x: gated_difference(x, x, GATE),
)
needs_triton = pytest.mark.skipif(
    not launch._triton_is_installed(), reason="triton is not installed"
)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without Triton, as macOS is."""
    monkeypatch.setitem(sys.modules, "triton", None)
    launch._triton_is_installed.cache_clear()
    yield
    launch._triton_is_installed.cache_clear()


class OnCuda:
    """The part of a CUDA tensor that the choice reads."""

    is_cuda = True
    dtype = torch.bfloat16
    device = "cuda:0"


@pytest.mark.parametrize("setting", [None, "auto", "reference"])
def test_cpu_tensors_take_the_reference(
    monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    monkeypatch.delenv("TRSP_KERNELS", raising=False)
    if setting is not None:
        monkeypatch.setenv("TRSP_KERNELS", setting)
    assert launch.choose_backend(X) == "reference"


@needs_triton
def test_cuda_tensors_take_triton_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, backend in {
        "auto": "triton",
        "triton": "triton",
        "reference": "reference",
    }.items():
        monkeypatch.setenv("TRSP_KERNELS", setting)
        assert launch.choose_backend(OnCuda()) == backend  # type: ignore[arg-type]


def test_cuda_without_triton_takes_the_reference(
    monkeypatch: pytest.MonkeyPatch, no_triton: None
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "auto")
    assert launch.choose_backend(OnCuda()) == "reference"  # type: ignore[arg-type]


def test_an_unknown_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "cuda")
    with pytest.raises(ValueError, match="TRSP_KERNELS='cuda'; choose auto, triton or reference"):
        gated_branch(X, X, None, GATE)


def test_forced_triton_without_triton_is_refused(
    monkeypatch: pytest.MonkeyPatch, no_triton: None
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"triton is not installed.*set TRSP_KERNELS=auto"):
        gated_branch(X, X, None, GATE)


@needs_triton
@pytest.mark.parametrize("call", CALLS)
def test_forced_triton_on_cpu_tensors_is_refused(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[torch.Tensor], Any]
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the tensors are on cpu, not on CUDA"):
        call(X)


@needs_triton
@pytest.mark.parametrize("call", CALLS)
def test_forced_triton_in_float64_is_refused(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[torch.Tensor], Any]
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    with pytest.raises(ValueError, match="the kernels have no float64"):
        call(X.double())


@needs_triton
def test_the_choice_reaches_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trsp.kernels import gated_branch_triton

    x, gate = X.to(device), GATE.to(device)
    monkeypatch.setattr(gated_branch_triton, "_gated_branch_forward_kernel", None)
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    with pytest.raises(TypeError, match="NoneType"):
        gated_branch(x, x, None, gate)
    gated_branch_reference(x, x, None, gate)
    monkeypatch.setenv("TRSP_KERNELS", "reference")
    gated_branch(x, x, None, gate)


def test_the_reference_needs_no_triton() -> None:
    """In a fresh process: the ops import, run and learn on CPU where Triton cannot be imported."""
    program = """
import sys
sys.modules["triton"] = None
import torch
from trsp.kernels.gated_branch import gated_branch
from trsp.kernels.gated_branch_rmsnorm import gated_branch_rmsnorm
from trsp.kernels.gated_difference import gated_difference
x = torch.ones(2, 8, requires_grad=True)
gate = torch.ones(1, requires_grad=True)
z, norm, _ = gated_branch(x, x, x, gate, norm="l2")
z, normed, _, _ = gated_branch_rmsnorm(z, x, x, gate, x[0], eps=1e-6, convention="gemma")
z, other, _ = gated_difference(x, z, gate)
(z.sum() + normed.sum() + norm.sum() + other.sum()).backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("hidden_size", "block", "num_warps"),
    [(1, 1, 1), (60, 64, 1), (512, 512, 2), (768, 1024, 4), (1024, 1024, 4), (5120, 1024, 4)],
)
def test_launch_table(hidden_size: int, block: int, num_warps: int) -> None:
    assert launch.gate_launch(hidden_size) == launch.Launch(block, num_warps, 64)
    assert launch.gate_launch(hidden_size).options()["enable_fp_fusion"] is False


@pytest.mark.parametrize(
    ("hidden_size", "block", "forward_warps", "backward_warps"),
    [(1, 1, 1, 1), (60, 64, 1, 1), (1025, 2048, 8, 8), (4096, 4096, 16, 16), (8192, 8192, 32, 16)],
)
def test_launch_table_of_whole_rows(
    hidden_size: int, block: int, forward_warps: int, backward_warps: int
) -> None:
    forward = launch.row_forward_launch(hidden_size)
    backward = launch.row_backward_launch(hidden_size)
    assert forward == launch.Launch(block, forward_warps, 64)
    assert backward == launch.Launch(block, backward_warps, 128)
    # A multiprocessor has 65536 registers: what is asked for must fit, or nothing launches.
    for shape in (forward, backward):
        assert shape.num_warps * 32 * shape.max_registers <= 65536
        assert shape.options()["enable_fp_fusion"] is False


@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "num_programs"),
    [(0, 4096, 0), (5, 4096, 5), (65536, 2048, 264), (65536, 8192, 132), (65536, 64, 132 * 16)],
)
def test_programs_that_share_the_rows(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, hidden_size: int, num_programs: int
) -> None:
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    shape = launch.row_backward_launch(hidden_size)
    x: Any = OnCuda()
    assert launch.num_row_programs(x, num_rows, shape) == num_programs
