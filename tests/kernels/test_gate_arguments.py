"""A wrong argument of a gate op is refused in one line: the value, the expectation, the remedy."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trsp.kernels.gated_branch import gated_branch, gated_branch_reference
from trsp.kernels.gated_branch_rmsnorm import (
    gated_branch_rmsnorm,
    gated_branch_rmsnorm_reference,
)
from trsp.kernels.gated_difference import gated_difference, gated_difference_reference

X = torch.ones(3, 8)
HALF = torch.ones(3, 8, dtype=torch.bfloat16)
GATE = torch.ones(1)
WEIGHT = torch.ones(8)
LONG = torch.ones(1, 8193)


@pytest.mark.parametrize(
    ("arguments", "choices", "error", "message"),
    [
        ((X.int(), X, X, GATE), {}, TypeError, r"x is torch.int32; expected bfloat16.*cast it"),
        ((X[0, 0], X, X, GATE), {}, ValueError, r"x has shape \[\]; expected \[\.\.\., D\]"),
        ((X[:, :0], X, X, GATE), {}, ValueError, r"x has shape \[3, 0\]; .*D >= 1"),
        ((X, X[:2], X, GATE), {}, ValueError, r"attn_out has shape \[2, 8\], x \[3, 8\]"),
        ((X, X, X[:, :1], GATE), {}, ValueError, r"mlp_out has shape \[3, 1\].*broadcast"),
        ((X, X.to("meta"), X, GATE), {}, ValueError, r"attn_out is on meta, x on cpu: move"),
        ((HALF, X, X, GATE), {}, TypeError, r"attn_out is torch.float32.*x is torch.bfloat16"),
        ((X, HALF, X, GATE), {}, TypeError, r"attn_out is torch.bfloat16, mlp_out is torch.fl"),
        ((HALF, HALF.half(), None, GATE), {}, TypeError, r"attn_out is torch.float16.*cast them"),
        ((X, X.double(), None, GATE), {}, TypeError, r"attn_out is torch.float64"),
        ((X, X, X, GATE[0]), {}, ValueError, r"gate has shape \[\].*gates\[layer:layer \+ 1\]"),
        ((X, X, X, GATE.repeat(2)), {}, ValueError, r"gate has shape \[2\]; expected \[1\]"),
        ((X, X, X, GATE.bfloat16()), {}, TypeError, r"gate is torch.bfloat16; expected float32"),
        ((X, X, X, GATE.double()), {}, TypeError, r"gate is torch.float64.*mixed precision"),
        ((X, X, X, GATE.to("meta")), {}, ValueError, r"gate is on meta, x on cpu"),
        ((X, X, X, GATE), {"gate_kind": "both"}, ValueError, r"gate_kind='both'; choose 'resid"),
        ((X, X, X, GATE), {"norm": "l3"}, ValueError, r"norm='l3'; choose 'l1', 'l2'"),
        ((X, X, X, GATE), {"norm": None, "ref_norm": True}, ValueError, r"ref_norm=True without"),
    ],
)
@pytest.mark.parametrize("op", [gated_branch, gated_branch_reference])
def test_gated_branch_refuses(
    op: Any, arguments: tuple[Tensor, ...], choices: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=f"^{op.__name__}: {message}") as caught:
        op(*arguments, **choices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "choices", "error", "message"),
    [
        ((X.bool(), X, GATE), {}, TypeError, r"x is torch.bool; expected bfloat16"),
        ((X, X[None], GATE), {}, ValueError, r"y has shape \[1, 3, 8\], x \[3, 8\]"),
        ((X, X.to("meta"), GATE), {}, ValueError, r"y is on meta, x on cpu"),
        ((X, HALF, GATE), {}, TypeError, r"y is torch.bfloat16, x is torch.float32.*cast one"),
        ((X, X, GATE[None]), {}, ValueError, r"gate has shape \[1, 1\]; expected \[1\]"),
        ((X, X, GATE), {"gate_kind": None}, ValueError, r"gate_kind=None; choose"),
        ((X, X, GATE), {"norm": 2}, ValueError, r"norm=2; choose"),
    ],
)
@pytest.mark.parametrize("op", [gated_difference, gated_difference_reference])
def test_gated_difference_refuses(
    op: Any, arguments: tuple[Tensor, ...], choices: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=f"^{op.__name__}: {message}") as caught:
        op(*arguments, **choices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "choices", "error", "message"),
    [
        ((X.int(), X, X, GATE, WEIGHT), {}, TypeError, r"x is torch.int32; expected bfloat16"),
        ((X, X[:2], X, GATE, WEIGHT), {}, ValueError, r"attn_out has shape \[2, 8\], x \[3, 8\]"),
        ((X, X, X[:2], GATE, WEIGHT), {}, ValueError, r"mlp_out has shape \[2, 8\], x \[3, 8\]"),
        ((X, X, X.to("meta"), GATE, WEIGHT), {}, ValueError, r"mlp_out is on meta, x on cpu"),
        ((HALF, X, X, GATE, WEIGHT), {}, TypeError, r"attn_out is torch.float32.*cast them"),
        (
            (X, X, X, GATE.repeat(2), WEIGHT),
            {},
            ValueError,
            r"gate has shape \[2\]; expected \[1\]",
        ),
        ((X, X, X, GATE.half(), WEIGHT), {}, TypeError, r"gate is torch.float16; expected float32"),
        (
            (X, X, X, GATE, WEIGHT[:7]),
            {},
            ValueError,
            r"weight has shape \[7\]; expected \[8\].*pass",
        ),
        ((X, X, X, GATE, X[:1]), {}, ValueError, r"weight has shape \[1, 8\]; expected \[8\]"),
        ((X, X, X, GATE, WEIGHT[0]), {}, ValueError, r"weight has shape \[\]; expected \[8\]"),
        ((X, X, X, GATE, HALF[0]), {}, TypeError, r"weight is torch.bf.*, x is torch.fl.*; cast"),
        ((X, HALF, None, GATE, HALF[0]), {}, TypeError, r"weight is torch.bf.*, x is torch.fl"),
        ((X, X, X, GATE, WEIGHT.to("meta")), {}, ValueError, r"weight is on meta, x on cpu: move"),
        ((LONG, LONG, None, GATE, LONG[0]), {}, ValueError, r"x has D = 8193; .*at most 8192: use"),
        ((X, X, X, GATE, WEIGHT), {"eps": 0.0}, ValueError, r"eps=0.0; expected .*such as 1e-6"),
        ((X, X, X, GATE, WEIGHT), {"eps": -1e-6}, ValueError, r"eps=-1e-06; expected"),
        ((X, X, X, GATE, WEIGHT), {"eps": float("nan")}, ValueError, r"eps=nan; expected"),
        ((X, X, X, GATE, WEIGHT), {"eps": float("inf")}, ValueError, r"eps=inf; expected"),
        ((X, X, X, GATE, WEIGHT), {"convention": "t5"}, ValueError, r"convention='t5'; choose 'll"),
        ((X, X, X, GATE, WEIGHT), {"gate_kind": "both"}, ValueError, r"gate_kind='both'; choose"),
        ((X, X, X, GATE, WEIGHT), {"norm": "l3"}, ValueError, r"norm='l3'; choose 'l1', 'l2'"),
        ((X, X, X, GATE, WEIGHT), {"norm": None, "ref_norm": True}, ValueError, r"ref_norm=True"),
    ],
)
@pytest.mark.parametrize("op", [gated_branch_rmsnorm, gated_branch_rmsnorm_reference])
def test_gated_branch_rmsnorm_refuses(
    op: Any, arguments: tuple[Tensor, ...], choices: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=f"^{op.__name__}: {message}") as caught:
        op(*arguments, **{"eps": 1e-6, "convention": "llama"} | choices)
    assert "\n" not in str(caught.value)
