"""Break a kernel in one place, and see that the tests' own checks notice: a check that cannot fail is worth nothing."""

import functools

import pytest
import torch

from fastrnn.ops import recurrence

from ..support.cases import Case, make_problem, over_budget
from .test_recurrence import carried_state_error

CELLS, LAUNCH = "kernels/cells.py", "fastrnn/ops/launch.py"
LOOP, ROWS, EXCHANGE, RESIDENT, COOPERATIVE = (
    f"kernels/{name}.py" for name in ("loop", "rows", "exchange", "tile/resident", "tile/cooperative")
)

# What is broken: where, which text, by what, and the cell that shows it.
MUTATIONS = {
    "input and forget gate swapped": (CELLS, "f * state[1] + i * g", "i * state[1] + f * g", "lstm"),
    "reset before the product": (CELLS, "x[2] + r * rec[2]", "r * (x[2] + rec[2])", "gru"),
    "update gate turned round": (CELLS, "n + z * (state[0] - n)", "state[0] + z * (n - state[0])", "gru"),
    "reset gate lost in d_rec": (CELLS, "(d_r, d_z, d_n * r)", "(d_r, d_z, d_n)", "gru"),
    "tanh of c not derived": (CELLS, "dc += dh * o * d_tanh(tanh_c)", "dc += dh * o", "lstm"),
    "c for c_prev": (CELLS, "dc * c_prev * d_sigmoid(f)", "dc * c * d_sigmoid(f)", "lstm"),
    "relu not derived": (CELLS, "d_relu(h, dh)", "dh", "rnn_relu"),
    "dc not carried": (CELLS, "dc * f)", "dc)", "lstm"),
    "state before the first taken from y": (LOOP, "(step == 0, read.kept_0", "(step < 0, read.kept_0", "gru"),
    "both directions forward": (ROWS, "== 0, step, rows.T - 1 - step", "< 9, step, rows.T", "rnn_tanh"),
    "another gate's bias": (LOOP, "(direction * K.gates + g) * K.H", "direction * K.gates * K.H", "gru"),
    "prefetched a step too far": (LOOP, "minimum(step + 1, rows.T - 1)", "minimum(step + 2, rows.T - 1)", "rnn_tanh"),
    "W_hh transposed": (RESIDENT, "offs[None, :] * K.H + offs[:, None]", "offs[:, None] * K.H + offs[None]", "gru"),
    "gradient of h_n dropped": (RESIDENT, "(dh_n_ptr,)", "(None,)", "rnn_tanh"),
    "h_n not written": (RESIDENT, "(h_n_ptr, c_n_ptr)", "(y_ptr, c_n_ptr)", "lstm"),
    "h_0 dropped from dW_hh": (LAUNCH, "first.T @ h_0[d]", "0 * first.T @ h_0[d]", "lstm"),
    "dW_hh by y of the same step": (LAUNCH, "d_gates[1:], y[:-1])", "d_gates[1:], y[1:])", "rnn_tanh"),
    "own columns for own rows": (COOPERATIVE, "K_TILES, WARPS, True", "K_TILES, WARPS, False", "lstm"),
    "own rows for own columns": (COOPERATIVE, "K_TILES, WARPS, False", "K_TILES, WARPS, True", "lstm"),
    "a piece of the state left out": (COOPERATIVE, "(len(F.K_TILES)):\n        h =", "(1):\n        h =", "gru"),
    "the first warp's share for all": (COOPERATIVE, "[:, None] * share", "[:, None] * 0", "lstm"),
    "a gate not exchanged": (COOPERATIVE, "(now * K.gates + g) * K.H", "(now * K.gates) * K.H", "lstm"),
    "d_x for d_rec": (COOPERATIVE, "group.last is not None and g == K.gates - 1", "False", "gru"),
    "state of two steps before": (EXCHANGE, "(step % 2) * group.buffer\n", "0 * group.buffer\n", "rnn_tanh"),
}  # fmt: skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate, device):
    path, old, new, cell = MUTATIONS[name]
    backend = "cooperative" if path in (COOPERATIVE, EXCHANGE) else "resident"
    run = functools.partial(recurrence, backend=backend)
    H = 72 if backend == "cooperative" else 12  # several programs, and several pieces of the state
    problem = make_problem(cell, Case(T=4, B=3, H=H, D=2), torch.float32, device)
    assert not over_budget(problem, run)
    mutate(path, {old: new})
    faults = over_budget(problem, run)
    print(name, faults)
    assert faults


@pytest.mark.parametrize("backend", ("resident", "cooperative"))
def test_the_unchanged_source_passes_as_a_mutant(backend, mutate, device):
    for path in (CELLS, LAUNCH):
        mutate(path, {"import": "import"})
    run = functools.partial(recurrence, backend=backend)
    assert not over_budget(make_problem("lstm", Case(T=4, B=3, H=12, D=2), torch.float32, device), run)


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_rounding_the_carried_state_is_caught(cell, mutate, device):
    rounded = {
        "lstm": "(after[0], after[1].to(tl.float16).to(tl.float32))",
        "gru": "(after[0].to(tl.float16).to(tl.float32),)",
    }
    mutate(LOOP, {"        state = after\n": f"        state = {rounded[cell]}\n"})
    assert carried_state_error(cell, device) > 10
