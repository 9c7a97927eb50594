"""What only a GPU can show: tf32, torch's default for float32, CUDA graphs, and the backend "torch" by cuDNN."""

import functools

import pytest
import torch

import fastrnn
from fastrnn import cells, ops
from fastrnn.planning.tiers import TIERS
from fastrnn.torch_path import packed

from ..nn.test_modules import NAMES, compare, flat, pair
from ..support.cases import (
    CASES,
    CELLS,
    SEQUENCES,
    TIMES_FLOAT32,
    Case,
    make_problem,
    make_sequences,
    over_budget,
    require_kernel,
)
from ..support.planned import tiles_of

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LARGE = (Case(T=3, B=17, H=130, D=2), Case(T=2, B=3, H=384, D=1), Case(T=2, B=5, H=650, D=1))


@pytest.fixture
def tf32():
    """torch's default for RNNs, which conftest.py takes away."""
    before, torch.backends.cudnn.rnn.fp32_precision = torch.backends.cudnn.rnn.fp32_precision, "tf32"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def computed_in(dtype: torch.dtype, backend: str = "resident"):
    """The recurrence of float16 tensors, computed in another dtype and rounded at its end."""

    def run(cell, *inputs, **options):
        converted = (None if t is None else t.to(dtype) for t in inputs)
        starts = {name: options[name].to(dtype) for name in ("reset_h", "reset_c") if name in options}
        results = ops.recurrence(cell, *converted, backend=backend, **(options | starts))
        kept = [torch.float16] * 3 + [cells.CELLS[cell].state_dtype(torch.float16)]  # of every step
        return tuple(None if t is None else t.to(own) for t, own in zip(results, kept))  # noqa: B905 - c if asked for

    return run


def tf32_faults(problem, backend: str) -> dict[str, str]:
    """tf32 keeps float16's 11 bits: what float16's reference does sets the budget."""
    return over_budget(problem, computed_in(torch.float32, backend), TIMES_FLOAT32)


@on_a_gpu
@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("backend", TIERS)
@pytest.mark.parametrize("case", (*CASES, *LARGE), ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_is_as_right_as_float16(cell, case, backend, device):
    require_kernel(cell, case, torch.float32, device, backend)
    plan = fastrnn.plan(cell, hidden_size=case.H, batch_size=case.B, directions=case.D, device=device, backend=backend)
    assert plan.kernel.precision == "tf32"
    assert not tf32_faults(make_problem(cell, case, torch.float16, device), backend)


@on_a_gpu
@pytest.mark.usefixtures("tf32", "poisoned")
@pytest.mark.parametrize("backend", TIERS)
@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_on_sequences(cell, kind, backend, device):
    case = Case(T=5, B=18, H=40, D=2)
    require_kernel(cell, case, torch.float32, device, backend)
    assert not tf32_faults(make_sequences(cell, case, torch.float16, device, kind), backend)


@on_a_gpu
@pytest.mark.parametrize("rows", (8, 16, 32, 64))
@pytest.mark.parametrize("cell", CELLS)
def test_batch_tiles_of_so_many_rows(cell, rows, device):
    """Of which auto takes the tall ones only for thousands of sequences."""
    with tiles_of(rows):
        problem = make_problem(cell, Case(T=4, B=rows + 3, H=48, D=2), torch.bfloat16, device)
        assert not over_budget(problem, functools.partial(ops.recurrence, backend="resident"))


@pytest.mark.parametrize("cell", CELLS)
def test_the_budget_of_tf32_notices_three_bits_less(cell, device):
    """And passes what float32 computes."""
    problem = make_problem(cell, Case(T=5, B=3, H=24, D=2), torch.float16, device)
    assert not tf32_faults(problem, "resident")
    assert over_budget(problem, computed_in(torch.bfloat16), TIMES_FLOAT32)


# A layer of each tier, and two layers of two directions.
GRAPHED = (
    ("LSTM", 64, {}),
    ("GRU", 256, {}),
    ("LSTM", 1024, {}),
    ("LSTM", 64, {"num_layers": 2, "bidirectional": True}),
)


def training_step(module, x) -> list[torch.Tensor]:
    """Output, states and gradients, which no step shares."""
    for parameter in module.parameters():
        parameter.grad = None
    outputs = flat(*module(x))
    sum(o.float().square().mean() for o in outputs).backward()
    return [*outputs, *(p.grad for p in module.parameters())]


@on_a_gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(("name", "H", "kwargs"), GRAPHED)
def test_a_captured_training_step_is_replayed_on_new_input(name, H, kwargs, dtype):
    module = getattr(fastrnn, name)(H, H, device="cuda", dtype=dtype, **kwargs)
    static, other = torch.randn(2, 32, 4, H, device="cuda", dtype=dtype)
    assert module.plan(static).kernel is not None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which a capture could not hold
        for _ in range(3):
            before = [t.detach().clone() for t in training_step(module, static)]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = training_step(module, static)
    static.copy_(other)
    for _ in range(2):  # what a replay leaves behind, counters of a barrier too, does not disturb the next
        graph.replay()
    found = [t.detach().clone() for t in replayed]
    for a, b, old in zip(found, training_step(module, other), before, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, old)


@on_a_gpu
@pytest.mark.parametrize(("name", "H", "kwargs"), GRAPHED)
def test_make_graphed_callables(name, H, kwargs):
    module = getattr(fastrnn, name)(H, H, device="cuda", dtype=torch.bfloat16, **kwargs)
    xs = torch.randn(2, 16, 4, H, device="cuda", dtype=torch.bfloat16)

    def results(x) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        outputs = flat(*module(x))
        gradients = torch.autograd.grad(sum(o.float().sum() for o in outputs), [x, *module.parameters()])
        return [t.detach().clone() for t in (*outputs, *gradients)]

    truth = [results(x) for x in xs]
    torch.cuda.make_graphed_callables(module, (xs[0].clone().requires_grad_(),))  # puts its graphs into the module
    for x, expected in zip(xs, truth, strict=True):
        for a, b in zip(results(x), expected, strict=True):
            assert torch.equal(a, b)


@on_a_gpu
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
def test_lengths_and_resets_are_read_when_a_graph_is_replayed(backend):
    module = fastrnn.GRU(16, 64, backend=backend, device="cuda")
    x = torch.randn(8, 3, 16, device="cuda")
    lengths, reset = torch.tensor([8, 8, 8], device="cuda"), torch.zeros(8, 3, dtype=torch.bool, device="cuda")

    def step() -> list[torch.Tensor]:
        module.zero_grad(set_to_none=True)
        output, h_n = module(x, lengths=lengths, reset=reset)
        output.square().mean().backward()
        return [output, h_n, *(p.grad for p in module.parameters())]

    fastrnn.warmup(module, x, lengths=lengths, reset=reset)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    lengths.copy_(torch.tensor([8, 3, 0]))
    reset[4, 0] = True
    graph.replay()
    found = [t.detach().clone() for t in replayed]
    assert all(map(torch.equal, found, step()))
    assert found[0][3:, 1].count_nonzero() == 0


@on_a_gpu
def test_lengths_on_the_host_are_not_captured():
    module, x = fastrnn.GRU(16, 64, backend="resident", device="cuda"), torch.randn(8, 3, 16, device="cuda")
    with torch.no_grad():
        module(x, lengths=[8, 3, 1])
        with (
            pytest.raises(ValueError, match="^lengths: .* while a CUDA graph"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            module(x, lengths=[8, 3, 1])


@on_a_gpu
def test_after_a_warmup_the_first_call_compiles_nothing():
    from triton import knobs

    module, x = fastrnn.LSTM(16, 96, device="cuda", dtype=torch.bfloat16), (12, 5, 16)
    compiled = []
    knobs.compilation.listener = lambda src, cache_hit, **_: compiled.append(src.name)
    try:
        count = fastrnn.warmup(module, x)
        compiled.clear()
        module(torch.randn(x, device="cuda", dtype=torch.bfloat16))[0].sum().backward()
    finally:
        knobs.compilation.listener = None
    assert count in (0, 2) and compiled == []  # not even asked for: they are loaded
    assert module.weight_hh_l0.grad is not None


@pytest.fixture
def cudnn():
    """What conftest.py turns off, and afterwards turns to what it was."""
    torch._C._set_cudnn_enabled(True)


# In float32 and "ieee" cuDNN's gradients were off by 5e-5 (H100, torch 2.11).
CUDNN = 2e-4
NOT_ONE_CHUNK = "ignore:RNN module weights are not part of single contiguous chunk"


@on_a_gpu
@pytest.mark.usefixtures("cudnn")
@pytest.mark.filterwarnings(NOT_ONE_CHUNK)
@pytest.mark.parametrize("checkpoint_every", (None, 2))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("kwargs", ({}, {"num_layers": 2, "bidirectional": True, "batch_first": True}), ids=str)
@pytest.mark.parametrize("name", (*NAMES, "projected LSTM"))
def test_backend_torch_by_cudnn(name, kwargs, bias, checkpoint_every, device):
    name, *projected = name.split()[::-1]
    kwargs = kwargs | {"bias": bias} | ({"proj_size": 3} if projected else {})
    ours, theirs = pair(name, device, "torch", 5, 8, **kwargs)
    ours.checkpoint_every = checkpoint_every
    compare(ours, theirs, torch.randn(5, 4, 5, device=device), tolerance=CUDNN)


def test_cudnn_is_given_no_other_weights_for_biases():
    """No GPU is needed to see that the first parameter's memory ends before the next layer's weights."""
    memory = torch.empty(100, device="meta")
    params = [memory[:12].view(4, 3), memory[12:28].view(4, 4)]
    assert packed.on_its_own(params, True)[0] is params[0]
    first, second = packed.on_its_own(params, False)
    assert first.untyped_storage().nbytes() == first.nbytes and second is params[1]


@on_a_gpu
@pytest.mark.usefixtures("cudnn")
@pytest.mark.filterwarnings(NOT_ONE_CHUNK)
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("name", NAMES)
def test_sequences_by_cudnn(name, bias, device):
    """Against the kernels, which tests/nn/test_options.py holds to torch.nn: lengths, resets, and c of every step."""
    x = torch.randn(5, 3, 4, device=device)
    options = {"lengths": torch.tensor([2, 5, 3]), "reset": torch.rand(5, 3, device=device) < 0.4}
    options |= {"return_cell_states": True} if name == "LSTM" else {}
    found = []
    for backend in ("resident", "torch"):
        torch.manual_seed(0)
        module = getattr(fastrnn, name)(4, 6, 2, bidirectional=True, bias=bias, backend=backend, device=device)
        output, final, *cells = module(x, **options)
        found.append([*flat(output, final), *cells])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=CUDNN, atol=CUDNN)
