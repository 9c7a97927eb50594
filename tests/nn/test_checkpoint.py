"""checkpoint_every: the bits of the plain run, gradients summed in fp32, memory that grows by states and not gates."""

import copy
import functools
import pickle
import re
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import fastrnn
from fastrnn import reference
from fastrnn.nn import layers, paths
from fastrnn.planning.tiers import KERNELS as OURS
from fastrnn.stack import Stack

from ..support.cases import CELLS, DTYPES, Case, make_problem, over_budget, require_kernel

ALL = ("torch", "reference", *OURS)
NAMES = ("RNN", "GRU", "LSTM")


def layer(cell: str, x_gates, W_hh, b_hh, h_0, c_0, backend: str, K: int | None):
    """A recurrence as a layer whose W_ih is the identity: its products are exact, however they are cut."""
    D, G, H = x_gates.shape[2:]
    identity = torch.eye(D * G * H, dtype=x_gates.dtype, device=x_gates.device).chunk(D)
    params = [p for d in range(D) for p in (identity[d], W_hh[d], torch.zeros_like(b_hh[d]), b_hh[d])]
    hx = h_0 if c_0 is None else (h_0, c_0) if c_0.dim() == 3 else (h_0, *c_0)
    stack = Stack(cell, training=True, bidirectional=D == 2, backend=backend, checkpoint_every=K)
    y, final = paths.run(stack, x_gates.flatten(2), hx, params)
    others = reference.beside_h(torch.stack([state.to(y.dtype) for state in final]))
    return y.unflatten(2, (D, H)), final[0].to(y.dtype), others


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backend", OURS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_the_plain_run(cell, dtype, backend, device):
    """All but the gradients of weights, which are sums over time; those inside the budget."""
    cases = {Case(T=7, B=3, H=12, D=1): (1, 3), Case(T=5, B=2, H=9, D=2): (2, 5, 8)}
    if dtype != torch.float32:
        cases = {case: (2,) for case in cases}
    if backend == "cooperative":  # H over two programs
        cases = {Case(T=4, B=3, H=40, D=1): (3,), Case(T=3, B=2, H=9, D=2): (2,)}
    for case, chunks in cases.items():
        require_kernel(cell, case, dtype, device, backend)
        problem = make_problem(cell, case, dtype, device)
        plain = problem.run(functools.partial(layer, backend=backend, K=None))
        for K in chunks:
            run = functools.partial(layer, backend=backend, K=K)
            found = problem.run(run)
            for name in plain.keys() - {"d_W_hh", "d_b_hh"}:
                assert torch.equal(found[name], plain[name]), (name, K)
            assert not over_budget(problem, run)


@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_a_state_rounded_between_chunks_is_noticed(cell, monkeypatch, device):
    problem = make_problem(cell, Case(T=7, B=3, H=12, D=1), torch.bfloat16, device)
    plain = problem.run(functools.partial(layer, backend="resident", K=None))
    in_chunks = layers.in_chunks

    def rounding(step, x, state, K, *window):
        def rounded(xs, state, *window):
            y, after, c = step(xs, state, *window)
            return y, after._replace(states=tuple(s.bfloat16().float() for s in after.states)), c

        return in_chunks(rounded, x, state, K, *window)

    monkeypatch.setattr(layers, "in_chunks", rounding)
    found = problem.run(functools.partial(layer, backend="resident", K=2))
    assert not torch.equal(found["y"], plain["y"]) or not torch.equal(found["d_x_gates"], plain["d_x_gates"])


@pytest.mark.parametrize("backend", ("torch", "reference", "resident"))
@pytest.mark.parametrize("name", NAMES)
def test_modules_equal_the_plain_run(name, backend, device):
    """Stacked, bidirectional, batch_first, with dropout: outputs, states and all gradients."""
    kwargs = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5, "device": device}
    x = torch.randn(3, 7, 5, device=device)
    results = []
    for K in (None, 3):
        torch.manual_seed(0)
        module = getattr(fastrnn, name)(5, 8, backend=backend, checkpoint_every=K, **kwargs)
        given = x.clone().requires_grad_()
        output, final = module(given)
        outputs = [output, *(final if name == "LSTM" else (final,))]
        torch.manual_seed(1)
        upstream = [torch.randn_like(o) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, [given, *module.parameters()], upstream)])
        with torch.no_grad():
            torch.testing.assert_close(module.eval()(x)[0], module(given)[0])
    if backend == "torch" and device == "cuda":  # torch's fused dropout draws other masks there
        return
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ("torch", "reference"))
def test_weight_gradients_are_summed_in_fp32(backend, device, monkeypatch):
    """400 chunks that each add 1: a bfloat16 sum stays at 256."""
    x = torch.ones(400, 1, 1, dtype=torch.bfloat16, device=device)

    def gradient():
        W_ih, W_hh = (torch.full((1, 1), w, dtype=torch.bfloat16, device=device, requires_grad=True) for w in (1, 0))
        y, _ = fastrnn.rnn(
            x, None, [W_ih, W_hh], nonlinearity="relu", bias=False, backend=backend, training=True, checkpoint_every=1
        )
        y.sum().backward()
        return W_ih.grad.item()

    assert gradient() == 400
    exact = layers.weights_of
    monkeypatch.setattr(layers, "weights_of", lambda params, dtype, chunked: exact(params, dtype, False))
    assert gradient() == 256


class LiveElements(TorchDispatchMode):
    """Counts the elements of all tensors that operators make while the block runs and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() // tensor.element_size()
                if key not in self.known:
                    self.known.add(key)
                    self.live += size
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key, size)
        return results

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def elements_a_step(name: str, backend: str, directions: int, K: int, device: str) -> tuple[float, float]:
    """What a time step adds to the memory that forward keeps, and to the peak, in units of B * D * H elements."""
    B, H = 4, 16
    module = getattr(fastrnn, name)(
        1, H, bidirectional=directions == 2, backend=backend, checkpoint_every=K, device=device
    )
    found = []
    for T in (12, 24):
        x = torch.randn(T, B, 1, device=device)
        with LiveElements() as elements:
            output, _ = module(x)
            kept = elements.live
            output.sum().backward()
        found.append((kept, elements.peak))
    (kept, peak), (kept_twice, peak_twice) = found
    unit = 12 * B * directions * H
    return (kept_twice - kept) / unit, (peak_twice - peak) / unit


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", ("torch", "reference", "resident"))
@pytest.mark.parametrize("directions", (1, 2))
@pytest.mark.parametrize("name", ("GRU", "LSTM"))
def test_memory_grows_by_states_and_not_by_gates(name, directions, backend, device, monkeypatch):
    states = 2 if name == "LSTM" else 1
    kept, peak = elements_a_step(name, backend, directions, 4, device)
    assert kept <= 1 + states / 4 + 1 / 16  # y, the states of every fourth step, and x of size 1
    # Beside them y chunk by chunk, and the gradients of y and its chunks; 3 or 4 gates, saved or not, would be more.
    assert peak <= 3.2

    with monkeypatch.context() as patch:
        patch.setattr(layers, "recomputed", lambda step: step)
        kept, _ = elements_a_step(name, backend, directions, 4, device)
        assert kept > 4
    with monkeypatch.context() as patch:  # recomputed, but all of time at once
        whole = layers.in_chunks
        patch.setattr(layers, "in_chunks", lambda step, x, state, K, *window: whole(step, x, state, len(x), *window))
        _, peak = elements_a_step(name, backend, directions, 4, device)
        assert peak > 4


@pytest.mark.parametrize("unused", ("y", "h_n", "c_n"))
def test_outputs_without_upstream_gradient(unused, device):
    problem = make_problem("lstm", Case(T=5, B=2, H=8, D=2), torch.float32, device)
    index = ("y", "h_n", "c_n").index(unused)
    problem.upstream[index].zero_()

    def without(*args):
        outputs = list(layer(*args, backend="resident", K=2))
        outputs[index] = outputs[index].detach().requires_grad_()
        return tuple(outputs)

    assert not over_budget(problem, without)


def test_the_reference_is_differentiable_twice_in_chunks():
    problem = make_problem("gru", Case(T=3, B=1, H=2, D=2), torch.float64, "cpu")
    tensors = [t.requires_grad_() for t in problem.inputs if t is not None]
    run = functools.partial(layer, "gru", c_0=None, backend="reference", K=2)
    assert torch.autograd.gradcheck(lambda *t: run(*t)[:2], tensors)
    assert torch.autograd.gradgradcheck(lambda *t: run(*t)[:2], tensors)


def test_autocast(device):
    x = torch.randn(5, 2, 3, device=device)
    found = []
    for K in (None, 2):
        torch.manual_seed(0)
        module = fastrnn.LSTM(3, 8, backend="resident", checkpoint_every=K, device=device)
        with torch.autocast(device, torch.bfloat16):
            output, (h_n, c_n) = module(x)
        assert output.dtype == h_n.dtype == c_n.dtype == torch.bfloat16
        output.float().sum().backward()
        assert module.weight_hh_l0.grad.dtype == torch.float32
        found.append((output, module.weight_hh_l0.grad))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0.02, atol=0.02)  # rounded to 8 bits on the way


def test_torch_compile_traces_it_whole(device):
    torch._dynamo.reset()
    module = fastrnn.GRU(3, 8, bidirectional=True, backend="resident", checkpoint_every=2, device=device)
    x = torch.randn(5, 2, 3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it looks through functools.cache
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        found = compiled(x)[0]
        gradients = torch.autograd.grad(found.sum(), list(module.parameters()))
    torch.testing.assert_close(found, module(x)[0])
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("K", (0, -1, 2.0, True, "4"))
def test_wrong_values(K):
    text = re.escape(f"checkpoint_every: expected a positive int or None, got {K!r}")
    with pytest.raises(ValueError, match=text):
        fastrnn.GRU(3, 4, checkpoint_every=K)
    for backend in ("auto", *ALL):
        with pytest.raises(ValueError, match=text):
            params = list(torch.nn.GRU(3, 4).parameters())
            fastrnn.gru(torch.zeros(2, 1, 3), None, params, backend=backend, checkpoint_every=K)


@pytest.mark.parametrize("backend", ("auto", "torch", "reference", "resident", "cooperative"))
def test_what_is_missing_is_said(backend, device):
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]).to(device)
    with pytest.raises(NotImplementedError, match="checkpoint_every with packed or ragged sequences is missing"):
        fastrnn.GRU(3, 4, backend=backend, checkpoint_every=2, device=device)(packed)


def test_kept_by_repr_pickle_and_deepcopy():
    module = fastrnn.GRU(3, 4, backend="resident", checkpoint_every=8)
    assert repr(module) == "fastrnn.GRU(3, 4, backend='resident', checkpoint_every=8)"
    assert repr(fastrnn.GRU(3, 4, checkpoint_every=8)) == "fastrnn.GRU(3, 4, checkpoint_every=8)"
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert copied.checkpoint_every == 8


def test_the_plan_says_what_is_kept(device, capsys):
    sizes = {"hidden_size": 64, "batch_size": 16, "dtype": torch.bfloat16, "device": "sm_90"}
    plan = fastrnn.plan("lstm", seq_len=1000, checkpoint_every=100, **sizes)
    assert plan.kernel.saved_bytes * 10 == fastrnn.plan("lstm", seq_len=1000, **sizes).kernel.saved_bytes
    assert "1,000 KiB for backward, of one chunk of 100 steps at a time" in str(plan)
    layer = fastrnn.LSTM(3, 4, checkpoint_every=2, backend="resident", device=device)
    fastrnn.explain(layer, torch.zeros(5, 1, 3, device=device))
    assert "of one chunk of 2 steps at a time" in capsys.readouterr().out


@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh"))
def test_the_reference_takes_states_in_fp32_too(cell):
    problem = make_problem(cell, Case(T=4, B=2, H=5, D=1), torch.bfloat16, "cpu")
    x_gates, W_hh, b_hh, *states = problem.inputs
    h_0, c_0 = (None if s is None else s.float() for s in states)
    y, h_n, c_n = reference.recurrence(cell, x_gates, W_hh, b_hh, h_0, c_0)
    assert y.dtype == torch.bfloat16 and h_n.dtype == torch.float32
    assert torch.equal(h_n[0].bfloat16(), y[-1, :, 0])
    y_1, h_1, c_1 = reference.recurrence(cell, x_gates[:3], W_hh, b_hh, h_0, c_0)
    y_2, h_2, c_2 = reference.recurrence(cell, x_gates[3:], W_hh, b_hh, h_1, c_1)
    assert torch.equal(torch.cat((y_1, y_2)), y) and torch.equal(h_2, h_n)
    assert c_n is None or torch.equal(c_2, c_n)


def test_chunks_are_counted_from_each_directions_own_start():
    x = torch.arange(7.0)[:, None, None]
    ahead, behind = zip(*layers.split(x, 3, 2), strict=True)
    assert [chunk.flatten().tolist() for chunk in ahead] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [chunk.flatten().tolist() for chunk in behind] == [[4, 5, 6], [1, 2, 3], [0]]
    ys = [torch.cat(of_both, 2) for of_both in layers.split(x, 3, 2)]
    assert torch.equal(layers.join(ys, 2), torch.cat((x, x), 2))
    assert all(chunk.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for chunk in (*ahead, *behind))
