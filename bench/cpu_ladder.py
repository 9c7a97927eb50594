"""Means by which a GRU may train on a CPU, as functions from a torch.nn.GRU to one of x: the ladder of bench/cpu.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastrnn

Build = Callable[[torch.nn.GRU], Callable[[Tensor], Tensor]]


def by_torch_nn(gru: torch.nn.GRU) -> Callable[[Tensor], Tensor]:
    return lambda x: gru(x)[0]


def by_fastrnn(gru: torch.nn.GRU) -> Callable[[Tensor], Tensor]:
    own = fastrnn.GRU(gru.input_size, gru.hidden_size, backend="cpu")
    for name, parameter in gru.named_parameters():
        setattr(own, name, parameter)  # the same parameters, so that gradients are theirs
    return lambda x: own(x)[0]


def step(x: Tensor, rec: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute r, z, n and h' from x_gates and W_hh h + b_hh."""
    H = h.shape[1]
    r_z = (x[:, : 2 * H] + rec[:, : 2 * H]).sigmoid()
    r, z = r_z[:, :H], r_z[:, H:]
    n = (x[:, 2 * H :] + r * rec[:, 2 * H :]).tanh()
    return r, z, n, n + z * (h - n)


def d_step(d: Tensor, r: Tensor, z: Tensor, n: Tensor, rec_n: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of x_gates, of rec, and of h without the product's share."""
    d_n = d * (1 - z) * (1 - n * n)
    d_z, d_r = d * (h - n) * z * (1 - z), d_n * rec_n * r * (1 - r)
    return torch.cat((d_r, d_z, d_n), 1), torch.cat((d_r, d_z, d_n * r), 1), d * z


def by_hand(forward: Callable, backward: Callable) -> Build:
    """One node of autograd: a loop over time in Python, kept tensors written in place, dW as one product."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_gates: Tensor, W: Tensor, b: Tensor) -> Tensor:
            T, B, G = x_gates.shape
            H = G // 3
            kept, h = x_gates.new_empty(5, T, B, H), x_gates.new_zeros(B, H)
            W_T, rec = W.T.contiguous(), x_gates.new_empty(B, G)
            for t in range(T):
                torch.addmm(b, h, W_T, out=rec)
                *tiles, h = forward(x_gates[t], rec, h)
                for place, tile in enumerate((*tiles, rec[:, 2 * H :], h)):
                    kept[place, t] = tile
            ctx.save_for_backward(W, kept)
            return kept[4]

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            W, kept = ctx.saved_tensors
            _, T, B, H = kept.shape
            d_x, d_rec, d = kept.new_empty(T, B, 3 * H), kept.new_empty(T, B, 3 * H), torch.zeros_like(kept[4, 0])
            before = torch.cat((torch.zeros_like(kept[4, :1]), kept[4, :-1]))
            for t in reversed(range(T)):
                d_x[t], d_rec[t], rest = backward(d + dy[t], *kept[:4, t], before[t])
                d = torch.addmm(rest, d_rec[t], W)
            flat = d_rec.view(T * B, -1)
            return d_x, flat.T @ before.view(T * B, H), flat.sum(0)

    def build(gru: torch.nn.GRU) -> Callable[[Tensor], Tensor]:
        W_ih, W_hh, b_ih, b_hh = gru.parameters()
        return lambda x: Node.apply(linear(x, W_ih, b_ih), W_hh, b_hh)  # type: ignore[return-value]

    return build


def by_compile(gru: torch.nn.GRU) -> Callable[[Tensor], Tensor]:
    """The two steps by torch.compile's C++, which wants a compiler on the user's machine."""
    return by_hand(torch.compile(step, dynamic=False), torch.compile(d_step, dynamic=False))(gru)


def by_numba(gru: torch.nn.GRU) -> Callable[[Tensor], Tensor]:
    """The loop over time by Numba, its product by the BLAS of scipy."""
    import numba
    import numpy as np
    import scipy  # noqa: F401 - whose BLAS np.dot is

    one, two = np.float32(1), np.float32(2)

    @numba.njit(fastmath=True)
    def forward(x, W_T, b, y, kept):  # type: ignore[no-untyped-def]
        T, B, G = x.shape
        H = G // 3
        h = np.zeros((B, H), np.float32)
        for t in range(T):
            rec = np.dot(h, W_T)
            for i in range(B):
                for j in range(H):
                    r = one / (one + np.exp(-(x[t, i, j] + rec[i, j] + b[j])))
                    z = one / (one + np.exp(-(x[t, i, H + j] + rec[i, H + j] + b[H + j])))
                    rn = rec[i, 2 * H + j] + b[2 * H + j]
                    n = one - two / (np.exp(two * (x[t, i, 2 * H + j] + r * rn)) + one)
                    kept[0, t, i, j], kept[1, t, i, j], kept[2, t, i, j], kept[3, t, i, j] = r, z, n, rn
                    y[t, i, j] = n + z * (h[i, j] - n)
            h = y[t].copy()

    @numba.njit(fastmath=True)
    def backward(dy, W, y, kept, d_x, d_rec):  # type: ignore[no-untyped-def]
        T, B, H = dy.shape
        d = np.zeros((B, H), np.float32)
        for t in range(T - 1, -1, -1):
            for i in range(B):
                for j in range(H):
                    g, r, z, n = d[i, j] + dy[t, i, j], kept[0, t, i, j], kept[1, t, i, j], kept[2, t, i, j]
                    before = y[t - 1, i, j] if t > 0 else np.float32(0)
                    d_n = g * (one - z) * (one - n * n)
                    d_z, d_r = g * (before - n) * z * (one - z), d_n * kept[3, t, i, j] * r * (one - r)
                    d_x[t, i, j], d_x[t, i, H + j], d_x[t, i, 2 * H + j] = d_r, d_z, d_n
                    d_rec[t, i, j], d_rec[t, i, H + j], d_rec[t, i, 2 * H + j] = d_r, d_z, d_n * r
                    d[i, j] = g * z
            d += np.dot(d_rec[t], W)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor) -> Tensor:
            T, B, G = x.shape
            y, kept = x.new_empty(T, B, G // 3), x.new_empty(4, T, B, G // 3)
            forward(*(t.detach().numpy() for t in (x, W.T.contiguous(), b, y, kept)))
            ctx.save_for_backward(W, y, kept)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            W, y, kept = ctx.saved_tensors
            T, B, H = y.shape
            d_x, d_rec = y.new_empty(T, B, 3 * H), y.new_empty(T, B, 3 * H)
            backward(*(t.detach().numpy() for t in (dy.contiguous(), W, y, kept, d_x, d_rec)))
            before, flat = torch.cat((torch.zeros_like(y[:1]), y[:-1])).view(-1, H), d_rec.view(-1, 3 * H)
            return d_x, flat.T @ before, flat.sum(0)

    W_ih, W_hh, b_ih, b_hh = gru.parameters()
    return lambda x: Node.apply(linear(x, W_ih, b_ih), W_hh, b_hh)  # type: ignore[return-value]


MEANS: dict[str, Build] = {
    "torch.nn": by_torch_nn,
    "torch, one node, a step's buffers used again, backward by hand": by_hand(step, d_step),
    "the same, its steps by torch.compile's C++ (wants a compiler)": by_compile,
    "Numba's loop, its product by a BLAS (wants scipy)": by_numba,
    'LLVM\'s code, its product too: fastrnn, backend="cpu"': by_fastrnn,
}
