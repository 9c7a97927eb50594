"""torch.compile without a graph break, torch.export, and nothing in a launch that waits for the device."""

import contextlib
import shutil
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn.ops import launch

from .test_modules import BACKENDS, NAMES, flat

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
COMPILERS = ("aot_eager", *(("inductor",) if shutil.which("gcc") else ()))


@pytest.fixture(autouse=True)
def _quiet():
    """torch.compile warns of torch's own doings: that it looks through functools.cache, and what it deprecates."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.fixture
def default_precision():
    """torch 2.13's export fails where fp32_precision of RNNs is not the default, as conftest.py sets it."""
    rnn = torch.backends.cudnn.rnn
    before, rnn.fp32_precision = rnn.fp32_precision, "tf32"
    yield
    rnn.fp32_precision = before


def runs_torchs(backend: str, device: str) -> bool:
    return backend == "torch" or (backend == "auto" and device == "cpu")


def trained(module, run, x, steps: int = 2) -> list[torch.Tensor]:
    """Outputs, gradients and parameters of steps of gradient descent."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    results = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = flat(*run(x))
        sum(o.square().sum() for o in outputs).backward()
        optimizer.step()
        results += [*outputs, *(p.grad.clone() for p in module.parameters())]
    return [*results, *module.parameters()]


def made(name: str, backend: str, device: str, **kwargs):
    torch.manual_seed(0)
    kwargs = {"num_layers": 2, "bidirectional": True, "device": device} | kwargs
    module = getattr(fastrnn, name)(3, 4, backend=backend, **kwargs)
    return module, torch.randn(5, 2, 3, dtype=module.weight_hh_l0.dtype, device=device)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_gives_the_same(name, backend, device):
    """Training and inference, as one graph; before torch's own kernel the graph breaks, as at torch.nn's layers."""
    module, x = made(name, backend, device)
    truth = trained(module, module, x)
    module, x = made(name, backend, device)
    breaks = runs_torchs(backend, device)
    if breaks:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="_untraced"):
            torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=not breaks)
    for a, b in zip(trained(module, compiled, x), truth, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", ({}, {"checkpoint_every": 2}, {"subclass": True}), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_torchs_kernels_are_traced_where_torch_is_told_to(name, options, device):
    """By torch's own setting for its layers; float64: see test_torchs_lstm_on_the_cpu_does_not_train_compiled."""
    if name == "LSTM" and TORCH < (2, 13):
        pytest.skip("torch before 2.13 traces its own LSTM's states with a dimension too many, torch.nn.LSTM's too")
    subclass, more = options.get("subclass"), {k: v for k, v in options.items() if k != "subclass"}
    module, x = made(name, "torch", device, dtype=torch.float64, **more)
    if subclass:
        module = fastrnn.convert(fastrnn.revert(module), backend="torch")
        assert isinstance(module, getattr(torch.nn, name))
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(differentiated(module, compiled, (x,), {}), differentiated(module, module, (x,), {}))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ("module", "checkpointed", "function", "converted"))
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_program_does_not_grow_with_time(name, kind, device):
    """A layer between others by torch's kernel: torch.compile sees the others only, and once, however long T is."""
    module = getattr(torch.nn, name)(4, 4).to(device)
    module = fastrnn.convert(module, backend="torch", subclass=kind == "converted")
    module.checkpoint_every = 3 if kind == "checkpointed" else None
    function = {"LSTM": fastrnn.lstm, "GRU": fastrnn.gru, "RNN": fastrnn.rnn}[name]
    parameters, below = list(module.parameters()), torch.nn.Linear(3, 4).to(device)

    def model(x):
        x = below(x)
        y, _ = function(x, None, parameters, backend="torch") if kind == "function" else module(x)
        return y.tanh()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for T in (30, 20, 40):
        x = torch.randn(T, 2, 3, device=device)
        torch.testing.assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        assert module.weight_hh_l0.grad is not None
    assert counter.op_count < 30, "as many products as steps, or a graph for each length"


@pytest.mark.parametrize("backend", ("resident", "cooperative", "auto"))
def test_compiling_prints_no_warning(backend, device):
    module, x = made("LSTM", backend, device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        torch._dynamo.utils.warn_once_cache.clear()
        torch.compile(module, backend="eager")(x)


@pytest.mark.skipif("inductor" not in COMPILERS, reason="torch.compile's own backend needs a compiler")
@pytest.mark.parametrize(
    ("name", "backend", "kwargs"),
    (
        ("LSTM", "resident", {"proj_size": 2}),
        pytest.param("RNN", "reference", {"num_layers": 1}, marks=pytest.mark.wide),
    ),
)
def test_inductor(name, backend, kwargs, device):
    module, x = made(name, backend, device, **kwargs)
    truth = trained(module, module, x, 1)
    module, x = made(name, backend, device, **kwargs)
    compiled = torch.compile(module, fullgraph=True)
    for a, b in zip(trained(module, compiled, x, 1), truth, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of torch's CPU build's LSTM")
def test_torchs_lstm_on_the_cpu_does_not_train_compiled():
    """torch 2.13's own fault, in float32, of its oneDNN layer: the README says so, until this test fails."""
    params = list(torch.nn.LSTM(3, 4).parameters())

    def lstm(x, h):
        return torch._VF.lstm(x, (h, h), params, True, 1, 0.0, True, False, False)[0]

    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises((AssertionError, TypeError)):
        torch.compile(lstm, backend="aot_eager")(x, h).sum().backward()
    torch._dynamo.reset()
    with torch.backends.mkldnn.flags(enabled=False):
        torch.compile(lstm, backend="aot_eager")(x, h).sum().backward()


def of_sequences(kind: str, pair: bool, device: str) -> tuple[tuple, dict]:
    """Arguments of a call, input first."""
    x, h = torch.randn(5, 2, 3, device=device), torch.randn(2, 2, 4, device=device)
    if kind == "lengths":
        return (x,), {"lengths": torch.tensor([3, 5], device=device)}
    if kind == "resets":
        reset = torch.tensor([[0, 0], [0, 1], [1, 0], [0, 0], [0, 1]], dtype=torch.bool, device=device)
        return (x,), {"reset": reset, "reset_state": (h, h) if pair else h}
    if kind == "ragged":
        return (x[:4].flatten(0, 1),), {"cu_seqlens": torch.tensor([0, 3, 8], device=device)}
    return (torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False),), {}


def differentiated(module, run, arguments: tuple, options: dict) -> list[torch.Tensor]:
    output, final = run(*arguments, **options)
    outputs = flat(getattr(output, "data", output), final)
    return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), list(module.parameters()))]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ("lengths", "resets", "ragged", "packed"))
@pytest.mark.parametrize("backend", ("auto", "resident", "cooperative"))
@pytest.mark.parametrize("name", ("GRU", "LSTM"))
def test_sequences_of_their_own(name, backend, kind, device):
    """By kernels whole; what is cut by values that are on the CPU breaks the graph, and says which function does."""
    module = getattr(fastrnn, name)(3, 4, bidirectional=True, backend=backend, device=device)
    arguments, options = of_sequences(kind, name == "LSTM", device)
    by_values = kind == "packed" or (backend == "auto" and device == "cpu")
    if by_values:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="" if kind == "packed" else "_untraced"):
            torch.compile(module, backend="aot_eager", fullgraph=True)(*arguments, **options)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=not by_values)
    truth = differentiated(module, module, arguments, options)
    for found, expected in zip(differentiated(module, compiled, arguments, options), truth, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("strict", (True, False), ids=("strict", "non-strict"))
@pytest.mark.parametrize("dynamic", ("", "B", "T", "BT"))
@pytest.mark.parametrize("backend", ("auto", "reference", "resident"))
def test_export(backend, dynamic, strict, device, default_precision):
    """A dynamic batch on every backend; dynamic time by the kernels, which walk it themselves."""
    module, x = made("LSTM", backend, device, num_layers=1, dtype=torch.float64 if backend == "auto" else None)
    dims = {dim: Dim(key, min=2, max=64) for dim, key in enumerate("TB") if key in dynamic}

    def exported():
        return export(module.eval(), (x,), dynamic_shapes=(dims,) if dims else None, strict=strict).module()

    if "T" in dynamic and backend != "resident":
        refusals = (torch._dynamo.exc.UserError, torch._dynamo.exc.Unsupported)  # the latter torch 2.11's, in its words
        with pytest.raises(refusals, match="T.* as dynamic but your code specialized it|method `__setitem__` of class"):
            exported()
        return
    run = exported()
    for T, B in {(5, 2), (7 if "T" in dynamic else 5, 3 if "B" in dynamic else 2)}:
        x = torch.randn(T, B, 3, dtype=x.dtype, device=device)
        torch.testing.assert_close(run(x), module(x))


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device, or copies between them: a CUDA graph could not hold it."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "lift_fresh")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        devices = {t.device for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        target = (kwargs or {}).get("device")
        if name in self.WAITING or len(devices) > 1 or (name == "_to_copy" and target not in (None, *devices)):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _without_waiting(run):
    def watched(*args, **kwargs):
        with NoWaiting():
            return run(*args, **kwargs)

    return watched


@contextlib.contextmanager
def no_waiting(monkeypatch):
    """Forward and backward of the block, inside the ops too, which a mode does not see of itself."""
    with monkeypatch.context() as patch:
        for which in ("forward", "backward"):
            patch.setattr(launch, which, _without_waiting(getattr(launch, which)))
        with NoWaiting():
            yield


@pytest.mark.parametrize("checkpoint_every", (None, 2))
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
@pytest.mark.parametrize("name", NAMES)
def test_no_launch_waits_for_the_device(name, backend, checkpoint_every, device, monkeypatch):
    kwargs = {"proj_size": 2} if name == "LSTM" else {}
    module, x = made(name, backend, device, num_layers=1, checkpoint_every=checkpoint_every, **kwargs)
    upstream = torch.ones((), device=device)
    with no_waiting(monkeypatch):
        module(x)[0].sum().backward(upstream)
    assert module.weight_hh_l0.grad is not None


@pytest.mark.parametrize("kind", ("lengths", "resets", "ragged"))
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
def test_nothing_waits_for_lengths_on_the_device(backend, kind, device, monkeypatch):
    """On CPU tensors as on a GPU: values are asserted there, and not asked for."""
    module = fastrnn.LSTM(3, 4, bidirectional=True, backend=backend, device=device)
    arguments, options = of_sequences(kind, True, device)
    assert_there = "fastrnn.nn.options._check_values", lambda right, expected, *_: torch._assert_async(right, expected)
    monkeypatch.setattr(*assert_there)
    upstream = torch.ones((), device=device)
    with no_waiting(monkeypatch):
        module(*arguments, **options)[0].sum().backward(upstream)
    assert module.weight_hh_l0.grad is not None


def test_a_launch_that_waits_is_noticed(device, monkeypatch):
    module, x = made("GRU", "resident", device, num_layers=1)
    allocate = launch.allocate_forward
    monkeypatch.setattr(launch, "allocate_forward", lambda args: (args.x_gates.sum().item(), allocate(args))[1])
    with no_waiting(monkeypatch), pytest.raises(AssertionError, match="aten.item.* waits for the device"):
        module(x)
