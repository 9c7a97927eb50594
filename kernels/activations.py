"""Activations in fp32, and their derivatives from the outputs; they saturate, and are NaN only where x is.

HOW                 sigmoid(x)                      tanh(x)
"exact"             1 / (1 + exp(-x))               sign(x) (1 - 2 / (1 + exp(2|x|))), x + x^3 p(x^2) for |x| < 0.625
"exp2"              rcp(1 + exp2(-x log2 e))        1 - 2 rcp(1 + exp2(2x log2 e))
"tanh.approx"       (1 + tanh.approx(x / 2)) / 2    tanh.approx(x)

exp and logsigmoid, of the gates of the sLSTM, carry a state as carry_gate does: the last line is for neither.

Where exp overflows, 1/inf is 0: right at both ends. p, where 1 - 2/(...) would cancel, is the degree-4 minimax
polynomial of Cephes' tanhf (S. Moshier, netlib.org/cephes).

The last two are for 16-bit tensors on NVIDIA, whose special function unit computes 16 results a cycle: it is asked
twice for a function with "exp2", once with "tanh.approx". Absolute errors of "exp2" are below 2^-22, nothing beside the
rounding to fp16. tanh.approx errs by up to 2^-11 of its result (PTX ISA), a quarter of what rounding to bf16 does; but
an error in the gate that carries the state (the LSTM's f, the GRU's z) multiplies over time: carry_gate is never
computed so. fastrnn/planning/tiers.py chooses; docs/performance.md shows both over T = 4096 steps.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid(x, HOW: tl.constexpr):
    if HOW == "tanh.approx":
        return 0.5 * _approximate("tanh.approx.f32", 0.5 * x) + 0.5
    elif HOW == "exp2":
        return _approximate("rcp.approx.ftz.f32", 1.0 + _approximate("ex2.approx.ftz.f32", -LOG2_E * x))
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def carry_gate(x, HOW: tl.constexpr):
    """sigmoid(x) of the gate whose errors multiply from step to step."""
    return sigmoid(x, "exp2" if HOW == "tanh.approx" else HOW)


@triton.jit
def tanh(x, HOW: tl.constexpr):
    if HOW == "tanh.approx":
        return _approximate("tanh.approx.f32", x)
    elif HOW == "exp2":
        grown = _approximate("ex2.approx.ftz.f32", 2.0 * LOG2_E * x)
        return 1.0 - 2.0 * _approximate("rcp.approx.ftz.f32", 1.0 + grown)
    else:
        magnitude = tl.abs(x)
        large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * magnitude))
        s = x * x
        p = -5.70498872745e-3 * s + 2.06390887954e-2
        p = p * s - 5.37397155531e-2
        p = p * s + 1.33314422036e-1
        p = p * s - 3.33332819422e-1
        return tl.where(magnitude < 0.625, x + x * s * p, tl.where(x < 0, -large, large))


@triton.jit
def exp(x, HOW: tl.constexpr):
    """exp(x) of x <= 0: a gate with the state's maximum subtracted."""
    if HOW == "exact":
        return tl.exp(x)
    else:
        return _approximate("ex2.approx.ftz.f32", LOG2_E * x)


@triton.jit
def logsigmoid(x, HOW: tl.constexpr):
    """log(sigmoid(x)), and sigmoid(-x), which is exact where sigmoid(x) is near 1."""
    e = exp(-tl.abs(x), HOW)
    if HOW == "exact":
        log = tl.log(1.0 + e)
    else:
        log = LN_2 * _approximate("lg2.approx.ftz.f32", 1.0 + e)
    larger = inverse(1.0 + e, HOW)
    return tl.where(x < 0, x, 0.0) - log, tl.where(x < 0, larger, e * larger)


@triton.jit
def inverse(x, HOW: tl.constexpr):
    """1 / x."""
    if HOW == "exact":
        return 1.0 / x
    else:
        return _approximate("rcp.approx.ftz.f32", x)


@triton.jit
def _approximate(INSTRUCTION: tl.constexpr, x):
    asm: tl.constexpr = INSTRUCTION + " $0, $1;"
    return tl.inline_asm_elementwise(asm, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def relu(x):
    """max(x, 0), and NaN of NaN, which tl.maximum would make 0."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def d_sigmoid(s):
    """ds/dx of s = sigmoid(x)."""
    return s * (1.0 - s)


@triton.jit
def d_tanh(t):
    """dt/dx of t = tanh(x)."""
    return 1.0 - t * t


@triton.jit
def d_relu(y, dy):
    """dx of y = relu(x): dy, but 0 where y is 0, whatever dy is there; at NaN it passes, as in torch."""
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def zeros_like(x):
    """Zeros in fp32, in the layout that x has: tl.zeros knows of none, which Gluon needs."""
    return tl.where(x == x, 0.0, 0.0)
