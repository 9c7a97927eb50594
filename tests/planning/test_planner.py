"""Plans: pure, right about what fits, and clear about what does not."""

import dataclasses
import functools
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

import fastrnn
from fastrnn.cells import CELLS
from fastrnn.compat import spills
from fastrnn.device import SPECS, DeviceSpec
from fastrnn.planning import cluster, cooperative
from fastrnn.planning.kernel_plan import Request
from fastrnn.planning.planner import torch_precision
from fastrnn.planning.tiers import TIERS

BF16 = torch.bfloat16


def resident(cell="lstm", hidden_size=64, batch_size=16, dtype=BF16, device="sm_90", **kwargs):
    return fastrnn.plan(
        cell, hidden_size=hidden_size, batch_size=batch_size, dtype=dtype, device=device, backend="resident", **kwargs
    )


def test_covers_the_architectures_of_the_design():
    named = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950"}
    assert named | {"interpreter"} == set(SPECS)


@pytest.mark.parametrize("arch", [a for a in SPECS if a != "interpreter"])
def test_plans_stay_within_the_device(arch):
    spec = DeviceSpec.named(arch)
    fitting = 0
    for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        for hidden_size in (1, 7, 16, 24, 64, 65, 96, 128, 130, 256, 300, 512, 1024):
            for dtype in (torch.float32, torch.float16, BF16):
                for precision in ("ieee", "tf32"):
                    sizes = {"hidden_size": hidden_size, "batch_size": 33, "directions": 2, "seq_len": 10}
                    plan = fastrnn.plan(cell, **sizes, dtype=dtype, device=arch, precision=precision)
                    if plan.backend != "resident":
                        assert "does not fit one program" in plan.why or "resident: takes more time" in plan.why
                    if plan.backend == "torch":
                        assert plan.kernel is None
                        continue
                    fitting += 1
                    kernel = plan.kernel
                    *slices, batch_tiles, directions = kernel.grid
                    assert kernel.parts * batch_tiles * kernel.block_b >= 33 and directions == 2
                    assert (kernel.parts - 1) * batch_tiles * kernel.block_b < 33
                    assert math.prod(slices) * kernel.ctas * kernel.units >= hidden_size
                    assert kernel.ctas <= spec.cluster_limit and (kernel.ctas > 1) == (plan.backend == "cluster")
                    choices = [choice for forms in kernel.choices.values() for choice in forms]
                    if slices:
                        assert kernel.programs <= spec.multiprocessors
                        assert math.prod(slices) * kernel.units < hidden_size + kernel.units
                        for choice in choices:
                            starts, columns = zip(*choice["K_TILES"], strict=True)
                            assert starts == tuple(itertools.accumulate((0, *columns[:-1])))
                            # A warp pays for the next multiple of 16 columns, a program for the next of its units.
                            assert hidden_size <= sum(columns) * kernel.warps < hidden_size + 16 * kernel.warps
                    assert kernel.shared_bytes <= spec.shared_bytes
                    assert kernel.weight_bytes <= max(spec.shared_bytes, spec.register_bytes)
                    threads = kernel.warps * spec.warp_size
                    assert threads <= 1024
                    for choice in choices:
                        assert choice.get("maxnreg", 0) * threads * 4 <= spec.register_bytes
                    assert kernel.precision == "ieee" or spec.has_tf32
    assert fitting > 100


def test_what_fits_is_what_the_design_says():
    assert resident("lstm", 128).kernel.weight_bytes == 4 * 128 * 128 * 2
    with pytest.raises(NotImplementedError, match="does not fit one program: 512 KiB at H=129 .padded to 256."):
        resident("lstm", 129)
    with pytest.raises(NotImplementedError, match="does not fit one program"):
        resident("lstm", 256, device="sm_120")


def test_auto_takes_what_costs_least():
    sizes = {"batch_size": 16, "dtype": BF16, "device": "sm_90"}
    tiers = {H: fastrnn.plan("lstm", hidden_size=H, **sizes).backend for H in (64, 128, 129, 650, 2048, 2560)}
    assert tiers == {64: "resident", 128: "resident", 129: "cluster", 650: "cooperative", 2048: "cooperative",
                     2560: "torch"}  # fmt: skip
    # Clusters that would not all run at once take turns: one program each is faster.
    assert fastrnn.plan("lstm", hidden_size=128, **sizes | {"batch_size": 2048}).backend == "resident"
    # Many waves of clusters of 16 take longer than torch's products, which fill the device.
    large = fastrnn.plan("lstm", hidden_size=512, **sizes | {"batch_size": 4096})
    assert (large.backend, large.kernel) == ("torch", None)
    assert large.why == "resident: W_hh does not fit one program: 2.0 MiB at H=512 (padded to 512) of at most " \
        "227 KiB in shared memory on sm_90; cluster: takes more time; cooperative: takes more time"  # fmt: skip
    why = fastrnn.plan("lstm", hidden_size=2560, **sizes).why
    assert "320 KiB for 16 units at H=2560, in registers and 227 KiB of shared memory on sm_90" in why


def test_a_grid_that_cannot_be_resident_runs_in_parts():
    sizes = {"hidden_size": 640, "dtype": BF16, "device": "sm_90", "backend": "cooperative"}
    one = fastrnn.plan("lstm", batch_size=16, **sizes).kernel
    assert one.programs <= 132 and one.parts == 1
    many = fastrnn.plan("lstm", batch_size=1024, **sizes)
    slices, batch_tiles, _ = many.kernel.grid
    assert many.kernel.programs <= 132 < (many.kernel.parts - 1) * many.kernel.programs
    # As few as fit, and as equal: one tile less in each would be one part more.
    whole = 1024 // many.kernel.block_b
    assert many.kernel.parts == math.ceil(whole / (132 // slices)) == math.ceil(whole / batch_tiles)
    assert f"in {many.kernel.parts} launches, one after the other" in str(many)
    with pytest.raises(ValueError, match=r"320 programs \(40 slices x 1 directions x 8 heads\) .* 132 fit on sm_90"):
        fastrnn.plan("lstm", batch_size=16, **sizes | {"hidden_size": 8 * 640}, num_heads=8)


def test_a_larger_batch_takes_larger_tiles_before_it_is_parted():
    sizes = {"hidden_size": 512, "dtype": BF16, "device": "sm_90", "backend": "cooperative"}
    kernels = [fastrnn.plan("gru", batch_size=B, **sizes).kernel for B in (16, 64, 128)]
    tiles = [k.block_b * k.units for k in kernels]
    assert tiles == sorted(set(tiles)) and all(k.programs <= 132 and k.parts == 1 for k in kernels)


def test_saved_bytes_are_what_the_op_keeps(device):
    from fastrnn.ops import library
    from fastrnn.ops.schema import Args

    for cell in CELLS:
        G = CELLS[cell].gates
        x_gates = torch.randn(5, 3, 2, G, 24, dtype=torch.float16, device=device)
        W_hh = torch.randn(2, G * 24, 24, dtype=torch.float16, device=device)
        kept = library._recurrence(*Args(x_gates, W_hh, None, None, cell, True, "resident"))[2:]
        plan = fastrnn.plan(
            cell, hidden_size=24, batch_size=3, seq_len=5, directions=2, dtype=torch.float16, device="sm_80"
        )
        assert plan.kernel.saved_bytes == sum(t.numel() * t.element_size() for t in kept)


def test_clusters_take_more_programs_while_multiprocessors_are_idle(monkeypatch):
    def ctas(cell="lstm", H=256, B=16, **kwargs):
        sizes = {"hidden_size": H, "batch_size": B, "dtype": BF16, "device": "sm_90"} | kwargs
        return fastrnn.plan(cell, **sizes, backend="cluster").kernel.ctas

    assert [ctas(B=B) for B in (16, 240, 256, 528, 4096)] == [8, 4, 4, 4, 4]
    assert (ctas(H=128), ctas(H=512), ctas("gru", 512)) == (4, 16, 16)
    for message, kwargs in (
        ("sm_80 has no thread-block clusters", {"device": "sm_80"}),
        ("does not fit a cluster of 16 programs: 8.0 MiB at H=513 .padded to 1024.", {"H": 513}),
        ("full-precision float32 products over clusters is missing", {"dtype": torch.float32, "precision": "ieee"}),
    ):
        with pytest.raises(NotImplementedError, match=message):
            ctas(**kwargs)
    monkeypatch.setattr(spills, "triton_version", lambda: (3, 7))
    cluster.cluster.cache_clear()
    with pytest.raises(NotImplementedError, match="clusters in Gluon need Triton 3.8 or newer"):
        ctas()


def test_the_grid_split_in_gluon_keeps_in_shared_memory_what_registers_cannot_hold(monkeypatch):
    def kernel(cell="lstm", H=1024, dtype=BF16, arch="sm_90", precision="ieee"):
        sizes = {"hidden_size": H, "batch_size": 16, "dtype": dtype, "device": arch, "backend": "cooperative"}
        return fastrnn.plan(cell, **sizes, precision=precision).kernel

    # One operand of W_hh for each 32 columns of a warp's share and gate: 8 registers a thread, 8 KiB.
    def held(which, **kwargs):
        return [choice["IN_REGISTERS"] for choice in kernel(**kwargs).choices[which]]

    assert held("forward")[0] == 16 and kernel().shared_bytes < 160 * 1024
    assert held("forward", H=2048)[0] == 18 and held("backward", H=2048)[0] == 7
    for which in ("forward", "backward"):
        assert held(which, H=2048) == sorted(held(which, H=2048), reverse=True)
    tile = [kernel(dtype=torch.float32), kernel("gru", arch="gfx942")]
    monkeypatch.setattr(spills, "triton_version", lambda: (3, 5))
    cooperative.cooperative.cache_clear()
    tile.append(kernel("gru"))
    cooperative.cooperative.cache_clear()
    assert {k.dialect for k in tile} == {"tile Triton"}


def test_gluon_where_it_runs_and_fits_in_registers(monkeypatch):
    def dialects(**kwargs):
        return [resident(cell, H, **kwargs).kernel.dialect for cell, H in (("lstm", 64), ("lstm", 128), ("gru", 128))]

    for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert dialects(device=arch) == ["Gluon"] * 3
    assert resident("gru", 128, device="sm_120").kernel.weight_place == "registers and shared memory"
    assert resident(dtype=torch.float32, precision="tf32").kernel.dialect == "Gluon"
    assert resident(dtype=torch.float32, precision="ieee").kernel.dialect == "tile Triton"
    assert resident(device="gfx942").kernel.dialect == "tile Triton"
    monkeypatch.setattr(spills, "triton_version", lambda: (3, 5))
    TIERS["resident"].plan.cache_clear()
    assert dialects() == ["tile Triton"] * 3
    TIERS["resident"].plan.cache_clear()


@pytest.mark.parametrize(("hidden_size", "tier"), ((64, "resident"), (256, "cluster"), (650, "cooperative")))
def test_torch_compile_traces_plans_of_every_tier(hidden_size, tier):
    """With the reasons against other tiers, which come as exceptions."""

    def graph(x):
        chosen = fastrnn.plan("lstm", hidden_size=hidden_size, batch_size=16, dtype=BF16, device="sm_90")
        return x + (chosen.backend == tier)

    torch._dynamo.reset()  # or another size than the last is a symbol
    assert torch.compile(graph, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_clusters_at_once_are_counted_in_groups_of_multiprocessors():
    """As measured on an H100, not as 132 multiprocessors would give; a board that has no cluster of 16 takes slices."""
    h100 = DeviceSpec.named("sm_90")
    assert [h100.at_once(ctas) for ctas in (1, 2, 4, 8, 16)] == [132, 66, 33, 15, 7]
    sizes = {"hidden_size": 512, "batch_size": 16, "dtype": BF16}
    board = dataclasses.replace(h100, clusters=((8, 1), (16, 0)))
    assert fastrnn.plan("lstm", **sizes, device=board).backend == "cooperative"
    with pytest.raises(NotImplementedError, match="W_hh does not fit a cluster of 8 programs"):
        fastrnn.plan("lstm", **sizes, device=board, backend="cluster")
    # What takes less time than one program does so only if all of the batch runs at once; a stack's layers too.
    few = sizes | {"hidden_size": 128, "seq_len": 10**5, "training": False}
    for clusters_of_4, tier in ((2, "cluster"), (1, "resident")):  # two tiles of 8 rows
        board = dataclasses.replace(h100, clusters=((2, 1), (4, clusters_of_4), (8, 1)))
        assert fastrnn.plan("lstm", **few, device=board).backend == tier
    stack = {"hidden_size": 256, "batch_size": 16, "seq_len": 10**5, "dtype": BF16, "num_layers": 3}
    for clusters_of_8, chunked in ((6, True), (5, False)):  # two tiles of 8 rows a layer
        board = dataclasses.replace(h100, clusters=((8, clusters_of_8),))
        assert (fastrnn.plan("lstm", **stack, device=board).wavefront is not None) == chunked


@pytest.mark.parametrize(
    ("cell", "H", "at_once", "tall"),
    (("rnn_tanh", 64, {1: 132}, 32), ("gru", 128, {4: 33}, 32), ("gru", 256, {8: 15}, 32), ("lstm", 512, {16: 7}, 16)),
)
def test_tiles_have_more_rows_the_more_waves_there_would_be(cell, H, at_once, tall):
    """Those of 8, half of a step's work in twice the programs, run at once; those of 16 too, or the price decides.

    tall: where tiles of 16 need a second wave. No registers are left for one of an LSTM of 512 units.
    """
    (ctas, most), h100 = *at_once.items(), DeviceSpec.named("sm_90")
    for B, expected in ((1, 8), (8 * most, 8), (8 * most + 1, 16), (16 * most, 16), (16 * most + 1, tall)):
        request = Request(cell, H, B, 1, 1, BF16, "ieee", h100)
        kernel = cluster.in_rows(request, cluster.held(request, ctas))
        assert (kernel.block_b, kernel.ctas, kernel.grid) == (expected, ctas, (-(-B // expected), 1)), B
    # Where a batch of 8 has as many programs in either, those of 8 are taken, however many recurrences there are.
    kernel = fastrnn.plan(cell, hidden_size=H * 200, num_heads=200, batch_size=8, dtype=BF16, device=h100).kernel
    assert kernel.block_b == 8 and kernel.grid == (1, 200)


def test_a_tile_of_8_rows_needs_16_columns_a_warp():
    """So H=16 stays in tiles of 16, and at H=64 two groups of four warps share a sum."""
    small = functools.partial(fastrnn.plan, "gru", hidden_size=16, batch_size=16, dtype=BF16, device="sm_90")
    assert small().kernel.block_b == 16
    forms = fastrnn.plan("gru", hidden_size=64, batch_size=16, dtype=BF16, device="sm_90").kernel.choices["forward"]
    assert {form["SHARES"] for form in forms} == {2}


def test_plans_are_frozen_equal_and_hashable():
    plan = resident()
    assert plan == resident() and hash(plan) == hash(resident())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.backend = "torch"


def test_precision_follows_torch():
    rnn = torch.backends.cudnn.rnn
    for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
        rnn.fp32_precision = setting
        assert torch_precision() == expected
        assert resident(dtype=torch.float32).kernel.precision == expected
    assert resident(dtype=torch.float32, device="gfx942", precision="tf32").kernel.precision == "ieee"


def test_explicit_backends_and_cpu():
    cpu = fastrnn.plan("gru", hidden_size=8, batch_size=2, device="cpu")
    assert (cpu.backend, cpu.kernel) == ("torch", None)
    for backend in ("torch", "reference"):
        assert fastrnn.plan("gru", hidden_size=8, batch_size=2, device="sm_90", backend=backend).backend == backend


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    (
        ({"cell": "peephole"}, ValueError, "cell: expected one of 'lstm'.*got 'peephole'"),
        ({"device": "sm_70"}, ValueError, "device: expected one of sm_80.*got 'sm_70'"),
        ({"device": "h100"}, ValueError, "device: expected an architecture .sm_80.* or a torch device; got 'h100'"),
        ({"hidden_size": 0}, ValueError, "hidden_size: expected a positive int, got 0"),
        ({"batch_size": -1}, ValueError, "batch_size: expected a positive int, got -1"),
        ({"batch_size": 2.0}, ValueError, "batch_size: expected a positive int, got 2.0"),
        ({"directions": 3}, ValueError, "directions: expected one of 1, 2; got 3"),
        ({"precision": "tf64"}, ValueError, "precision: expected one of 'ieee', 'tf32', None; got 'tf64'"),
        ({"dtype": torch.float64}, NotImplementedError, "a kernel for torch.float64 is missing"),
        ({"device": "meta"}, NotImplementedError, "a kernel for meta tensors is missing"),
    ),
    ids=str,
)
def test_bad_arguments(kwargs, error, text):
    with pytest.raises(error, match=text):
        resident(**kwargs)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of 'auto'.*got 'cudnn'"):
        fastrnn.plan("lstm", hidden_size=4, batch_size=1, device="sm_90", backend="cudnn")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_device_without_a_gpu():
    with pytest.raises(ValueError, match="expected an architecture such as 'sm_90'"):
        fastrnn.plan("lstm", hidden_size=4, batch_size=1)


def python(code: str, **environment: str) -> str:
    """Output of a fresh Python without the interpreter's setting."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cpu_tensors_without_the_interpreter_are_refused():
    code = """
import torch, fastrnn
try:
    fastrnn.LSTM(3, 4, backend="resident")(torch.randn(2, 1, 3))
except NotImplementedError as error:
    print(error)
"""
    assert "TRITON_INTERPRET=1 is set before fastrnn is imported" in python(code)


def test_without_triton_the_rest_works():
    """On platforms that have no Triton (macOS, Windows), torch's and the reference backend run."""
    code = """
import sys
sys.modules["triton"] = None
import torch, fastrnn
x = torch.randn(2, 1, 3)
for backend in ("auto", "torch", "reference"):
    fastrnn.LSTM(3, 4, backend=backend)(x)
    fastrnn.gru(x, None, list(torch.nn.GRU(3, 4).parameters()), backend=backend)
print(fastrnn.plan("lstm", hidden_size=64, batch_size=1, device="sm_90").why)
"""
    assert "fastrnn's kernels are written in Triton, which is missing here" in python(code)
