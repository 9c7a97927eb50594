"""A cell in one file (examples/mgu.py) runs in every tier, interpreted and compiled; what is no cell is refused."""

import functools
import importlib.util
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastrnn
from fastrnn import cells, ops, reference
from fastrnn.kernels.cells import lstm_backward, lstm_forward
from fastrnn.planning.tiers import KERNELS

from ..support import children
from ..support.cases import (
    CASES,
    DTYPES,
    ON_CPU,
    SEQUENCES,
    Case,
    make_problem,
    make_sequences,
    over_budget,
    require_kernel,
)

FILE = Path(__file__).parents[2] / "examples/mgu.py"


@pytest.fixture(autouse=True)
def _tables():
    """Registered cells are gone after each test."""
    with mock.patch.dict(cells.CELLS):
        yield


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mgu():
    return load(FILE)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("mgu")
def test_kernels_match_the_step(case, dtype, backend, device):
    require_kernel("mgu", case, dtype, device, backend)
    problem = make_problem("mgu", case, dtype, device)
    assert not over_budget(problem, functools.partial(ops.recurrence, backend=backend))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.usefixtures("mgu")
def test_kernels_match_the_step_on_sequences(kind, backend, device):
    """What a cell's author never wrote a line for: lengths, ragged batches, resets."""
    case = Case(T=5, B=3, H=24, D=2)
    require_kernel("mgu", case, torch.float32, device, backend)
    problem = make_sequences("mgu", case, torch.float32, device, kind)
    assert not over_budget(problem, functools.partial(ops.recurrence, backend=backend))


@pytest.mark.parametrize(
    ("old", "new"),
    (
        ("f * (n - state[0])", "f * (n + state[0])"),
        ("x[1] + f * rec[1]", "f * (x[1] + rec[1])"),
        (" + d_n * rec_n", ""),
        ("(d_f, d_n * f)", "(d_f, d_n)"),
        ("dh * (1.0 - f)", "dh * f"),
        ("* d_tanh(n)", ""),
        ("splits_last_gate=True", "splits_last_gate=False"),
    ),
)
def test_a_wrong_cell_is_noticed(old, new, tmp_path, device):
    source = FILE.read_text()
    assert source.count(old) == 1
    (tmp_path / "wrong.py").write_text(source.replace(old, new))
    load(tmp_path / "wrong.py")
    assert over_budget(make_problem("mgu", Case(T=5, B=3, H=24, D=1), torch.float32, device))


@pytest.mark.usefixtures("mgu")
def test_gradcheck_of_the_step():
    problem = make_problem("mgu", Case(T=3, B=2, H=3, D=2), torch.float64, "cpu")
    inputs = [None if t is None else t.requires_grad_() for t in problem.inputs]
    present = [t for t in inputs if t is not None]

    def run(*tensors):
        given = iter(tensors)
        return reference.recurrence("mgu", *(None if t is None else next(given) for t in inputs))[:2]

    assert torch.autograd.gradcheck(run, present)


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, test_kernels_match_the_step runs compiled")
@pytest.mark.parametrize(("backend", "hidden"), (("resident", 24), ("cluster", 100), ("cooperative", 262)))
def test_compiled_kernels_match_the_step(backend, hidden):
    """The file is the command line too: its cell's PTX is executed on the CPU, and compared in fp64."""
    command = [str(FILE), "inspect", "--cell", "mgu", "--hidden", str(hidden), "--batch", "3"]
    command += ["--arch", "sm_90", "--backend", backend, "--execute", "--json"]
    done = children.run(command, errors=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    for row in rows:
        assert row["backend"] == backend and row["dialect"] == "Gluon"
        assert row["executed_budget_used"] < 1
        assert row["spill_bytes"] == row["weight_global_loads_in_loop"] == row["unguarded_remote_accesses"] == 0


@pytest.mark.parametrize("backend", ("auto", "reference", "resident"))
def test_a_layer_of_it(mgu, backend, device):
    """Windows with carried state are one run; gradients reach every parameter, second ones too."""
    layer, x = mgu.MGU(3, 8, backend).to(device), torch.randn(6, 2, 3, device=device, requires_grad=True)
    y, h_n = layer(x)
    first, h = layer(x[:4])
    second, h = layer(x[4:], h)
    torch.testing.assert_close(y, torch.cat((first, second)))
    torch.testing.assert_close(h_n, h)
    torch.testing.assert_close(h_n, y[-1])
    gradients = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()), create_graph=True)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    second = torch.autograd.grad(gradients[0].square().sum(), list(layer.parameters()))
    assert all(gradient.isfinite().all() for gradient in second)


@pytest.mark.usefixtures("mgu")
def test_auto_takes_the_reference_where_no_kernel_runs():
    sizes = {"hidden_size": 64, "batch_size": 16}
    assert fastrnn.plan("mgu", **sizes, device="cpu").backend == ON_CPU
    assert fastrnn.plan("mgu", **sizes, dtype=torch.float64, device="sm_90").backend == "reference"
    assert fastrnn.plan("mgu", **sizes, dtype=torch.bfloat16, device="sm_90").backend == "resident"
    assert fastrnn.plan("gru", **sizes, device="cpu").backend == "torch"
    with pytest.raises(NotImplementedError, match="backend='torch': torch has no kernel for the cell 'mgu'"):
        fastrnn.plan("mgu", **sizes, device="cpu", backend="torch")


def test_a_cell_with_two_states(device):
    """The LSTM under another name gives the LSTM's bits, in the reference and in a kernel."""
    cells.register(
        "peer", gates=4, step=cells.lstm_step, forward=lstm_forward, backward=lstm_backward, saved=4, has_c=True
    )
    problem = make_problem("lstm", Case(T=3, B=2, H=8, D=2), torch.float32, device)
    for run in (ops.recurrence, reference.recurrence):
        expected, found = problem.run(run), problem._replace(cell="peer").run(run)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


RIGHT = {
    "name": "peer",
    "gates": 4,
    "step": cells.lstm_step,
    "forward": lstm_forward,
    "backward": lstm_backward,
    "saved": 4,
}


@pytest.mark.parametrize(
    ("wrong", "text"),
    (
        ({"name": "lstm"}, "name: expected a new name, other than 'lstm', 'gru', .*'slstm'.*; got 'lstm'"),
        ({"name": 7}, "name: expected a new name.*; got 7"),
        ({"gates": 0}, "gates: expected an int of at least 1; got 0"),
        ({"gates": 2.0}, "gates: expected an int of at least 1; got 2.0"),
        ({"saved": -1}, "saved: expected an int of at least 0; got -1"),
        ({"step": None}, "step: expected a function of torch tensors; got None"),
        ({"forward": cells.lstm_step}, "forward: expected a function with @triton.jit; got <function lstm_step"),
        ({"backward": None}, "backward: expected a function with @triton.jit; got None"),
    ),
)
def test_what_is_no_cell_is_refused(wrong, text):
    arguments = RIGHT | wrong
    with pytest.raises(ValueError, match=text):
        cells.register(arguments.pop("name"), **arguments)
    assert "peer" not in cells.CELLS
