"""Break a kernel in one place, and see that the tests' own checks notice: a check that cannot fail is worth nothing."""

import functools

import pytest
import torch

from fastrnn.ops import recurrence

from ..support.cases import Case, make_problem, over_budget
from ..support.planned import plan_for
from .test_recurrence import carried_state_error

# What is broken: in which function, which text, by what, and the cell that shows it.
MUTATIONS = {
    "input and forget gate swapped": ("cells.lstm_forward", "f * state[1] + i * g", "i * state[1] + f * g", "lstm"),
    "reset before the product": ("cells.gru_forward", "x[2] + r * rec[2]", "r * (x[2] + rec[2])", "gru"),
    "update gate turned round": ("cells.gru_forward", "n + z * (state[0] - n)", "state[0] + z * (n - state[0])", "gru"),
    "reset gate lost in d_rec": ("cells.gru_backward", "(d_r, d_z, d_n * r)", "(d_r, d_z, d_n)", "gru"),
    "tanh of c not derived": ("cells.lstm_backward", "dh * o * d_tanh(tanh_c)", "dh * o", "lstm"),
    "c for c_prev": ("cells.lstm_backward", "dc * c_prev", "dc * c", "lstm"),
    "relu not derived": ("cells.rnn_relu_backward", "d_relu(h, dh)", "dh", "rnn_relu"),
    "dc not carried": ("cells.lstm_backward", "dc * f)", "dc)", "lstm"),
    "state before the first taken from y": (
        "loop.load_saved", "step == 0, read.before", "step < 0, read.before", "gru"),
    "both directions forward": ("rows.time_index", "== 0, step, rows.T - 1 - step", "< 9, step, rows.T", "rnn_tanh"),
    "another gate's bias": ("tiles.load_bias", "(recurrence * K.gates + g)", "recurrence * K.gates", "gru"),
    "prefetched a step too far": ("loop.forward", "minimum(step + 1", "minimum(step + 2", "rnn_tanh"),
    "another state": ("tiles.load_state", "ptrs[n]", "ptrs[0]", "lstm"),
    "W_hh transposed": (
        "tile.resident.load_weights", "offs[None, :] * K.H + offs[:, None]", "offs[:, None] * K.H + offs[None]", "gru"),
    "gradient of h_n dropped": ("tile.resident.backward", "read.d_finals", "None", "rnn_tanh"),
    "h_n not written": ("tile.resident.forward", "outputs.finals", "None", "lstm"),
    "h_0 dropped from dW_hh": ("fastrnn.ops.sums._sum", "d_first @ h_0", "0 * d_first @ h_0", "lstm"),
    "dW_hh by y of the same step": (
        "fastrnn.ops.sums._h_prev", "(B * R * direction + r)", "(B * R + r)", "rnn_tanh"),
    "own columns for own rows": ("tile.cooperative.forward", "units.offs, True", "units.offs, False", "lstm"),
    "own rows for own columns": ("tile.cooperative.backward", "units.offs, False", "units.offs, True", "lstm"),
    "a piece of the state left out": ("tile.cooperative.gates", "(len(F.K_TILES))", "(1)", "gru"),
    "the first warp's share for all": ("tile.cooperative.columns", "[:, None] * share", "[:, None] * 0", "lstm"),
    "a gate not polled": ("tile.cooperative.poll_piece", "GATES + g)", "GATES)", "lstm"),
    "a gate sent for all": ("exchange.send", "tiles[g]", "tiles[0]", "gru"),
    "state of a step before": ("exchange.receive", "group, step, F)\n", "group, step // 2 * 2, F)\n", "rnn_tanh"),
    "a gate not exchanged": ("tile.cooperative.d_hidden", "(now * K.gates + g)", "(now * K.gates)", "lstm"),
    "d_x for d_rec": ("tile.cooperative.d_hidden", "held.last is not None and g == K.gates - 1", "False", "gru"),
}  # fmt: skip
BY_BARRIER = (
    "a gate not exchanged",
    "d_x for d_rec",
)  # a step, which compiled tile Triton has and the interpreter has not


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate, device, monkeypatch):
    function, old, new, cell = MUTATIONS[name]
    if name in BY_BARRIER:
        plan_for(monkeypatch, ROUND=0)
    backend = "cooperative" if function.startswith(("tile.cooperative", "exchange")) else "resident"
    run = functools.partial(recurrence, backend=backend)
    H = 72 if backend == "cooperative" else 12  # several programs, and several pieces of the state
    problem = make_problem(cell, Case(T=4, B=3, H=H, D=2), torch.float32, device)
    assert not over_budget(problem, run)
    mutate({function if function.startswith("fastrnn.") else f"kernels.{function}": (old, new)})
    faults = over_budget(problem, run)
    print(name, faults)
    assert faults


@pytest.mark.parametrize("backend", ("resident", "cooperative"))
def test_the_unchanged_source_passes_as_a_mutant(backend, mutate, device):
    for function in ("kernels.cells.lstm_forward", "fastrnn.ops.launch.forward"):
        mutate({function: ("return", "return")})
    run = functools.partial(recurrence, backend=backend)
    assert not over_budget(make_problem("lstm", Case(T=4, B=3, H=12, D=2), torch.float32, device), run)


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_rounding_the_carried_state_is_caught(cell, mutate, device):
    rounded = {
        "lstm": "(after[0], after[1].to(tl.float16).to(tl.float32))",
        "gru": "(after[0].to(tl.float16).to(tl.float32),)",
    }
    mutate({"kernels.loop.forward": ("        state = after\n", f"        state = {rounded[cell]}\n")})
    assert carried_state_error(cell, device) > 10
