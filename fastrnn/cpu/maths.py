"""exp, log and tanh of vectors: sums, products and bits, so that LLVM needs no library of them.

    exp(x) = 2^n exp(r),  n = round(x / ln 2),  |r| <= ln 2 / 2      2^n is made in the exponent's bits
    log(x) = n ln 2 + 2 (s + s^3 / 3 + s^5 / 5 ...),  s = (m - 1) / (m + 1),  x = 2^n m,  m next to 1
    tanh(x) = sign(x) e / (e + 2),  e = exp(2 |x|) - 1      of float64: activations.py's is as exact as float32

NaN goes through. Results below the least normal number are 0; from exp(88.3), in float64 exp(709), they are infinite.

Source: Cephes' expf (S. Moshier, netlib.org/cephes) for how r is found and, in float32, for the polynomial; in float64
it is Taylor's, whose rest is below 2^-57.
"""

import math
from typing import Any, NamedTuple

from llvmlite import ir

from .values import Code, Value


class Format(NamedTuple):
    """What the functions must know of float32, or float64."""

    integer: Any
    mantissa: int  # bits
    bias: int
    magic: float  # added, it leaves the nearest integer in the last bits
    ln2: tuple[float, float]  # in two parts, the first of few bits
    range: tuple[float, float]  # of exp's argument
    coefficients: tuple[float, ...]  # of (exp(r) - 1 - r) / r^2, the last power first
    terms: int  # of the logarithm's series


FLOAT32 = Format(
    ir.IntType(32), 23, 127, 1.5 * 2.0**23, (0.693359375, -2.12194440e-4), (-87.3, 88.3),
    (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1), 5,
)  # fmt: skip
FLOAT64 = Format(
    ir.IntType(64), 52, 1023, 1.5 * 2.0**52, (6.93145751953125e-1, 1.42860682030941723212e-6), (-708.0, 709.0),
    tuple(1 / math.factorial(n) for n in range(13, 1, -1)), 11,
)  # fmt: skip


def form_of(code: Code) -> Format:
    return FLOAT32 if isinstance(code.real, ir.FloatType) else FLOAT64


def _less_one(code: Code, x: Value) -> tuple[Value, Value]:
    """exp(r) - 1, and 2^n."""
    form = form_of(code)
    shifted = x * (1 / math.log(2)) + form.magic
    n = shifted - form.magic
    r = x - n * form.ln2[0] - n * form.ln2[1]
    p = code.number(form.coefficients[0])
    for coefficient in form.coefficients[1:]:
        p = p * r + coefficient
    ones = code.bits(code.number(1.0), form.integer)
    scale = code.bits(code.shifted(code.bits(shifted, form.integer), form.mantissa) + ones, code.real)
    return p * (r * r) + r, scale


def exp(x: Value) -> Value:
    code = x.code
    (least, most), (rest, scale) = form_of(code).range, _less_one(code, x)
    found = rest * scale + scale
    return code.where(x > most, math.inf, code.where(x < least, 0.0, found))


def tanh(x: Value) -> Value:
    code = x.code
    twice = code.call("llvm.fabs", x) * 2.0
    rest, scale = _less_one(code, code.where(twice > 40.0, 40.0, twice))
    e = rest * scale + (scale - 1.0)
    return code.call("llvm.copysign", e / (e + 2.0), x)


def log(x: Value) -> Value:
    code, form = x.code, form_of(x.code)
    # m from sqrt(1/2) on: of what is added to the bits the exponent is one more from there.
    half = code.bits(code.number(math.sqrt(0.5)), form.integer)
    above = code.bits(x, form.integer) - half
    exponent = Value(code, code.builder.ashr(above.ir, code.constant(above.ir.type, form.mantissa)))
    m = code.bits(code.bits(x, form.integer) - code.shifted(exponent, form.mantissa), code.real)
    n = Value(code, code.builder.sitofp(exponent.ir, code.vector))
    s = (m - 1.0) / (m + 1.0)
    square, series = s * s, code.number(1 / (2 * form.terms + 1))
    for term in range(form.terms - 1, -1, -1):
        series = series * square + 1 / (2 * term + 1)
    found = n * form.ln2[1] + 2.0 * s * series + n * form.ln2[0]
    found = code.where(x == 0.0, -math.inf, code.where(x < 0.0, math.nan, found))
    return code.where(x < math.inf, found, x)
