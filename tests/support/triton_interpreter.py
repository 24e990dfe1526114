"""Triton's interpreter, taught that bfloat16 and e4m3 are numbers. Import before the first kernel runs.

The interpreter keeps such values as their bits and computes with those: products and sums are wrong
without an error, and casts from float32 cut bits off. Here every operation on bfloat16 goes through float32
and rounds to nearest even, as the hardware does; e4m3 is cast and multiplied so, too. With NumPy from 2.4,
Triton 3.6 also cannot take a tensor as a loop's bound.
"""

import interpreter_overhead
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def is_bf16(handle):
    return handle.dtype.scalar is tl.bfloat16


def is_e4m3(handle):
    return handle.dtype.scalar is tl.float8e4nv


def to_float(handle):
    """The handle's values, bfloat16 and e4m3 ones as float32."""
    if is_e4m3(handle):
        codes = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint8).copy())
        return codes.view(torch.float8_e4m3fn).float().numpy().reshape(handle.data.shape)
    if not is_bf16(handle):
        return handle.data
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << 16
    return bits.view(np.float32)


def to_bits(values):
    """float32 values as the bits of the nearest bfloat16."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    rounded = torch.from_numpy(values.copy()).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def to_codes(values):
    """float32 values as the bits of the nearest e4m3; NaN stays, what is too large becomes 448."""
    values = torch.from_numpy(np.array(values, dtype=np.float32))
    bounded = torch.where(values.isnan(), values, values.clamp(-448, 448))
    return bounded.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(tuple(values.shape))


def result(values, dtype):
    return Handle(to_bits(values), dtype) if dtype is tl.bfloat16 else Handle(values, dtype)


def cast(self, source, to, *_):
    scalar = to.scalar
    if scalar is tl.bfloat16:
        return Handle(to_bits(to_float(source)), scalar)
    if scalar is tl.float8e4nv:
        return Handle(to_codes(to_float(source)), scalar)
    return Handle(to_float(source).astype(interpreter._get_np_dtype(scalar)), scalar)


def dot(self, a, b, d, *_):
    return Handle(np.matmul(to_float(a), to_float(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


_binary, _unary, _ternary = Builder.binary_op, Builder.unary_op, Builder.ternary_op
_patch_tensor = interpreter._patch_lang_tensor


def binary(self, left, right, op):
    if op in COMPARISONS:  # unpatched they keep the operands' type, and broadcasting one makes numbers of it
        return Handle(op(to_float(left), to_float(right)), tl.int1)
    if not is_bf16(left) or op in BITWISE:
        return _binary(self, left, right, op)
    return result(op(to_float(left), to_float(right)), tl.bfloat16)


def unary(self, arg, op):
    return result(op(to_float(arg)), tl.bfloat16) if is_bf16(arg) else _unary(self, arg, op)


def ternary(self, x, y, z, op):
    if not is_bf16(z) or op is np.where:
        return _ternary(self, x, y, z, op)
    return result(op(to_float(x), to_float(y), to_float(z)), tl.bfloat16)


def patch_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


def install():
    """Patch the interpreter of this process."""
    Builder.cast_impl = cast
    Builder.create_fp_to_fp = lambda self, source, to, rounding: cast(self, source, to)
    Builder.create_dot = dot
    Builder.binary_op, Builder.unary_op, Builder.ternary_op = binary, unary, ternary
    interpreter._patch_lang_tensor = patch_tensor
    interpreter_overhead.install()
