"""Cells beside torch.nn's: one call makes a cell known to the reference, the planner, the op and every tier's kernels.

docs/writing-a-cell.md shows how one is written and tested; examples/mgu.py is one, whole, in one file.
"""

from typing import Any

from .reference import GATES, HAS_C, STEPS, CellStep


def register(
    name: str,
    *,
    gates: int,
    step: CellStep,
    forward: Any,
    backward: Any,
    saved: int,
    has_c: bool = False,
    splits_last_gate: bool = False,
) -> None:
    """Make a cell usable by its name in fastrnn.ops.recurrence, fastrnn.reference.recurrence and fastrnn.plan.

        rec = W_hh h + b_hh;   state' = step(x, rec, state)

    name: a new one. gates: G, blocks of H rows in W_hh. step: in torch, x and rec (B, G, H) and the state, (h,) or
    (h, c) of (B, H), to the next state; it is the specification. forward and backward: the same step and its gradients
    as @triton.jit functions on fp32 tiles, with the arguments and results that kernels/cells.py states; forward returns
    `saved` tiles for backward. has_c: the state is (h, c), and backward gets c as its kept state instead of h.
    splits_last_gate: the gradient of rec differs from that of x in the last gate (in others it must not).

    The cell is known to this process from here on; a layer of it is a module of yours, around the op.

    Raises ValueError, with expected and got, and registers nothing, where an argument is none of these.

    >>> from fastrnn.cells import register
    >>> from fastrnn.kernels.cells import gru_backward, gru_forward
    >>> from fastrnn.reference import gru_step
    >>> register("gru", gates=3, step=gru_step, forward=gru_forward, backward=gru_backward, saved=4)
    Traceback (most recent call last):
        ...
    ValueError: name: expected a new one, beside 'lstm', 'gru', 'rnn_tanh', 'rnn_relu'...; got 'gru'
    """
    from triton.runtime.jit import KernelInterface

    from .kernels.cells import CELLS, Cell

    if not isinstance(name, str) or name in STEPS:
        raise ValueError(f"name: expected a new one, beside {', '.join(map(repr, STEPS))}; got {name!r}")
    for what, count, least in (("gates", gates, 1), ("saved", saved, 0)):
        if not isinstance(count, int) or count < least:
            raise ValueError(f"{what}: expected an int of at least {least}; got {count!r}")
    if not callable(step):
        raise ValueError(f"step: expected a function of torch tensors; got {step!r}")
    for what, function in (("forward", forward), ("backward", backward)):
        if not isinstance(function, KernelInterface):
            raise ValueError(f"{what}: expected a function with @triton.jit; got {function!r}")
    STEPS[name], GATES[name] = step, gates
    if has_c:
        HAS_C.add(name)
    CELLS[name] = Cell(forward, backward, saved=saved, has_c=has_c, splits_last_gate=splits_last_gate)
