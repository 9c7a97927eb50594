"""Sequences of their own lengths, resets inside them and every cell state: each tier against the fp64 reference.

The reference itself is held to runs of every segment on its own.
"""

import functools
import itertools

import pytest
import torch

from fastrnn import reference
from fastrnn.compat import interpreter
from fastrnn.ops import recurrence
from fastrnn.sequences import Sequences

from ..support.cases import CELLS, SEQUENCES, Case, make_sequences, over_budget, require_kernel

BACKENDS = ("resident", "cooperative")
SHAPES = {"resident": Case(T=5, B=18, H=20, D=2), "cooperative": Case(T=5, B=5, H=40, D=2)}


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("cell", CELLS)
def test_matches_reference(cell, kind, backend, device):
    case = SHAPES[backend]
    require_kernel(cell, case, torch.float32, device, backend)
    problem = make_sequences(cell, case, torch.float32, device, kind)
    assert not over_budget(problem, functools.partial(recurrence, backend=backend))


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("cell", CELLS)
def test_the_reference_runs_every_segment_on_its_own(cell, kind):
    """Cut by hand, and run one by one: outputs of each segment, and the states at each sequence's end."""
    T, B, _, D = case = Case(T=6, B=4, H=3, D=2)
    problem = make_sequences(cell, case, torch.float64, "cpu", kind)
    x_gates, W_hh, b_hh, h_0, c_0 = problem.inputs
    found = dict(zip(("reset_h", "reset_c"), problem.starts))  # noqa: B905 - only the LSTM has a c
    y, h_n, c_n, *c = reference.recurrence(cell, *problem.inputs, **found, **problem.options)
    rows, reset = problem.options["sequences"]
    if rows is None:
        rows = torch.stack((torch.arange(B), torch.arange(B), torch.full((B,), T)))
    by_step, ragged = problem.options["by_step"], x_gates.dim() == 4
    segments = 0

    def at(states, place, d):
        """Of a slot and a direction, where several states may be one tensor."""
        return states[(..., *(place if isinstance(place, tuple) else (place,)), d, slice(None))]

    for b, start, length in rows.T.tolist():
        slots = [start + t if ragged else (t, b) for t in range(length)]
        edges = [t for t in range(1, length) if reset is not None and reset[slots[t]]]
        for d in range(D):
            first_is_reset = d == 0 and reset is not None and bool(reset[slots[0]])
            bounds = [0, *edges, length]
            pieces = list(itertools.pairwise(bounds))
            for piece, (begin, end) in enumerate(pieces if d == 0 else reversed(pieces)):
                state = [s if s is None else s[..., d : d + 1, b : b + 1, :] for s in (h_0, c_0)]
                if piece or first_is_reset:
                    edge = begin if d == 0 else end
                    given = problem.starts or [torch.zeros_like(s) for s in (h_0, c_0) if s is not None]
                    anew = iter(at(s, slots[edge], d) if problem.starts and by_step else s[..., d, b, :] for s in given)
                    state = [None if s is None else next(anew)[..., None, None, :] for s in state]
                x = torch.stack([x_gates[slots[t]][d] for t in range(begin, end)])[:, None, None]
                x = x.flip(0) if d else x
                alone, *last = reference.recurrence(cell, x, W_hh[d : d + 1], b_hh[d : d + 1], *state, cell_states=True)
                places = [slots[t] for t in range(begin, end)]
                for of_all, of_one in zip((y, *c), (alone, *last[2:]), strict=True):
                    whole = torch.stack([at(of_all, place, d) for place in places], -2)
                    torch.testing.assert_close(whole.flip(-2) if d else whole, of_one[..., 0, 0, :])
                segments += 1
            for final, of_one in zip((h_n, c_n), last[:2], strict=True):
                if of_one is not None:
                    torch.testing.assert_close(final[..., d, b, :], of_one[..., 0, 0, :])
        if not ragged:
            assert not y[length:, b].any()
    assert segments > 2 * B or "reset" not in kind


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("B", (0, 1, 5, 64))
def test_the_host_makes_the_table_that_operators_make(B, dtype):
    lengths = torch.randint(0, 4, (B,), dtype=dtype)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(dtype)
    total = int(cu_seqlens[-1])
    assert torch.equal(Sequences.rows_on_host(lengths, None, 3), Sequences.of(3, B, lengths=lengths).rows)
    rows = Sequences.rows_on_host(None, cu_seqlens, total)
    assert torch.equal(rows, Sequences.of(0, B, cu_seqlens=cu_seqlens).rows) and rows.dtype == torch.int64


@pytest.mark.parametrize("wrong", ([2, -1], [4, 1], [torch.iinfo(torch.int64).min, 1], [torch.iinfo(torch.int64).max]))
def test_the_host_makes_no_table_of_wrong_lengths(wrong):
    assert Sequences.rows_on_host(torch.tensor(wrong), None, 3) is None


@pytest.mark.parametrize("wrong", ([1, 3], [0, 2], [0, 2, 1, 3], [0, 4, 3]))
def test_the_host_makes_no_table_of_wrong_cu_seqlens(wrong):
    assert Sequences.rows_on_host(None, torch.tensor(wrong), 3) is None


@pytest.mark.skipif(not interpreter.ENABLED, reason="counts what the interpreter does: set TRITON_INTERPRET=1")
@pytest.mark.parametrize("broken", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tile_stops_at_its_longest_row(backend, broken, mutate, device, monkeypatch):
    """Rows of 2 steps take the products of 2 steps, however long their batch is; broken, of all of them."""
    from triton.runtime.interpreter import InterpreterBuilder

    if broken:
        mutate({"kernels.rows.find_rows": ("longest = tl.maximum(", "longest = T + 0 * tl.maximum(")})
    products, dot = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *args: [products.append(1), dot(*args)][1])
    counts = []
    for T in (2, 9):
        problem = make_sequences("gru", Case(T, 3, 12, 1), torch.float32, device, "lengths")
        rows = Sequences.of(T, 3, lengths=torch.tensor([2, 1, 2]))
        problem._replace(options=problem.options | {"sequences": rows}).run(
            functools.partial(recurrence, backend=backend)
        )
        counts.append(len(products))
        products.clear()
    assert (counts[0] == counts[1] > 0) != broken


# What is broken: in which function, which text, by what, and the cell and kind of sequences that show it.
MUTATIONS = {
    "frozen rows go on": (
        "kernels.loop.forward", "rows, step, K.own_lengths), after", "rows, step, False), after", "lstm", "lengths"),
    "frozen rows have gradients": (
        "kernels.loop.differentiate", "keep(alive, d_rec,", "keep(alive | True, d_rec,", "rnn_tanh", "lengths"),
    "gradients stop at an end": (
        "kernels.loop.differentiate", "keep(alive, d_before,", "keep(alive | True, d_before,", "lstm", "lengths"),
    "a row kept that is past its end": (
        "kernels.loop.load_saved", "(t < rows.lengths)", "(t < t + rows.lengths)", "gru", "lengths"),
    "another row's states": (
        "kernels.rows.find_rows", "first_state, sequence)", "first_state, offs_b)", "rnn_tanh", "ragged"),
    "the tile's last row for its longest": (
        "kernels.rows.find_rows", "2 * rows + first_row), 1)", "3 * rows - 1), 1)", "gru", "lengths"),
    "segments of direction 1 a step late": (
        "kernels.rows._edge", "step, rows.T - step)", "step, rows.T - 1 - step)", "lstm", "resets"),
    "resets past an end": (
        "kernels.rows.load_restart", "edge < rows.lengths", "edge < rows.T + 0 * rows.lengths", "rnn_tanh",
        "lengths, resets by step"),
    "states by step from another step": (
        "kernels.rows.slot_at_edge", "(_edge(rows, step) *", "(tl.maximum(step - 1, 0) *", "gru",
        "lengths, resets by step"),
    "gradients go past a reset": (
        "kernels.loop.cut", "return keep(restart, zeros, d_state)", "return d_state", "lstm", "resets"),
    "the state before a reset for what follows it": (
        "kernels.loop.differentiate", "tiles.starts, before)", "before, before)", "gru", "resets to a state"),
    "gradient of c dropped": (
        "kernels.loop.differentiate", "d_state[n] + tiles.d_steps[n - 1].to(tl.float32)", "d_state[n]", "lstm",
        "lengths"),
    "h_0 dropped from dW_hh": (
        "fastrnn.ops.sums._h_prev", "y, h_0, Segments", "y, 0 * h_0, Segments", "gru", "lengths"),
    "resets dropped from dW_hh": (
        "fastrnn.ops.sums._h_prev", "reset), start,", "reset), None,", "lstm", "resets to a state"),
    "y shifted past resets": (
        "fastrnn.ops.sums._h_prev", "return before if reset is None else", "return before if True else", "gru",
        "resets"),
    "h_0 goes past a reset into dW_hh": (
        "fastrnn.ops.sums._sum", "reset is not None and direction == 0", "False", "lstm", "resets"),
    "y shifted though direction 1 begins with h_0": (
        "fastrnn.ops.sums._is_shifted", " and steps.h_0 is None", "", "gru", "lengths"),
    "gradients of starts not summed": (
        "fastrnn.ops.launch.of_starts", "summed(whole)", "summed(whole * 0)", "gru", "resets to a state"),
}  # fmt: skip


# One reads past the end of a tensor: whatever lies there, numpy may call invalid.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate, device):
    function, old, new, cell, kind = MUTATIONS[name]
    problem = make_sequences(cell, Case(T=5, B=18, H=12, D=2), torch.float32, device, kind)
    assert not over_budget(problem)
    mutate({function: (old, new)})
    assert over_budget(problem)
