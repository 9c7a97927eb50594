"""What a plan costs, and that "auto" takes the cheapest: by waves, by resident clusters, beside torch's kernel."""

import itertools
import json
import math
import re

import pytest
import torch

import fastrnn
from bench import prices as bench_prices
from fastrnn.device import CLUSTERS, DeviceSpec
from fastrnn.planning import cluster, cooperative, planner, prices, resident, tuning
from fastrnn.planning.kernel_plan import GridTooLargeError, Request

from ..support import children

BF16, F16 = torch.bfloat16, torch.float16
# us of a step, forward and backward, on clusters of 16 at H = 512 (bench/measured/).
OF_16 = (2.1706, 2.5903)
# As an H100's driver counts them, and by the multiprocessors of the others.
AT_ONCE = {
    "sm_80": {1: 108}, "sm_90": {1: 132, 2: 66, 4: 33, 8: 15, 16: 7}, "sm_100": {1: 148, 2: 74, 4: 37, 8: 18, 16: 9},
}  # fmt: skip
GRID = list(itertools.product(("lstm", "gru", "rnn_tanh"), (64, 128, 200, 256, 512, 1024), (1, 16, 128, 1024, 4096)))


def request(cell="lstm", H=512, B=16, arch="sm_90", dtype=BF16, D=1, precision="tf32") -> Request:
    return Request(cell, H, B, D, 1, dtype, precision, DeviceSpec.named(arch))


def plan(cell, H, B, arch="sm_90", T=1024, **kwargs):
    return fastrnn.plan(
        cell, hidden_size=H, batch_size=B, seq_len=T, **{"dtype": BF16, "precision": "tf32"} | kwargs, device=arch
    )


def cost(kernel, of: Request, work: prices.Work) -> float:
    """The price of a kernel, reckoned by hand from the time of its step."""
    step = prices.step_of(kernel, of)
    assert step is not None, (kernel, of)
    tiles = math.ceil(of.B / kernel.block_b) * of.D
    if len(kernel.grid) > 2:
        waves = math.ceil(of.B / (kernel.grid[1] * kernel.block_b))
    else:
        waves = math.ceil(tiles / AT_ONCE[of.spec.arch][kernel.ctas])
    launches = waves if len(kernel.grid) > 2 else 1
    us = 0.0
    for which, of_step in zip(work.passes, step[:2], strict=False):
        moved = prices.moved_us(of, which, work.training)
        us += launches * prices.LAUNCH_US + work.steps * max(waves * of_step, moved)
    return us


def costs(of: Request, work: prices.Work) -> list[float]:
    """Of every kernel that the planner could take, and of torch's."""
    sizes = [ctas for ctas in (1, *CLUSTERS) if ctas <= of.spec.cluster_limit]
    kernels = [cluster.held(of, ctas, rows) for ctas in sizes for rows in (16, *cluster.TALL_B)]
    kernels = [kernel for kernel in kernels if kernel is not None]
    wide = [kernel for kernel in kernels if kernel.ctas == 1 or kernel.units >= 32]
    kernels = wide or [kernel for kernel in kernels if kernel.ctas == kernels[0].ctas]
    for find in (resident.resident, *[lambda of, t=t: cooperative.of_tiling(of, t) for t in cooperative._tilings(of)]):
        try:
            kernels.append(find(of))
        except (NotImplementedError, GridTooLargeError):
            continue
    priced = [kernel for kernel in kernels if prices.step_of(kernel, of) is not None]
    return [*(cost(kernel, of, work) for kernel in priced), prices.price_of_torch(of, work).us]


def dearer(arch: str, training: bool, grid=GRID) -> dict[tuple, float]:
    """Where "auto" takes what costs more than 1.05 of the cheapest: by how much."""
    found = {}
    for cell, H, B in grid:
        of, work = request(cell, H, B, arch), prices.Work(1024, training)
        chosen = plan(cell, H, B, arch, training=training)
        taken = prices.price_of_torch(of, work).us if chosen.kernel is None else cost(chosen.kernel, of, work)
        ratio = taken / min(costs(of, work))
        # How a tier's batch is tiled is chosen for training, whichever pass is run: backward must find forward's.
        if ratio > 1e-9 + (1.05 if training else 1.25):
            found[cell, H, B] = ratio
    return found


@pytest.mark.parametrize("training", (True, False), ids=("training", "inference"))
@pytest.mark.parametrize("arch", AT_ONCE)
def test_auto_never_takes_what_costs_more_than_another(arch, training):
    assert dearer(arch, training) == {}


@pytest.mark.parametrize(
    "change",
    (
        {"fastrnn.planning.prices.waves_of": ("kernel.parts * -(-math.prod(kernel.grid) //", "1 * -(-1 //")},
        {"fastrnn.planning.prices.waves_of": ("spec.at_once(kernel.ctas)", "spec.multiprocessors")},
        {"fastrnn.planning.planner.plan": ("priced += [price for price in", "priced += [price for price in [] and")},
        {"fastrnn.planning.prices.cheapest": ("if us < least", "if us > least or best is plans[0]")},
        {"fastrnn.planning.planner.plan": ("price.us <= NEAR", "price.us <= 2 * NEAR")},
        {"fastrnn.planning.cluster.in_rows": ("rows in TALL_B", "rows in ()")},
    ),
    ids=("waves", "resident clusters", "torch's price", "the best of a tier", "what is near", "taller tiles"),
)
def test_what_is_forgotten_is_noticed(change, mutate, monkeypatch):
    mutate(change)
    if "fastrnn.planning.planner.plan" in change:
        monkeypatch.setattr(fastrnn, "plan", planner.plan)
    else:
        monkeypatch.setattr(planner, "price_of_kernel", prices.price_of_kernel)
    cell = "gru" if "fastrnn.planning.cluster.in_rows" in change else "lstm"  # for which taller tiles give 5%
    assert dearer("sm_90", True, [of for of in GRID if of[0] == cell and of[2] > 16]) != {}


def test_a_price_is_steps_times_waves_and_launches():
    found = plan("lstm", 512, 4096, backend="cluster").prices
    # 256 tiles of 16 rows, of which 7 clusters are resident at once: 37 waves.
    assert found == (prices.Price("cluster", pytest.approx(10 + 1024 * 37 * sum(OF_16)), "measured", 1024),)
    inference = plan("lstm", 512, 4096, backend="cluster", training=False).prices
    assert inference[0].us == pytest.approx(5 + 1024 * 37 * OF_16[0])
    both = plan("lstm", 512, 16 * 7, directions=2, backend="cluster").prices[0]
    assert both.us == pytest.approx(10 + 1024 * 2 * sum(OF_16))  # 14 clusters, 7 at once
    kernel = plan("lstm", 1024, 256, backend="cooperative").kernel
    of_tier = plan("lstm", 1024, 256, backend="cooperative").prices[0].us
    step = prices.step_of(kernel, request("lstm", 1024, 256))
    assert kernel.parts > 1 and of_tier == pytest.approx(kernel.parts * (10 + 1024 * sum(step[:2])))


def test_device_memory_bounds_small_kernels_of_large_batches():
    found = plan("rnn_tanh", 64, 1 << 17, arch="sm_80").prices[0]
    least = 2 * (1 << 17) * 64 * (2 + 3) / 2.04e6  # x_gates, y; then dy and h, too, and d_gates
    assert found.us / 1024 > least


def test_prices_are_shown_the_cheapest_first():
    found = plan("lstm", 128, 16)
    assert [price.backend for price in found.prices] == ["cluster", "resident", "cooperative", "torch"]
    assert [price.source for price in found.prices] == ["simulated", "simulated", "simulated", "reckoned"]
    shown = "  price     us a step, forward and backward: cluster 1.4 (simulated), resident 1.44 (simulated)"
    assert shown in str(found)
    alone = plan("lstm", 128, 16, training=False)
    assert "us a step, forward: cluster 0.707 (simulated)" in str(alone)
    # Of what costs about as much the fewest programs.
    near = plan("gru", 512, 48)
    assert near.backend == "cluster" and near.prices[0].backend == "cooperative"


def test_where_no_price_is_known_the_first_tier_that_fits_is_taken():
    for arch, device in (("gfx942", "gfx942"), ("interpreter", DeviceSpec.named("interpreter"))):
        found = fastrnn.plan("lstm", hidden_size=64, batch_size=4096, dtype=BF16, device=device)
        assert (found.device, found.backend, found.prices) == (arch, "resident", ())
    assert "price" not in str(found)
    # Many launches may take longer than torch's kernel: that is not known.
    large = fastrnn.plan("lstm", hidden_size=512, batch_size=4096, dtype=BF16, device="gfx942")
    assert large.backend == "torch" and "launches, and no price of it is known" in large.why
    named = fastrnn.plan("lstm", hidden_size=512, batch_size=4096, dtype=BF16, device="gfx942", backend="cooperative")
    assert named.kernel.parts > 1


def test_every_kernel_of_nvidias_in_16_bits_has_a_price():
    """On the architectures of the table, and those that borrow its figures."""
    lacking = []
    for arch, dtype, precision in itertools.product(
        ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"), (BF16, F16), ("tf32", "ieee")
    ):
        for cell, H, backend in itertools.product(
            ("lstm", "gru", "rnn_relu", "slstm"), (7, 64, 96, 256, 650, 1500), planner.TIERS
        ):
            try:
                found = plan(cell, H, 64, arch, dtype=dtype, precision=precision, backend=backend)
            except (NotImplementedError, ValueError):
                continue
            if not found.prices:
                lacking.append((arch, dtype, precision, cell, H, backend, prices.form_of(found.kernel)))
    assert lacking == []


@pytest.mark.parametrize(
    ("of", "persistent"),
    (
        ({"H": 192, "dtype": F16}, (True, False)),
        ({"H": 128, "dtype": F16, "B": 4096, "D": 2}, (True, True)),
        ({"H": 128, "dtype": torch.float32}, (True, True)),
        ({"H": 128}, (False, False)),
        ({"H": 512, "dtype": F16}, (True, True)),
        ({"H": 512, "dtype": F16, "B": 136}, (False, False)),
        ({"H": 512, "dtype": F16, "B": 12}, (False, False)),
        ({"H": 512, "dtype": F16, "D": 2}, (False, False)),
        ({"H": 520, "dtype": F16}, (False, False)),
        ({"H": 1152, "dtype": F16}, (False, False)),
        ({"cell": "gru", "H": 512, "dtype": F16}, (False, False)),
        ({"cell": "rnn_tanh", "H": 384, "dtype": F16, "B": 5}, (True, False)),
        ({"cell": "rnn_tanh", "H": 896, "dtype": F16, "B": 96}, (False, False)),
        ({"H": 512, "dtype": F16, "arch": "sm_86"}, (False, False)),
    ),
    ids=str,
)
def test_torch_has_persistent_kernels_where_its_source_says(of, persistent):
    assert tuple(prices.is_persistent(request(**of), which, 1) for which in tuning.PASSES) == persistent


def test_torchs_price_is_what_was_measured_or_its_products():
    us = tuning.of("sm_90").us
    small = prices.price_of_torch(request("lstm", 256), prices.Work(1024)).us
    assert small == pytest.approx(1024 * sum(us["torch lstm H=256 bfloat16"]))
    in_f16 = prices.price_of_torch(request("lstm", 256, dtype=F16), prices.Work(1024)).us
    assert in_f16 == pytest.approx(10 + 1024 * sum(us["torch lstm H=256 float16"]))
    # 4096 x 4096 x 1024 x 2 multiply-adds take longer than launches; persistent kernels' times are no floor there.
    large = request("lstm", 1024, 4096, dtype=F16)
    products = 2 * 4096 * 4096 * 1024 / (989 * 0.65) / 1e6
    assert prices.price_of_torch(large, prices.Work(1, False)).us > products > 50
    twice = prices.price_of_torch(request("lstm", 256, D=2), prices.Work(1024)).us
    assert twice == pytest.approx(2 * small)


def test_the_table_is_what_records_and_document_say():
    assert prices.TABLE["error"] == bench_prices.errors()
    assert prices.TABLE["torch"] == bench_prices.torchs()
    assert json.loads((tuning.FOLDER / "sm_90.json").read_text())["us"] == bench_prices.measured_steps()
    for points in prices.TABLE["cycles"].values():
        sizes = [point[0] for point in points]
        assert sizes == sorted(set(sizes)) and all(len(point) == 3 and min(point) > 0 for point in points)


def test_between_two_sizes_is_a_line():
    points = [[64, 100, 10], [128, 300, 20]]
    assert [prices.between(points, H, 1) for H in (16, 64, 96, 128, 256)] == [100, 100, 200, 300, 600]


def test_a_call_without_gradients_is_planned_by_inference_alone(monkeypatch):
    from fastrnn.nn import calls

    asked = []

    def noted(*args, **kwargs):
        asked.append(kwargs["training"])
        return planner.plan(*args, **kwargs)

    monkeypatch.setattr(calls, "plan", noted)
    layer, x = fastrnn.LSTM(3, 5, backend="reference"), torch.randn(2, 1, 3)
    layer(x)
    with torch.no_grad():
        layer(x)
        layer(x)
    layer(x)
    assert asked == [True, False]


@pytest.mark.wide
def test_a_step_of_more_rows_takes_longer_and_less_a_row():
    done = children.run(["-m", "bench.prices", "--rows", "16", "32", "--cell", "rnn_tanh"])
    assert done.returncode == 0, done.stderr
    steps = [[int(of_pass) for of_pass in re.findall(r"([0-9]+) \(", line)] for line in done.stdout.splitlines()[2:]]
    assert len(steps) == 6
    for fewer, more in zip(steps[::2], steps[1::2], strict=True):
        assert all(a < b < 2 * a for a, b in zip(fewer, more, strict=True))
