"""Where an op runs: TRSP_KERNELS, what each choice needs, and the launch table."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from trsp.kernels import launch
from trsp.kernels.gated_branch import gated_branch, gated_branch_reference

X = torch.ones(2, 8)
GATE = torch.ones(1)
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
def test_forced_triton_on_cpu_tensors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the tensors are on cpu, not on CUDA"):
        gated_branch(X, X, None, GATE)


@needs_triton
def test_forced_triton_in_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRSP_KERNELS", "triton")
    with pytest.raises(ValueError, match="the kernels have no float64"):
        gated_branch(X.double(), X.double(), None, GATE)


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
from trsp.kernels.gated_difference import gated_difference
x = torch.ones(2, 8, requires_grad=True)
gate = torch.ones(1, requires_grad=True)
z, norm, _ = gated_branch(x, x, x, gate, norm="l2")
z, other, _ = gated_difference(x, z, gate)
(z.sum() + norm.sum() + other.sum()).backward()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("hidden_size", "block", "num_warps"),
    [(1, 1, 1), (60, 64, 1), (512, 512, 2), (768, 1024, 4), (1024, 1024, 4), (5120, 1024, 4)],
)
def test_launch_table(hidden_size: int, block: int, num_warps: int) -> None:
    assert launch.gate_launch(hidden_size) == launch.Launch(block, num_warps)
    assert launch.gate_launch(hidden_size).options()["enable_fp_fusion"] is False
