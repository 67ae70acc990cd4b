"""Where an op runs, and with how many threads: the dispatch and the launch table.

T tokens (rows), D hidden size.
"""

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["triton", "reference"]

_SETTING = "TRSP_KERNELS"
_MAX_BLOCK = 1024
# 8 elements a thread: one 128-bit access in 16-bit dtypes, two in fp32.
_ELEMENTS_PER_WARP = 256
# A norm needs its whole row before it can write: registers hold it, 8 elements a thread. A backward
# also holds its part of the weight's gradient: 32 warps of 64 registers would spill.
_ROW_ELEMENTS_PER_WARP = 256
_MAX_ROW_WARPS = 32
_MAX_ROW_BACKWARD_WARPS = 16
MAX_ROW = 8192
# Left alone, ptxas aims at more resident warps and spills a register for them, or takes 139.
_MAX_REGISTERS = 64
_MAX_ROW_BACKWARD_REGISTERS = 128
# 128 registers a thread fill a multiprocessor with 16 warps.
_RESIDENT_ROW_WARPS = 16


@dataclass(frozen=True)
class Launch:
    """One kernel's compile-time shape; `options()` are keywords of every launch."""

    block: int
    num_warps: int
    max_registers: int

    def options(self) -> dict[str, int | bool]:
        """Block and compiler options, each explicit.

        Multiply-add fusion is off: the kernels are bound by memory, and without it the residual
        stream is bit-equal to the reference on every device and Triton version.
        """
        return {
            "BLOCK": self.block,
            "num_warps": self.num_warps,
            "num_stages": 1,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": False,
        }


def gate_launch(hidden_size: int) -> Launch:
    """The launch of a gate kernel: one program a row, looping over blocks of D."""
    block = min(_MAX_BLOCK, 1 << (hidden_size - 1).bit_length())
    return Launch(block, max(1, block // _ELEMENTS_PER_WARP), _MAX_REGISTERS)


def row_forward_launch(hidden_size: int) -> Launch:
    """The launch of a forward that holds a row of at most MAX_ROW elements in registers."""
    return _row_launch(hidden_size, _MAX_ROW_WARPS, _MAX_REGISTERS)


def row_backward_launch(hidden_size: int) -> Launch:
    """The same of a backward: fewer warps with twice the registers."""
    return _row_launch(hidden_size, _MAX_ROW_BACKWARD_WARPS, _MAX_ROW_BACKWARD_REGISTERS)


def _row_launch(hidden_size: int, max_warps: int, max_registers: int) -> Launch:
    block = 1 << (hidden_size - 1).bit_length()
    num_warps = min(max_warps, max(1, block // _ROW_ELEMENTS_PER_WARP))
    return Launch(block, num_warps, max_registers)


def num_row_programs(x: Tensor, num_rows: int, launch: Launch) -> int:
    """Programs that stay resident and share the rows, so that each sums its part of dweight."""
    multiprocessors = (
        torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    )
    return min(num_rows, multiprocessors * (_RESIDENT_ROW_WARPS // launch.num_warps))


def choose_backend(x: Tensor) -> Backend:
    """Triton for CUDA tensors outside torch.compile, else the reference; TRSP_KERNELS overrides.

    `auto` takes the reference for what Triton cannot run here (CPU tensors, float64, a traced
    graph, no Triton installed); `triton` makes the same an error.

    Raises:
        ValueError: TRSP_KERNELS is not auto, triton or reference, or it forces the impossible.
    """
    setting = os.environ.get(_SETTING, "auto")
    if setting not in ("auto", "triton", "reference"):
        raise ValueError(f"{_SETTING}={setting!r}; choose auto, triton or reference")
    if setting == "reference" or (setting == "auto" and not x.is_cuda):
        return "reference"
    obstacle = _triton_obstacle(x)
    if obstacle is None:
        return "triton"
    if setting == "triton":
        raise ValueError(f"{_SETTING}=triton is impossible here: {obstacle}; set {_SETTING}=auto")
    return "reference"


def as_rows(tensor: Tensor) -> Tensor:
    """[..., D] as [T, D] with unit stride in D: a view where strides allow it, else a copy."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def contiguous_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """An unset tensor of the same shape and device, contiguous whatever the strides of `tensor`."""
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)


def _triton_obstacle(x: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and an opaque kernel would end its fusion"
    if not _triton_is_installed():
        return "triton is not installed (it exists for Linux: pip install triton)"
    if x.dtype == torch.float64:
        return "the kernels have no float64"
    if not x.is_cuda and not _triton_interprets():
        return f"the tensors are on {x.device}, not on CUDA"
    return None


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
