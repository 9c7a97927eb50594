"""The kernels for CPUs: against the fp64 reference, bit by bit whatever the threads, after a fork, NaN, and mutations.

Other files run them beside the tiers (backend "cpu").
"""

import functools
import gc
import os

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastrnn
from fastrnn import cells, ops, reference

from ..support import children
from ..support.cases import CELLS, SEQUENCES, Case, make_problem, make_sequences, over_budget

pytest.importorskip("llvmlite")
from fastrnn.cpu import memory, threads
from fastrnn.ops import prepared

recurrence = functools.partial(ops.recurrence, backend="cpu")


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("cell", CELLS)
def test_sequences_match_the_reference(cell, kind):
    assert not over_budget(make_sequences(cell, Case(T=5, B=5, H=24, D=2), torch.float32, "cpu", kind), recurrence)


@pytest.mark.parametrize("H", (130, 300))
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_wide_layers_match_the_reference(cell, H):
    """Sums of more terms than a part has, and a last panel that is not full."""
    assert not over_budget(make_problem(cell, Case(T=3, B=9, H=H, D=1), torch.float32, "cpu"), recurrence)


@pytest.mark.parametrize("cell", CELLS)
def test_float64(cell):
    """As exact as the reference in float64, and differentiable as gradcheck wants it."""
    problem = make_problem(cell, Case(T=4, B=3, H=6, D=2), torch.float64, "cpu")
    expected, found = problem.run(reference.recurrence), problem.run(recurrence)
    for name, truth in expected.items():
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-13, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", ("GRU", "LSTM", "RNN", "SLSTM"))
def test_gradcheck(name):
    module = getattr(fastrnn, name)(2, 3, backend="cpu", dtype=torch.float64, num_layers=2)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    leaves = (x, *module.parameters())

    def run(x, *parameters):
        names = [name for name, _ in module.named_parameters()]
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))[0]

    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves, check_undefined_grad=False)  # the ops take some upstream gradient


def results(module: torch.nn.Module, x: torch.Tensor, **options: object) -> list[torch.Tensor]:
    y, *_ = module(x, **options)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("B", (1, 5, 37))
def test_bits_do_not_depend_on_threads(B, monkeypatch):
    """Of the recurrence: products before and after it are torch's."""
    torch.manual_seed(0)
    x_gates, W_hh = torch.randn(6, B, 2, 3, 40), torch.randn(2, 120, 40) / 6
    h_0 = torch.randn(2, B, 40)
    found = []
    monkeypatch.setattr(threads, "LEAST", 1)
    for count, rows in ((1, 32), (2, 32), (3, 32), (1, 3), (1, 3)):
        torch.set_num_threads(count)
        monkeypatch.setattr(threads, "ROWS", rows)
        given = [t.clone().requires_grad_() for t in (x_gates, W_hh, h_0)]
        y, h_n, _ = recurrence("gru", given[0], given[1], None, given[2], None)
        d_x, d_h = torch.autograd.grad(y.sin().sum(), (given[0], given[2]))
        found.append((y.detach(), h_n.detach(), d_x, d_h))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.usefixtures("_threads")
def test_threads_are_used(monkeypatch):
    torch.set_num_threads(2)
    tiles = []
    monkeypatch.setattr(
        threads.ThreadPoolExecutor, "map", lambda self, run, given: tiles.extend(given) or map(run, given)
    )
    results(fastrnn.GRU(8, 16, backend="cpu"), torch.randn(600, 64, 8, requires_grad=True))
    assert len(tiles) == 4  # two a pass
    results(fastrnn.GRU(8, 16, backend="cpu"), torch.randn(100, 64, 8, requires_grad=True))
    assert len(tiles) == 4  # too little for a second thread


FORK = """
import os, torch
from fastrnn import ops

torch.set_num_threads(2)  # torch's own products hang in a child; the recurrence has threads of its own
given = "gru", torch.randn(100, 64, 1, 3, 64), torch.randn(1, 192, 64) / 8, None, torch.zeros(1, 64, 64), None
with torch.no_grad():
    y = ops.recurrence(*given, backend="cpu")[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.recurrence(*given, backend="cpu")[0], y) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_runs(tmp_path):
    """As a DataLoader's workers do."""
    (tmp_path / "fork.py").write_text(FORK)
    done = children.run([str(tmp_path / "fork.py")])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", (float("nan"), float("inf"), -float("inf"), 1e30))
@pytest.mark.parametrize("name", ("GRU", "LSTM", "RNN", "SLSTM"))
def test_what_is_not_finite_goes_where_others_send_it(name, what, device):
    """The reference; the sLSTM's infinite gates are those of its kernels, on a GPU if there is one."""
    x = torch.randn(5, 3, 4)
    x[2, 1, 0] = what
    other, device = ("resident", device) if name == "SLSTM" else ("reference", "cpu")
    ours, theirs = (getattr(fastrnn, name)(4, 20, backend=backend) for backend in ("cpu", other))
    theirs.load_state_dict(ours.state_dict())
    with np.errstate(invalid="ignore"):
        found, expected = ours(x)[0], theirs.to(device)(x.to(device))[0]
    torch.testing.assert_close(found, expected.cpu(), equal_nan=True)
    assert found[:2].isfinite().all() and found[:, 0].isfinite().all()
    if what != what:
        assert found[2:, 1].isnan().all()


def test_nan_in_padding_and_frozen_rows_stays_out():
    x, lengths = torch.randn(6, 3, 4), torch.tensor([6, 2, 0])
    x[2:, 1] = float("nan")
    x[:, 2] = float("nan")
    gru = fastrnn.GRU(4, 9, backend="cpu", bidirectional=True)
    y, h_n = gru(x.requires_grad_(), lengths=lengths)
    gradients = torch.autograd.grad(y.sum() + h_n.sum(), [x, *gru.parameters()])
    assert all(t.isfinite().all() for t in (y, h_n, *gradients))


def test_a_layer_runs_twice_alike_and_gives_memory_back():
    """Bit by bit; what is used again is not what somebody still has."""
    gru, x = (
        fastrnn.GRU(8, 24, num_layers=2, bidirectional=True, backend="cpu"),
        torch.randn(9, 5, 8, requires_grad=True),
    )
    first = results(gru, x)
    kept = [t.clone() for t in first]
    other = results(gru, torch.randn(9, 5, 8, requires_grad=True))
    assert not torch.equal(first[0], other[0])
    assert all(map(torch.equal, first, kept))
    assert all(map(torch.equal, results(gru, x), kept))
    gc.collect()
    memory.forget()
    results(gru, x)
    assert 0 < len(memory._idle) <= 10  # no cycle keeps a block: x_gates, saved


def test_two_forwards_before_backward():
    gru, x = fastrnn.GRU(8, 24, backend="cpu"), torch.randn(2, 9, 5, 8)
    alone = [results(gru, t.clone().requires_grad_()) for t in x]
    given = [t.clone().requires_grad_() for t in x]
    ys = [gru(t)[0] for t in given]
    for y, t, expected in zip(ys, given, alone, strict=True):
        found = torch.autograd.grad(y.square().sum(), [t, *gru.parameters()])
        assert all(map(torch.equal, (y, *found), expected))


def test_idle_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 1000)
    memory.forget()
    blocks = [memory.empty((100 + n,), torch.float32) for n in range(5)]
    blocks.clear()
    assert sum(t.numel() for t in memory._idle.values()) <= 1000


# What is broken: in which function, which text, by what, and the cell that shows it.
MUTATIONS = {
    "another gate": ("fastrnn.cpu.loop.forward", "i * wide + g * H + j", "i * wide + j", "gru"),
    "no bias": ("fastrnn.cpu.loop.forward", "if b is None else b.load(column)", "", "gru"),
    "first states left out": ("fastrnn.cpu.loop.forward", "inputs.states is not None", "False", "lstm"),
    "c not kept": ("fastrnn.cpu.loop.forward", "after[n + 1]", "after[0]", "lstm"),
    "dh not carried": ("fastrnn.cpu.loop.backward", "d_states[0].load(i * S + column)", "code.number(0)", "gru"),
    "final gradients left out": ("fastrnn.cpu.loop.backward", "read.d_finals is None", "True", "lstm"),
    "state before of the same step": ("fastrnn.cpu.loop._differentiate", "exists, earlier, t", "exists, t, t", "gru"),
    "dy left out": ("fastrnn.cpu.loop._differentiate", "read.dy is not None", "False", "rnn_tanh"),
    "d_x for d_rec": ("fastrnn.cpu.loop._differentiate", "d_rec.store(d_gates[g]", "d_rec.store(d_x[g]", "gru"),
    "resets ignored": ("fastrnn.cpu.loop._restart", "code.when(anew)", "code.when(anew & (t < 0))", "gru"),
    "gradients pass resets": ("fastrnn.cpu.loop._cut", "code.when(anew)", "code.when(anew & (t < 0))", "gru"),
    "the cell's own": ("kernels.cells.gru_backward", "(d_r, d_z, d_n * r)", "(d_r, d_z, d_n)", "gru"),
    "W_hh reversed": ("fastrnn.cpu.kernels.packed", "matrices, strict", "[W.flip(1) for W in matrices], strict", "gru"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate):
    function, old, new, cell = MUTATIONS[name]
    problem = make_sequences(cell, Case(T=5, B=4, H=12, D=2), torch.float32, "cpu", "lengths, resets by step")
    prepared.forget()
    assert not over_budget(problem, recurrence)
    mutate({function: (old, new)})
    prepared.forget()
    try:
        assert over_budget(problem, recurrence)
    finally:
        prepared.forget()


def test_a_cell_with_what_a_cpu_lacks_says_so(monkeypatch):
    import triton
    import triton.language as tl

    @triton.jit
    def forward(x, rec, state, HOW: tl.constexpr):
        return (tl.cumsum(x[0] + rec[0]),), ()

    @triton.jit
    def backward(d_state, saved, h, h_prev, HOW: tl.constexpr):
        return (d_state[0],), (d_state[0],), (d_state[0],)

    monkeypatch.setitem(cells.CELLS, "sums", cells.Cell("sums", 1, cells.rnn_relu_step, 0, kernels=(forward, backward)))
    with pytest.raises(NotImplementedError, match="tl.cumsum is missing in kernels for the CPU"):
        recurrence("sums", torch.randn(2, 2, 1, 1, 4), torch.randn(1, 4, 4), None, torch.zeros(1, 2, 4), None)
