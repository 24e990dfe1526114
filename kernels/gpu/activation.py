"""The activation between an expert's two products, in registers. Formulas: :mod:`xpar.kernels.activations`."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def at_most(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, x)  # unlike a minimum it keeps NaN


@triton.jit
def clamp(x, LIMIT: tl.constexpr):
    return tl.where(x < -LIMIT, -LIMIT, at_most(x, LIMIT))


@triton.jit
def curve(x, NAME: tl.constexpr):
    """The function of a single value."""
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
    """``gate`` and ``up``: float32 of one shape. LIMIT None: no bound."""
    if NAME == "situ":
        if LIMIT is not None:
            up = LIMIT * tanh(up / LIMIT)
        y = BETA * tanh(gate / BETA) * sigmoid(gate) * up
    elif NAME == "swiglustep":
        y = at_most(curve(gate, "silu"), LIMIT) * clamp(up, LIMIT)
    elif NAME == "silu":
        if LIMIT is not None:
            gate = at_most(gate, LIMIT)
            up = clamp(up, LIMIT)
        y = gate * sigmoid(ALPHA * gate) * (up + BETA)
    else:
        y = curve(gate, NAME) * up
    return y
