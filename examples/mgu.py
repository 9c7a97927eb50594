"""Your own cell in one file: the minimal gated unit, from its equations to kernels of every tier.

    f  = sigmoid(x_f + rec_f)
    n  = tanh(x_n + f rec_n)
    h' = h + f (n - h)

Here x = W_ih x_t + b_ih and rec = W_hh h + b_hh. This is a GRU whose two gates are one. Source: Zhou et al. 2016
(Minimal Gated Unit for Recurrent Neural Networks), but f acts after the product with W_hh, as r does in cuDNN's GRU.

    python examples/mgu.py plan --cell mgu --hidden 128 512 1024                  python -m fastrnn, which knows it now
    python examples/mgu.py inspect --cell mgu --hidden 128 --arch sm_90 --execute
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import linear

import fastrnn
from fastrnn import cells, ops, reference
from fastrnn.kernels.activations import carry_gate, d_sigmoid, d_tanh, tanh

G = 2  # f and n


def step(x: Tensor, rec: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The specification: x and rec (B, G, H), h (B, H)."""
    (h,) = state
    x_f, x_n = x.unbind(-2)
    rec_f, rec_n = rec.unbind(-2)
    f = (x_f + rec_f).sigmoid()
    n = (x_n + f * rec_n).tanh()
    return (h + f * (n - h),)


@triton.jit
def forward(x, rec, state, HOW: tl.constexpr):
    f = carry_gate(x[0] + rec[0], HOW)  # 1 - f carries the state: errors of it would multiply over time
    n = tanh(x[1] + f * rec[1], HOW)
    h = state[0] + f * (n - state[0])
    return (h,), (f, n, rec[1])


@triton.jit
def backward(d_state, saved, h, h_prev, HOW: tl.constexpr):
    f, n, rec_n = saved
    dh = d_state[0]
    d_n = dh * f * d_tanh(n)
    d_f = (dh * (n - h_prev) + d_n * rec_n) * d_sigmoid(f)
    return (d_f, d_n), (d_f, d_n * f), (dh * (1.0 - f),)


cells.register("mgu", gates=G, step=step, forward=forward, backward=backward, saved=3, splits_last_gate=True)


class MGU(nn.Module):
    """A layer of minimal gated units. x (T, B, I) and h_0 (B, H), or None, give y (T, B, H) and h_n (B, H)."""

    def __init__(self, input_size: int, hidden_size: int, backend: str = "auto") -> None:
        super().__init__()
        self.hidden_size, self.backend = hidden_size, backend
        shapes = (G * hidden_size, input_size), (G * hidden_size, hidden_size), (G * hidden_size,), (G * hidden_size,)
        bound = hidden_size**-0.5
        self.W_ih, self.W_hh, self.b_ih, self.b_hh = (
            nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes
        )

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, B, _ = x.shape
        H = self.hidden_size
        h_0 = x.new_zeros(B, H) if h_0 is None else h_0
        sizes = {"hidden_size": H, "batch_size": B, "seq_len": T, "dtype": x.dtype, "device": x.device}
        backend = fastrnn.plan("mgu", **sizes, backend=self.backend).backend
        if backend == "reference":
            run = reference.recurrence
        else:  # gradients of gradients need the source of x_gates
            run = functools.partial(ops.recurrence, backend=backend, source=(x, self.W_ih, self.b_ih))
        x_gates = linear(x, self.W_ih, self.b_ih).view(T, B, 1, G, H)
        y, h_n, _ = run("mgu", x_gates, self.W_hh[None], self.b_hh[None], h_0[None], None)
        assert y is not None and h_n is not None  # only the third result, c, is None
        return y.squeeze(2), h_n.squeeze(0)


if __name__ == "__main__":
    from fastrnn.__main__ import main

    raise SystemExit(main())
