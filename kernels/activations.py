"""Activations in fp32, and their derivatives from the outputs; they saturate and are never NaN.

    sigmoid(x) = 1 / (1 + exp(-x))              exp overflows to inf and 1/inf is 0: right at both ends
    tanh(x)    = sign(x) (1 - 2 / (1 + exp(2|x|)))          for |x| >= 0.625
               = x + x^3 p(x^2)                             below, where 1 - 2/(...) would cancel

p is the degree-4 minimax polynomial of Cephes' tanhf (S. Moshier, netlib.org/cephes).
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * magnitude))
    s = x * x
    p = -5.70498872745e-3 * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    return tl.where(magnitude < 0.625, x + x * s * p, tl.where(x < 0, -large, large))


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0)


@triton.jit
def d_sigmoid(s):
    """ds/dx of s = sigmoid(x)."""
    return s * (1.0 - s)


@triton.jit
def d_tanh(t):
    """dt/dx of t = tanh(x)."""
    return 1.0 - t * t


@triton.jit
def d_relu(y):
    """dy/dx of y = relu(x), 0 at 0 as in torch."""
    return tl.where(y > 0, 1.0, 0.0)


@triton.jit
def zeros_like(x):
    """Zeros in fp32, in the layout that x has: tl.zeros knows of none, which Gluon needs."""
    return tl.where(x == x, 0.0, 0.0)
