"""Compare an LSTM with approximate activations, emulated in torch, with fp64 over a long sequence.

    python -m bench.accuracy            print the table
    python -m bench.accuracy --write    put it into docs/performance.md

tanh.approx is emulated as badly as PTX allows: off by 2^-11 of its result, either way, at random. Everything else is
computed as the kernels do it: h rounded for the product, the state carried in fp32. Forget gates are driven by a bias
of 0, of 4 and of 8: at 8 the state lasts some 3000 steps, and errors of the forget gate multiply all the while.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from . import write

BIASES = (0.0, 4.0, 8.0)
# What each gate is computed by: the gate that carries the state (f), and the others.
FORMS = {"exact": (False, False), "tanh.approx, but f": (False, True), "tanh.approx": (True, True)}


def approximate_tanh(x: Tensor) -> Tensor:
    error = torch.where(torch.rand_like(x) < 0.5, 1.0, -1.0) * 2.0**-11
    return (torch.tanh(x) * (1 + error)).clamp(-1, 1)


def approximate_sigmoid(x: Tensor) -> Tensor:
    return 0.5 * approximate_tanh(0.5 * x) + 0.5


def lstm(x_gates: Tensor, W_hh: Tensor, approximate_f: bool, approximate_others: bool) -> Tensor:
    """y (T, B, H) in fp64; computed in the dtype of x_gates (T, B, 4, H) as the kernels do, or in fp64 throughout."""
    dtype = x_gates.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    sigmoid_f = approximate_sigmoid if approximate_f else torch.sigmoid
    sigmoid, tanh = (approximate_sigmoid, approximate_tanh) if approximate_others else (torch.sigmoid, torch.tanh)
    W = W_hh.to(compute).T
    h = c = x_gates.new_zeros(x_gates.shape[1], x_gates.shape[3], dtype=compute)
    y = []
    for x in x_gates:
        i, f, g, o = (x.to(compute) + (h.to(dtype).to(compute) @ W).unflatten(1, (4, -1))).unbind(1)
        c = sigmoid_f(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        y.append(h.to(dtype).double())
    return torch.stack(y)


def errors(dtype: torch.dtype, bias: float, T: int, B: int = 8, H: int = 32) -> dict[str, float]:
    """Return the root of the mean squared error of y against fp64, by form."""
    torch.manual_seed(0)
    x_gates = torch.randn(T, B, 4, H).to(dtype)
    x_gates[:, :, 1] += bias
    W_hh = ((2 * torch.rand(4 * H, H) - 1) / H**0.5).to(dtype)
    truth = lstm(x_gates.double(), W_hh.double(), False, False)
    return {form: (lstm(x_gates, W_hh, *how) - truth).square().mean().sqrt().item() for form, how in FORMS.items()}


def table(T: int) -> Iterator[str]:
    yield f"| LSTM, T = {T}, rms error of y | " + " | ".join(FORMS) + " |"
    yield "|---" * (len(FORMS) + 1) + "|"
    for dtype in (torch.bfloat16, torch.float16):
        for bias in BIASES:
            found = errors(dtype, bias, T)
            exact = found["exact"]
            cells = [
                f"{error:.1e}" + (f" ({error / exact:.1f}x)" if error != exact else "") for error in found.values()
            ]
            yield f"| {str(dtype).removeprefix('torch.')}, forget bias {bias:g} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=4096, metavar="T", help="time steps (default: 4096)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    lines = []
    for line in table(args.steps):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write("python -m bench.accuracy --write", lines)
