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

Source of the equations: torch.nn.LSTM, GRU and RNN; gates in torch's row order.
"""

import triton
import triton.language as tl

from .activations import carry_gate, d_relu, d_sigmoid, d_tanh, relu, sigmoid, tanh, zeros_like


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
