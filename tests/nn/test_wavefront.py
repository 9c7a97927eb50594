"""The wavefront: every dependency is waited for, nothing else is, and results are those of layer after layer."""

import contextlib
import dataclasses
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

import fastrnn
from fastrnn.nn import calls, wavefront
from fastrnn.nn.layers import State
from fastrnn.planning.planner import CHUNK_STEPS_PER_LAYER, plan

BF16 = torch.bfloat16
SIZES = {"hidden_size": 128, "batch_size": 16, "dtype": BF16, "device": "sm_90"}


@pytest.mark.parametrize(("layers", "chunks"), ((1, 1), (1, 4), (4, 1), (2, 5), (5, 2), (3, 3)))
def test_order_runs_everything_once_after_what_it_needs(layers, chunks):
    order = list(wavefront.order(layers, chunks))
    assert sorted(order) == [(layer, chunk) for layer in range(layers) for chunk in range(chunks)]
    for layer, chunk in order:
        for needed in ((layer - 1, chunk), (layer, chunk - 1)):
            assert min(needed) < 0 or order.index(needed) < order.index((layer, chunk))
        if layer + 1 < layers and chunk + 1 < chunks:  # a diagonal is issued before the next one
            assert order.index((layer + 1, chunk)) < order.index((layer + 1, chunk + 1))


class Stream:
    """Stands in for a CUDA stream: knows which pieces of work are over when its next one begins."""

    def __init__(self) -> None:
        self.over: set = set()

    def wait_stream(self, other: "Stream") -> None:
        self.over |= other.over

    def wait_event(self, event: set) -> None:
        self.over |= event

    def record_event(self) -> set:
        return set(self.over)


class Device:
    """A caller's stream and one a layer; each tensor's maker and the streams its memory is recorded for."""

    def __init__(self, layers: int) -> None:
        self.caller = self.current = Stream()
        self.streams = [Stream() for _ in range(layers)]
        self.made: dict[int, tuple] = {}  # by memory: the piece of work, and its stream
        self.recorded: set[tuple[int, Stream]] = set()
        self.faults: list[str] = []
        self.alive: list[torch.Tensor] = []  # so that no memory is given out twice

    def make(self, work: object, *shape: int) -> torch.Tensor:
        tensor = torch.zeros(shape)
        self.alive.append(tensor)
        self.made[tensor.untyped_storage().data_ptr()] = work, self.current
        self.current.over.add(work)
        return tensor

    def read(self, tensor: torch.Tensor) -> None:
        memory = tensor.untyped_storage().data_ptr()
        work, stream = self.made[memory]
        if work not in self.current.over:
            self.faults.append(f"{work} is read before it is over")
        if stream is not self.current and (memory, self.current) not in self.recorded:
            self.faults.append(f"the allocator does not know of a reader of {work}")

    @contextlib.contextmanager
    def on(self, stream: Stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    @contextlib.contextmanager
    def in_place_of_cuda(self):
        def record_stream(tensor, stream):
            self.recorded.add((tensor.untyped_storage().data_ptr(), stream))

        with (
            mock.patch("torch.cuda.current_stream", lambda device: self.current),
            mock.patch("torch.cuda.stream", self.on),
            mock.patch("torch.Tensor.record_stream", record_stream),
        ):
            yield


def faults(module: ModuleType, layers: int = 3, chunks: int = 4) -> set[str]:
    """What goes wrong on a device where only streams and events put work in order."""
    device = Device(layers)
    xs = device.make("x", chunks, 1, 1).split(1)
    states = [State((device.make(f"h_0 of {layer}", 1),)) for layer in range(layers)]
    weights = [[device.make(f"W of {layer}", 1)] for layer in range(layers)]

    def step(layer: int):
        chunk = 0

        def run(inputs, state, window):
            nonlocal chunk
            for tensor in (*inputs, *state.tensors, *weights[layer]):
                device.read(tensor)
            ahead = (layer - 1, chunk + 1)
            if ahead in device.current.over:
                device.faults.append(f"waits for {ahead} too")
            after = (device.make((layer, chunk), 1, 1, 1), State((device.make(f"h of {layer, chunk}", 1),)))
            chunk += 1
            return *after, None

        return run

    with device.in_place_of_cuda():
        steps = [step(layer) for layer in range(layers)]
        ys, finals = module.run(steps, xs, states, weights, device.streams)
        assert len(ys) == chunks and len(finals) == layers
        for tensor in (*ys, *(state.states[0] for state in finals)):
            device.read(tensor)
    assert [device.made[y.untyped_storage().data_ptr()][0] for y in ys] == [(layers - 1, k) for k in range(chunks)]
    return set(device.faults)


def test_streams_wait_for_what_they_need_and_nothing_else():
    assert not faults(wavefront)
    assert not faults(wavefront, 2, 1)
    assert not faults(wavefront, 1, 3)


MUTATIONS = {
    "the layer below is not waited for": ("stream.wait_event(finished.pop((layer - 1, chunk)))", "pass", "read before"),
    "another chunk is waited for": ("pop((layer - 1, chunk))", "get((layer - 1, chunk - 1), set())", "read before"),
    "all of the layer below is waited for": (
        "stream.wait_event(finished.pop((layer - 1, chunk)))",
        "stream.wait_stream(streams[layer - 1])",
        "too",
    ),
    "the caller is not waited for": ("stream.wait_stream(caller)", "pass", "read before"),
    "the caller does not wait": ("caller.wait_stream(stream)", "pass", "read before"),
    "weights are not recorded": ("_record(stream, *used[0])", "pass", "does not know"),
    "inputs are not recorded": (
        "_record(stream, x, *state.tensors)",
        "_record(stream, *state.tensors)",
        "does not know",
    ),
    "states are not recorded": ("_record(stream, x, *state.tensors)", "_record(stream, x)", "does not know"),
    "outputs are not recorded": ("_record(caller, *waiting[-1],", "_record(caller,", "does not know"),
    "final states are not recorded": (
        "*(tensor for state in finals for tensor in state.tensors)",
        "*()",
        "does not know",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_schedule_is_noticed(name):
    old, new, symptom = MUTATIONS[name]
    source = Path(wavefront.__file__).read_text()
    assert source.count(old) == 1, f"{old!r}: mutate the code that took its place"
    mutant = ModuleType("fastrnn.nn.mutant")
    mutant.__package__ = "fastrnn.nn"
    exec(source.replace(old, new), mutant.__dict__)
    found = faults(mutant)
    assert any(symptom in fault for fault in found), found


def as_wavefront(monkeypatch, chunk: int) -> None:
    """As if the planner had said that it pays, without streams."""
    monkeypatch.setattr(calls, "plan", lambda *a, **k: dataclasses.replace(plan(*a, **k), wavefront=chunk))
    monkeypatch.setattr(wavefront, "streams_of", lambda device, layers: ())


def results(name: str, device: str, dropout: float = 0.0, dtype=torch.float32, **kwargs) -> list[torch.Tensor]:
    torch.manual_seed(0)
    module = getattr(fastrnn, name)(5, 8, num_layers=3, dropout=dropout, device=device, dtype=dtype, **kwargs)
    x = torch.randn(7, 2, 5, device=device, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    output, final = module(x)
    outputs = [output, *(final if name == "LSTM" else (final,))]
    torch.manual_seed(2)
    return [*outputs, *torch.autograd.grad(outputs, [x, *module.parameters()], [torch.randn_like(o) for o in outputs])]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", (torch.float32, BF16), ids=str)
@pytest.mark.parametrize("backend", ("reference", "resident"))
@pytest.mark.parametrize("name", ("RNN", "GRU", "LSTM"))
def test_equals_layer_after_layer(name, backend, dtype, monkeypatch, device):
    """Against the same chunks, bit by bit; against all of time at once, to rounding."""
    plain = results(name, device, backend=backend, dtype=dtype)
    chunked = results(name, device, backend=backend, dtype=dtype, checkpoint_every=3)
    as_wavefront(monkeypatch, 3)
    for checkpoint_every in (None, 3):
        found = results(name, device, backend=backend, dtype=dtype, checkpoint_every=checkpoint_every)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        for a, b, c in zip(found, chunked, plain, strict=True):
            if backend == "resident" or dtype == torch.float32:
                assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_streams_of_a_gpu(monkeypatch):
    monkeypatch.setattr(calls, "plan", lambda *a, **k: dataclasses.replace(plan(*a, **k), wavefront=3))
    found = results("LSTM", "cuda", backend="resident")
    monkeypatch.setattr(wavefront, "streams_of", lambda device, layers: ())
    for a, b in zip(found, results("LSTM", "cuda", backend="resident"), strict=True):
        assert torch.equal(a, b)


def test_the_planner_says_where_it_pays():
    pays = plan("lstm", seq_len=4000, num_layers=2, **SIZES)
    assert pays.wavefront == 572
    assert "layers    2, as a wavefront of chunks of 572 steps: 4572 steps of time instead of 8000, not" in str(pays)
    for changed, reason in (
        ({"directions": 2}, "a bidirectional layer needs all of the one below"),
        ({"seq_len": 700}, "it would take 1400 steps of time instead of 1400, too little for more launches"),
        ({"batch_size": 16 * 67}, "2 x 67 programs do not fit 132 multiprocessors at once"),
        ({"checkpoint_every": 64}, "chunks of 64 steps are over before Python has issued the others; 512 would do"),
    ):
        refused = plan("lstm", **({"seq_len": 4000, "num_layers": 2} | SIZES | changed))
        assert refused.wavefront is None
        assert "layers    2, one after the other" in str(refused)
        assert refused.order == reason


@pytest.mark.parametrize("layers", (2, 3, 4, 8))
@pytest.mark.parametrize("T", (100, 1000, 3000, 10_000, 100_000))
def test_chunks_are_long_and_filling_is_short(layers, T):
    K, shortest = plan("gru", seq_len=T, num_layers=layers, **SIZES).wavefront, CHUNK_STEPS_PER_LAYER * layers
    if K is None:
        assert T // shortest < 2
        return
    assert K // shortest >= 1
    assert T + (layers - 1) * K <= 0.8 * T * layers
    assert K * (layers - 1) <= T / 8 + layers or K // shortest < 2
    assert plan("gru", seq_len=T, num_layers=layers, checkpoint_every=K, **SIZES).wavefront == K


def test_never_without_streams(device):
    assert plan("lstm", seq_len=4000, **SIZES).wavefront is None  # one layer
    assert plan("lstm", seq_len=4000, num_layers=2, **(SIZES | {"device": "cpu"})).wavefront is None
    with pytest.raises(ValueError, match="num_layers: expected a positive int, got 0"):
        plan("lstm", num_layers=0, **SIZES)
    if device == "cpu":
        module = fastrnn.LSTM(3, 4, num_layers=2, backend="resident")
        assert module.plan(torch.zeros(4000, 1, 3)).order == "the interpreter has no streams"
