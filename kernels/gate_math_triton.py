"""Row arithmetic that the gate kernels share; each function mirrors one of trsp.kernels.reference.

All values are fp32 in registers. A constexpr `NORM` is "l1", "l2", "l2_squared" or None.
"""

import triton
import triton.language as tl


@triton.jit
def round_to(value, pointer):
    """Round to the dtype behind `pointer`, as a store and a load would, and widen again."""
    return value.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit
def apply_gate(x, y, gate, GATE_KIND: tl.constexpr):
    """z, unrounded. The ends of a residual gate are selected: y - x is not exact in fp32."""
    if GATE_KIND == "output":
        z = gate * y
    else:
        z = x + gate * (y - x)
        z = tl.where(gate == 0.0, x, tl.where(gate == 1.0, y, z))
    return z


@triton.jit
def norm_term(d, NORM: tl.constexpr):
    """What one element adds to the sum of its row."""
    if NORM == "l1":
        term = tl.abs(d)
    else:
        term = d * d
    return term


@triton.jit
def norm_of_sum(total, NORM: tl.constexpr):
    """The norm of a row whose terms add up to `total`."""
    if NORM == "l2":
        total = tl.sqrt_rn(total)
    return total


@triton.jit
def norm_gradient_scale(norm_grad, diff_norm_ptr, row, NORM: tl.constexpr):
    """A row's factor in `norm_gradient`; for l2 0 where the norm is 0, with no division by it."""
    scale = norm_grad
    if NORM == "l2":
        diff_norm = tl.load(diff_norm_ptr + row)
        still = diff_norm == 0.0
        scale = tl.where(still, 0.0, tl.div_rn(norm_grad, tl.where(still, 1.0, diff_norm)))
    if NORM == "l2_squared":
        scale = 2.0 * norm_grad
    return scale


@triton.jit
def norm_gradient(d, scale, NORM: tl.constexpr):
    """c, the gradient of the row's norm to d."""
    if NORM == "l1":
        direction = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    else:
        direction = d
    return scale * direction


@triton.jit
def rmsnorm_gain(weight, CONVENTION: tl.constexpr):
    """What an RMSNorm multiplies its normalised row with."""
    gain = weight
    if CONVENTION == "gemma":
        gain = 1.0 + weight
    return gain
