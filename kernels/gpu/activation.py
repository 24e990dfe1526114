"""The activation between an expert's two products, computed in registers.

Formulas: :mod:`xpar.kernels.activations`.

x, gate and up are float32 blocks of any one shape; NAME, LIMIT (None for no bound), ALPHA and BETA are the
fields of :class:`~xpar.kernels.contracts.Activation`.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Compute 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Compute the hyperbolic tangent."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def clamp_max(x, LIMIT: tl.constexpr):
    """Bound ``x`` from above; NaN stays."""
    return tl.where(x > LIMIT, LIMIT, x)  # unlike tl.minimum this keeps NaN


@triton.jit
def clamp(x, LIMIT: tl.constexpr):
    """Bound ``x`` from both sides; NaN stays."""
    return tl.where(x < -LIMIT, -LIMIT, clamp_max(x, LIMIT))


@triton.jit
def activate_without_gate(x, NAME: tl.constexpr):
    """Apply the function of single values."""
    if NAME == "silu":
        y = x * sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 0.5 (1 + tanh z) = sigmoid(2z)
    else:
        tl.static_assert(NAME == "relu2", "no such activation")
        positive = tl.where(x < 0.0, 0.0, x)
        y = positive * positive
    return y


@triton.jit
def activate(gate, up, NAME: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """Apply the activation with a gate."""
    if NAME == "situ":
        if LIMIT is not None:
            up = LIMIT * tanh(up / LIMIT)
        y = BETA * tanh(gate / BETA) * sigmoid(gate) * up
    elif NAME == "swiglustep":
        y = clamp_max(activate_without_gate(gate, "silu"), LIMIT) * clamp(up, LIMIT)
    elif NAME == "silu":
        if LIMIT is not None:
            gate = clamp_max(gate, LIMIT)
            up = clamp(up, LIMIT)
        y = gate * sigmoid(ALPHA * gate) * (up + BETA)
    else:
        y = activate_without_gate(gate, NAME) * up
    return y
