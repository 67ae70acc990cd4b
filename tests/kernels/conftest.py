"""Kernels without a GPU run under Triton's interpreter (tests/conftest.py); with one, on it."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETS = HAS_TRITON and not torch.cuda.is_available()


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(
    params=[
        "reference",
        pytest.param(
            "triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
        ),
    ]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on both backends."""
    monkeypatch.setenv("TRSP_KERNELS", request.param)
    return str(request.param)


@pytest.fixture
def saved_by() -> Callable[[Callable[[], Any]], list[Tensor]]:
    """The tensors that autograd keeps for the backward of a call."""

    def saved_by_call(call: Callable[[], Any]) -> list[Tensor]:
        saved: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call()
        return saved

    return saved_by_call


@pytest.fixture(autouse=True)
def interpreting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within these tests CPU tensors may enter a kernel."""
    if INTERPRETS:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty is full of NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def rounding_as_on_a_gpu() -> Iterator[None]:
    """Triton's interpreter truncates fp32 to bf16 and loses bf16's subnormals; torch does not."""
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETS:
            from triton.runtime import interpreter

            convert = _converting_bf16_like_torch(interpreter._convert_float)
            patch.setattr(interpreter, "_convert_float", convert)
        yield


def _converting_bf16_like_torch(convert: Callable[..., Any]) -> Callable[..., Any]:
    def convert_float(data: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source.is_fp32() and target.is_bf16():
            rounded = torch.from_numpy(np.array(data)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view(np.uint16)
        if source.is_bf16() and target.is_fp32():
            return data.astype(np.uint32) << 16
        return convert(data, source, target, rounding_mode)

    return convert_float
