"""`python -m fastrnn profile`: memory grows as promised with T, traces have the named ranges, arguments are checked."""

import ast
import contextlib
import importlib
import inspect
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastrnn
from fastrnn.__main__ import main
from fastrnn.compat import profiling
from fastrnn.inspect import profile
from fastrnn.inspect.memory import memory_of
from fastrnn.inspect.profile import Light, Request, Run

ROOT = Path(__file__).parents[2]
B, H, K = 2, 16, 4


def lengths(device: str, backend: str) -> tuple[int, ...]:
    """As short as the interpreter needs them, and as long as CUDA's allocator does, with its 512 bytes at least.

    The peak may lie at another place of a short run (the reference's, below T = 64): lines meet there.
    """
    return (512, 1024, 1536) if device == "cuda" else (8, 16, 24) if backend == "resident" else (64, 96, 128)


def request(device: str, backend: str, T: int, checkpoint_every: int | None = None) -> Request:
    return Request("lstm", H, B, T, 16, backend=backend, checkpoint_every=checkpoint_every, device=device)


def memory(device: str, backend: str, checkpoint_every: int | None = None) -> list[tuple[int, int, int]]:
    """(peak of forward, peak of backward, kept between them) at each length."""
    found = []
    for T in lengths(device, backend):
        run = Run(request(device, backend, T, checkpoint_every))
        run.backward(run.forward())  # what is allocated once, at the first call, is not a matter of T
        found.append(run.memory())
    return found


def growth(device: str, backend: str, sizes: Iterable[int]) -> list[float]:
    """Bytes a step of time, from each length to the next."""
    points = list(zip(lengths(device, backend), sizes, strict=True))
    return [(after - before) / (to - since) for (since, before), (to, after) in itertools.pairwise(points)]


@pytest.mark.parametrize("backend", ("torch", "reference", "resident"))
def test_memory_grows_linearly_with_time_and_by_states_with_checkpoints(device, backend):
    """h and c of B x H in fp32 every K steps, and at the peak of backward no gates of all T steps beside."""
    found = {every: memory(device, backend, every) for every in (None, K)}
    for sizes in itertools.chain.from_iterable(zip(*of_lengths, strict=True) for of_lengths in found.values()):
        first, second = growth(device, backend, sizes)
        assert second == pytest.approx(first, rel=0.1, abs=16)  # cuDNN and the allocator round
    kept = growth(device, backend, [sizes[2] for sizes in found[K]])
    assert max(kept) == pytest.approx(2 * B * H * 4 / K, rel=0.1)
    whole, parts = (growth(device, backend, [sizes[1] for sizes in found[every]]) for every in (None, K))
    gates = 4 * B * H * 4
    assert min(whole) - max(parts) > gates


def test_kept_bytes_of_a_kernel_are_what_its_plan_says(device):
    """Gates and c of each step; the product before it keeps the input only, which is not counted."""
    run = Run(request(device, "resident", 16))
    run.backward(run.forward())
    _, _, kept = run.memory()
    planned = run.layer.plan(run.input).kernel.saved_bytes
    # Triton's interpreter holds on to the last launch's arguments, x_gates among them.
    x_gates = 0 if device == "cuda" else 16 * B * 4 * H * 4
    states = 4 * B * H * 4  # those before and after
    assert planned <= kept - x_gates <= planned + states + (4096 if device == "cuda" else 0)


@pytest.mark.parametrize(
    ("backend", "names"),
    [("resident", {"input product", "recurrence", "weight gradients"}), ("reference", {"input product", "recurrence"})],
)
def test_a_trace_has_the_named_ranges(device, tmp_path, backend, names):
    Run(request(device, backend, 3)).trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    found = {e["name"] for e in events if str(e.get("name")).startswith("fastrnn: ")}
    assert found == {f"fastrnn: {name}" for name in names | {"forward", "backward"}}


def test_without_a_profiler_a_range_is_nothing():
    assert isinstance(profiling.named("x"), contextlib.nullcontext)
    with torch.autograd.profiler.profile():
        assert isinstance(profiling.named("x"), torch.profiler.record_function)


def test_memory_of_counts_what_is_freed():
    _, found = memory_of(lambda: (torch.ones(1024) + torch.ones(1024)).sum(), torch.device("cpu"))
    assert (found.peak, found.kept) == (2 * 4096 + 4096, 4)


def test_the_speed_of_light_is_the_slower_of_two():
    light = Light(flops_per_second=100.0, bytes_per_second=10.0)
    assert light.least_seconds(200, 5) == 2.0
    assert light.least_seconds(200, 50) == 5.0


@pytest.mark.parametrize(("cell", "heads"), (("gru", 1), ("slstm", 3)))
def test_flops_are_those_of_three_passes(cell, heads):
    one = Request(cell, 6, 2, 7, 3, num_layers=2, directions=2, num_heads=heads)
    layer = one.layer()
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert one.flops == 3 * 2 * 7 * 2 * weights


def test_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "GEMM_SIZE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr(profile, "COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(profile, "SECONDS", 0.1)
    files = ["--trace", str(tmp_path / "t.json"), "--plot", str(tmp_path / "p.png")]
    asked = [
        "profile",
        "--cell",
        "rnn_relu",
        "--hidden",
        "8",
        "--batch",
        "2",
        "--seq",
        "4,8",
        "--checkpoint-every",
        "2",
    ]
    assert main([*asked, "--compare", "torch", "--json", *files]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["seq_len"], r["checkpoint_every"]) for r in rows] == [(4, 2), (4, None), (8, 2), (8, None)]
    for row in rows:
        assert row["tokens_per_second"] > 0 and row["light_fraction"] > 0 and row["backward_peak_bytes"] > 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert main(asked) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "tokens/s" in head and [line.split()[0] for line in lines] == ["4", "8"]
    heads = ["profile", "--cell", "slstm", "--hidden", "8", "--num-heads", "2", "--seq", "4", "--compare", "reference"]
    assert main([*heads, "--checkpoint-every", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["asked"], row["checkpoint_every"]) for row in rows] == [("auto", 2), ("reference", None)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU auto is a kernel of ours where there is one")
@pytest.mark.parametrize(
    ("backend", "every", "compare", "names"),
    [
        ("auto", None, ["torch"], ["auto (torch)", "torch"]),
        ("auto", 2, ["torch", "auto", "reference"], ["auto (torch), every 2", "torch", "auto (torch)", "reference"]),
        ("torch", None, ["torch", "auto", "auto"], ["torch", "auto (torch)"]),
    ],
)
def test_every_row_has_a_name_of_its_own(monkeypatch, backend, every, compare, names):
    """Two may have run the same kernel: each says as what it was asked for; what was asked for twice runs once."""
    monkeypatch.setattr(Light, "of", lambda device, dtype: Light(1.0, 1.0))
    monkeypatch.setattr(profile, "SECONDS", 0.0)
    found = profile.profiles(Request("gru", 4, 2, 3, 4, backend=backend, checkpoint_every=every), [3], compare)
    assert [one.name for one in found] == names
    assert all(name in line for name, line in zip(names, profile.table(found).splitlines()[1:], strict=True))


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("options", ({}, {"bias": False}, {"num_layers": 2, "bidirectional": True}), ids=str)
@pytest.mark.parametrize("backend", ("resident", "cooperative"))
@pytest.mark.parametrize("name", ("LSTM", "GRU", "RNN"))
def test_torchs_counter_of_flops_counts_as_in_a_loop(name, backend, options, device):
    """Both passes of a kernel, and of a loop over products of torch's: the input's once, the recurrence's each step."""
    T, I, L, D = 5, 3, options.get("num_layers", 1), 2 if options.get("bidirectional") else 1
    layer = getattr(fastrnn, name)(I, H, backend=backend, device=device, **options)
    x = torch.randn(T, B, I, device=device, requires_grad=True)
    h = torch.zeros(L * D, B, H, device=device, requires_grad=True)
    hx = (h, h) if name == "LSTM" else h

    def loop():
        y = x
        for of_layer in range(L):
            walks = []
            for d in range(D):
                W_ih, W_hh = layer.all_weights[of_layer * D + d][:2]
                gates, state = y.flatten(0, 1) @ W_ih.T, h[of_layer * D + d]
                for x_t in gates.unflatten(0, (T, B)):
                    state = (state @ W_hh.T + x_t).unflatten(1, (-1, H)).sum(1)
                    walks.append(state)
            y = torch.stack(walks).unflatten(0, (D, T)).transpose(0, 1).transpose(1, 2).flatten(2)
        return y

    assert counted(lambda: layer(x, hx)) == counted(loop)
    assert counted(lambda: layer(x, hx)[0].sum().backward()) == counted(lambda: loop().sum().backward())
    layer.requires_grad_(False)
    assert counted(lambda: layer(x, hx)[0].sum().backward()) == counted(lambda: loop().sum().backward())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--seq", "0,4"], "seq: expected positive numbers of steps"),
        (["--seq", "4;8"], "seq: expected positive numbers of steps"),
        (["--hidden", "0"], "hidden_size: expected a positive int; got 0"),
        (["--input", "0"], "input_size: expected a positive int; got 0"),
        (["--dtype", "int8"], "dtype: expected one of"),
        (["--checkpoint-every", "0"], "checkpoint_every: expected a positive int"),
        (["--nvtx", "--device", "cpu"], "nvtx: expected a CUDA device"),
        (["--heads", "3"], "num_heads: expected a divisor of hidden_size, which is 8; got 3"),
        (["--heads", "-2"], "num_heads: expected a divisor of hidden_size, which is 8; got -2"),
        (["--heads", "2", "--compare", "torch"], "backend='torch': torch has no kernel with heads"),
        (["--cell", "slstm", "--backend", "torch"], "backend='torch': torch has no kernel for the cell 'slstm'"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, wrong, message):
    monkeypatch.setattr(profile, "profile", None)  # nothing is timed before all is checked
    given = {"--cell": "gru", "--hidden": "8", "--seq": "4"}
    arguments = [part for pair in given.items() if pair[0] not in wrong for part in pair]
    assert main(["profile", *arguments, *wrong]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys):
    assert main(["profile", "--cell", "gru", "--hidden", "8", "--seq", "4", "--device", "cuda"]) == 2
    assert "device: expected cpu" in capsys.readouterr().err


@pytest.mark.parametrize("which", ("forward", "backward"))
@pytest.mark.parametrize("dialect", ("tile", "gluon"))
def test_metadata_of_a_launch(dialect, which):
    """Flops of the recurrent product, bytes of what is there, by the parameters' own names."""
    from fastrnn.kernels.arguments import Gradients, Inputs, Outputs, Saved
    from fastrnn.kernels.metadata import of_launch

    T, G, D, dtype = 5, 4, 1, torch.bfloat16
    gates, weights = torch.zeros(T, B, D, G, H, dtype=dtype), torch.zeros(D, G * H, H, dtype=dtype)
    if which == "forward":
        groups = {"inputs": Inputs(gates, weights, None, None), "outputs": Outputs(None, None, None, None)}
    else:
        read = Saved(None, None, None, weights, (None,), (None,), None)
        groups = {"read": read, "grads": Gradients(gates, None, None, None)}
    kernel = getattr(importlib.import_module(f"fastrnn.kernels.{dialect}.resident"), which).fn
    names = inspect.signature(kernel).parameters
    assert names.keys() >= groups.keys()
    given = {name: {**groups, "T": T, "B": B}.get(name) for name in names}
    found = of_launch((1, 1, 1), SimpleNamespace(name=which), given)
    assert found == {"name": f"{which} H=16 T=5 B=2", "flops16": 2 * T * B * weights.numel(), "bytes": 2 * (640 + 1024)}


def warns_of_cycles(source: str) -> list[str]:
    """Calls of torch's profiler without acc_events, of which torch up to 2.12 warns; a newer one shows nothing."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    given = [{keyword.arg for keyword in call.keywords} for call in calls]
    return [ast.unparse(c) for c, k in zip(calls, given, strict=True) if "activities" in k and "acc_events" not in k]


def test_no_profiler_warns_of_cycles():
    files = [file for room in ("bench", "examples", "fastrnn", "tests") for file in (ROOT / room).rglob("*.py")]
    found = {file: calls for file in files if (calls := warns_of_cycles(file.read_text()))}
    assert len(files) > 150 and found == {}
    assert warns_of_cycles("profile(activities=[1])") == ["profile(activities=[1])"]
