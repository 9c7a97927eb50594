"""Break a kernel in one place, and see that the tests' own checks notice: a check that cannot fail is worth nothing."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import fastrnn.kernels.cells as cells
import fastrnn.kernels.tile.resident as resident
from fastrnn import launch, ops

from .cases import Case, make_problem, over_budget
from .test_recurrence import carried_state_error

# Where, what is broken, by what, and the cell that shows it.
MUTATIONS = {
    "input and forget gate swapped": (cells, "f * state[1] + i * g", "i * state[1] + f * g", "lstm"),
    "reset before the product": (cells, "x[2] + r * rec[2]", "r * (x[2] + rec[2])", "gru"),
    "update gate turned round": (cells, "n + z * (state[0] - n)", "state[0] + z * (n - state[0])", "gru"),
    "reset gate lost in d_rec": (cells, "(d_r, d_z, d_n * r)", "(d_r, d_z, d_n)", "gru"),
    "tanh of c not derived": (cells, "dc += dh * o * d_tanh(tanh_c)", "dc += dh * o", "lstm"),
    "c for c_prev": (cells, "dc * c_prev * d_sigmoid(f)", "dc * c * d_sigmoid(f)", "lstm"),
    "relu not derived": (cells, "dh * d_relu(h)", "dh", "rnn_relu"),
    "dc not carried": (cells, "dc * f)", "dc)", "lstm"),
    "another gate's bias": (resident, "acc=b_hh[g]", "acc=b_hh[0]", "gru"),
    "prefetched a step too far": (resident, "tl.minimum(step + 1, T - 1)", "tl.minimum(step + 2, T - 1)", "rnn_tanh"),
    "state before the first taken from y": (resident, "last = step == T - 1", "last = step == T", "gru"),
    "both directions forward": (
        resident, "tl.where(direction == 0, step, T - 1 - step)", "tl.where(direction < 9, step, T)", "rnn_tanh",
    ),
    "W_hh transposed": (
        resident, "* H + offs_h[None, :] * H + offs_h[:, None]", "* H + offs_h[:, None] * H + offs_h[None, :]", "lstm",
    ),
    "gradient of h_n dropped": (resident, "if dh_n_ptr is not None:", "if dh_n_ptr is None:", "rnn_tanh"),
    "h_n not written": (resident, "store_tiles(h_n_ptr", "store_tiles(y_ptr", "lstm"),
    "h_0 dropped from dW_hh": (launch, "first.T @ h_0[d]", "0 * first.T @ h_0[d]", "lstm"),
    "dW_hh by y of the same step": (launch, "d_gates[1:], y[:-1, :, d]", "d_gates[1:], y[1:, :, d]", "rnn_tanh"),
}  # fmt: skip


@pytest.fixture
def mutate(monkeypatch, tmp_path):
    """Put a mutant of a module in its place."""

    def put(module, old: str, new: str) -> None:
        source = Path(module.__file__).read_text()
        assert old in source, "the mutation no longer applies: mutate the code that took its place"
        path = tmp_path / Path(module.__file__).name
        path.write_text(source.replace(old, new))
        name = f"{module.__name__}_mutant"
        spec = importlib.util.spec_from_file_location(name, path)
        mutant = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, mutant)
        spec.loader.exec_module(mutant)
        if module is launch:
            monkeypatch.setattr(ops, "launch", mutant)
        elif module is cells:
            monkeypatch.setattr(cells, "CELLS", mutant.CELLS)
        else:
            monkeypatch.setattr(resident, "forward", mutant.forward)
            monkeypatch.setattr(resident, "backward", mutant.backward)

    return put


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate, device):
    module, old, new, cell = MUTATIONS[name]
    problem = make_problem(cell, Case(T=4, B=3, H=12, D=2), torch.float32, device)
    assert not over_budget(problem)
    mutate(module, old, new)
    faults = over_budget(problem)
    print(name, faults)
    assert faults


def test_the_unchanged_source_passes_as_a_mutant(mutate, device):
    for module in (cells, resident, launch):
        mutate(module, "import", "import")
    assert not over_budget(make_problem("lstm", Case(T=4, B=3, H=12, D=2), torch.float32, device))


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_rounding_the_carried_state_is_caught(cell, mutate, device):
    rounded = {
        "lstm": "(state[0], state[1].to(tl.float16).to(tl.float32))",
        "gru": "(state[0].to(tl.float16).to(tl.float32),)",
    }
    mutate(resident, "CELL(x, rec, state)", f"CELL(x, rec, state)\n        state = {rounded[cell]}")
    assert carried_state_error(cell, device) > 10
