"""Arithmetic on single numbers: the same names on a GPU and on the simulator, always rounding to float32."""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, int16, int32, uint32
from numba.cuda import types

from ..target import SIMULATED

ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
NEG_INF, LOWEST = np.float32(-math.inf), np.finfo(np.float32).min
HALF = np.float32(0.5)
TANH_3, TANH_5, TANH_7, TANH_9 = map(np.float32, (-0.33333144, 0.13325879, -0.053045493, 0.017241491))
TWO_LOG2_E = np.float32(2 * math.log2(math.e))
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))


def device_function(function):
    """A function that kernels call: inlined on a GPU, plain Python on the simulator."""
    if SIMULATED:
        from .cuda_simulated import register

        return register(function)
    return cuda.jit(device=True, forceinline=True)(function)


if SIMULATED:
    exp, exp2, log, log2, tanh = np.exp, np.exp2, np.log, np.log2, np.tanh
    divide, quotient = np.divide, divmod
    from_fp16 = np.float32

    def as_int(x):
        """The bits of a float32, as an int32."""
        return np.float32(x).view(np.int32)

    def as_float(bits):
        return np.int32(bits).view(np.float32)

    to_fp16 = np.float16

    def from_bf16(bits):
        """bf16 is the upper half of a float32."""
        return as_float(np.int32(bits) << 16)

    def to_bf16(x):
        """Rounds to nearest even; NaN stays NaN."""
        if x != x:
            return np.int16(0x7FC0)
        bits = int(np.array(x, np.float32).view(np.uint32))
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.array(bits, np.uint16).view(np.int16)[()]

else:
    from numba.cuda import libdevice

    from .intrinsics import ex2 as exp2

    as_int, as_float = libdevice.float_as_int, libdevice.int_as_float

    @device_function
    def exp(x):
        """2^(x · log2 e): two instructions, off by about |x| ulp, which the gate's 4u·A covers."""
        return exp2(x * LOG2_E)

    @device_function
    def quotient(a, b):
        """(a // b, a % b) of integers from 0 to 2³¹ - 1, in 32 bits: a division in 64 calls a function."""
        q = int32(uint32(a) // uint32(b))
        return q, int32(a - q * b)

    @device_function
    def divide(x, y):
        """x / y to 2 ulp, without the care for its rounding; 0 where y is above 2¹²⁶."""
        return libdevice.fast_fdividef(x, y)

    @device_function
    def log(x):
        return math.log(x)

    @device_function
    def log2(x):
        return libdevice.log2f(x)

    @device_function
    def tanh(x):
        return math.tanh(x)

    @device_function
    def from_fp16(x):
        return float32(x)

    @device_function
    def to_fp16(x):
        return types.float16(x)

    @device_function
    def from_bf16(bits):
        """bf16 is the upper half of a float32."""
        return as_float(int32(int32(bits) << int32(16)))

    @device_function
    def to_bf16(x):
        """Rounds to nearest even; NaN stays NaN."""
        if x != x:
            return int16(0x7FC0)
        bits = as_int(x)
        lsb = (bits >> int32(16)) & int32(1)
        return int16((bits + int32(0x7FFF) + lsb) >> int32(16))


@device_function
def tanh_fast(x):
    """1 - 2 / (1 + e^2x), and near 0, where that would cancel, a polynomial (fitted, off by 2⁻²⁶): relative to 2⁻²²."""
    s = x * x
    near = x + x * s * (TANH_3 + s * (TANH_5 + s * (TANH_7 + s * TANH_9)))
    far = ONE - divide(TWO, ONE + exp2(x * TWO_LOG2_E))
    return near if abs(x) < HALF else far


@device_function
def same(x):
    return x


def conversions(dtype: str):
    """(widen, narrow): how a dtype enters float32 arithmetic on a load, and leaves it on a store.

    bf16 travels as int16 bits, since NumPy and the simulator do not know it.
    """
    return {"fp32": (same, same), "fp16": (from_fp16, to_fp16), "bf16": (from_bf16, to_bf16)}[dtype]
