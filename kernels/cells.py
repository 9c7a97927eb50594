"""The cells: one pointwise step forward and one backward each, shared by every tier and dialect.

A step forward gets x (the input's share of each gate: W_ih x_t + b_ih), rec (the recurrent share: W_hh h + b_hh)
and the state, a tuple with h first, and returns the next state and what backward needs of this step:

    state', saved = forward(x, rec, state)

A step backward gets the gradients of state', what forward saved, and the kept state at t and at t-1 (c for the
LSTM, h for the others: rounded once, when it was stored), of a cell that keeps several a tuple of them:

    d_x, d_rec, d_state = backward(d_state', saved, kept, kept_prev)

d_x and d_rec are the gradients of x and rec, gate by gate; d_state lacks only the share that comes back through
the product, dh += sum over gates of d_rec[g] W_hh[g], which the time loop adds. All tiles are fp32. HOW activations are
computed is a constant of activations.py.

fastrnn/cells.py has a record of each cell, by whose name its functions are found here: NAME_forward, NAME_backward.

Source of the equations: torch.nn.LSTM, GRU and RNN, gates in torch's row order; Beck et al. 2024 (arXiv:2405.04517)
for the sLSTM, gates i, f, z, o.
"""

import triton
import triton.language as tl

from .activations import (
    carry_gate,
    d_relu,
    d_sigmoid,
    d_tanh,
    exp,
    inverse,
    logsigmoid,
    relu,
    sigmoid,
    tanh,
    zeros_like,
)

NEAREST_ONE = tl.constexpr(2.0**-24)  # what fp32 and float16 can tell from zero
CAP = tl.constexpr(15.0)  # as fastrnn/cells.py has it


# LSTM: i, f, o = sigmoid(x + rec), g = tanh(x + rec);  c' = f c + i g;  h' = o tanh(c')
@triton.jit
def lstm_forward(x, rec, state, HOW: tl.constexpr):
    i = sigmoid(x[0] + rec[0], HOW)
    f = carry_gate(x[1] + rec[1], HOW)
    g = tanh(x[2] + rec[2], HOW)
    o = sigmoid(x[3] + rec[3], HOW)
    c = f * state[1] + i * g
    h = o * tanh(c, HOW)
    return (h, c), (i, f, g, o)


@triton.jit
def lstm_backward(d_state, saved, c, c_prev, HOW: tl.constexpr):
    i, f, g, o = saved
    dh, dc = d_state
    tanh_c = tanh(c, HOW)
    dc += dh * o * d_tanh(tanh_c)
    d_i = dc * g * d_sigmoid(i)
    d_f = dc * c_prev * d_sigmoid(f)
    d_g = dc * i * d_tanh(g)
    d_o = dh * tanh_c * d_sigmoid(o)
    d_gates = (d_i, d_f, d_g, d_o)
    return d_gates, d_gates, (zeros_like(dh), dc * f)


# GRU: r, z = sigmoid(x + rec);  n = tanh(x_n + r rec_n);  h' = n + z (h - n)
@triton.jit
def gru_forward(x, rec, state, HOW: tl.constexpr):
    r = sigmoid(x[0] + rec[0], HOW)
    z = carry_gate(x[1] + rec[1], HOW)
    n = tanh(x[2] + r * rec[2], HOW)
    h = n + z * (state[0] - n)
    return (h,), (r, z, n, rec[2])


@triton.jit
def gru_backward(d_state, saved, h, h_prev, HOW: tl.constexpr):
    r, z, n, rec_n = saved
    dh = d_state[0]
    d_n = dh * (1.0 - z) * d_tanh(n)
    d_z = dh * (h_prev - n) * d_sigmoid(z)
    d_r = d_n * rec_n * d_sigmoid(r)
    return (d_r, d_z, d_n), (d_r, d_z, d_n * r), (dh * z,)


# RNN: h' = act(x + rec)
@triton.jit
def rnn_tanh_forward(x, rec, state, HOW: tl.constexpr):
    return (tanh(x[0] + rec[0], HOW),), ()


@triton.jit
def rnn_tanh_backward(d_state, saved, h, h_prev, HOW: tl.constexpr):
    dh = d_state[0]
    d_gates = (dh * d_tanh(h),)
    return d_gates, d_gates, (zeros_like(dh),)


@triton.jit
def rnn_relu_forward(x, rec, state, HOW: tl.constexpr):
    return (relu(x[0] + rec[0]),), ()


@triton.jit
def rnn_relu_backward(d_state, saved, h, h_prev, HOW: tl.constexpr):
    dh = d_state[0]
    d_gates = (d_relu(h, dh),)
    return d_gates, d_gates, (zeros_like(dh),)


# sLSTM: l = m + logsigmoid(f);  m' = max(i, l), but i where n is 0;  i' = min(1, exp(i - m'));
# f' = min(1, exp(l - m'));  c' = f' c + i' tanh(z);  n' = f' n + i';  h' = sigmoid(o) c' / n'
@triton.jit
def slstm_forward(x, rec, state, HOW: tl.constexpr):
    c, n, m = state[1], state[2], state[3]
    log_f, not_f = logsigmoid(x[1] + rec[1], HOW)
    input_gate, carried = x[0] + rec[0], m + log_f
    # One of i' and f' is 1, the other exp of the difference; a NaN of either goes on by f'.
    difference, first = input_gate - carried, n == 0.0
    smaller = exp(-tl.abs(difference), HOW)
    i = tl.where(first | (difference >= 0), 1.0, smaller)
    f = tl.where(difference < 0, 1.0, smaller)
    z = tanh(x[2] + rec[2], HOW)
    o = sigmoid(x[3] + rec[3], HOW)
    c, n = f * c + i * z, f * n + i
    m = tl.where(first | (difference >= 0), input_gate, carried)
    return (o * c * inverse(n, HOW), c, n, m), (i, from_either_end(f), not_f, z, o)


@triton.jit
def slstm_backward(d_state, saved, kept, kept_prev, HOW: tl.constexpr):
    """No gradient goes through m, which only rescales: c, n and what m subtracts from the gates change together."""
    i, f, not_f, z, o = saved
    f = to_number(f)
    dh, dc, dn = d_state[0], d_state[1], d_state[2]
    share = inverse(tl.where(kept[1] == 0.0, 1.0, kept[1]), HOW)  # n is 0 only in units and rows that do not exist
    y = kept[0] * share
    dy = dh * o * share
    dc, dn = dc + dy, dn - dy * y
    d_i = i * (dc * z + dn)
    d_f = f * (dc * kept_prev[0] + dn * kept_prev[1]) * not_f
    d_z = dc * i * d_tanh(z)
    d_o = dh * y * d_sigmoid(o)
    d_gates = (d_i, d_f, d_z, d_o)
    return d_gates, d_gates, (zeros_like(dh), dc * f, dn * f, zeros_like(dh))


# The sLSTM with f held to CAP at most, as TiRex has it
@triton.jit
def slstm_capped_forward(x, rec, state, HOW: tl.constexpr):
    f = x[1] + rec[1]
    over = f > CAP
    gates = (x[0] + rec[0], tl.where(over, CAP, f), x[2] + rec[2], x[3] + rec[3])
    none = zeros_like(f)
    after, (i, share, not_f, z, o) = slstm_forward(gates, (none, none, none, none), state, HOW)
    return after, (i, share, tl.where(over, 0.0, not_f), z, o)


slstm_capped_backward = slstm_backward  # what it multiplies d_f by is 0 where f was held


@triton.jit
def from_either_end(share):
    """A number in [0, 1] so that rounding it to 16 bits keeps its distance to the nearer end: those of 1 negative.

    f' multiplies the gradient at every step: rounded near 1 it would drift by its own error, times the steps.
    """
    return tl.where(share < 0.5, share, (share - 1.0) - NEAREST_ONE)


@triton.jit
def to_number(ends):
    """The number that from_either_end was given."""
    return tl.where(ends < 0, 1.0 + (ends + NEAREST_ONE), ends)
