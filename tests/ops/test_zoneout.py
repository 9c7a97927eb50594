"""Zoneout in the kernels: units of h that stay what they were, by random numbers that the reference has too."""

import functools
import json

import pytest
import torch
import triton
import triton.language as tl

from fastrnn import noise, reference
from fastrnn.planning.tiers import TIERS

from ..support import children
from ..support.cases import CELLS, Case, errors, excess, times_allowed
from ..support.heads import HEADS, ZONEOUT, arguments, kernel, results

P = 0.3
KINDS = ("plain", "lengths", "ragged", "lengths, resets by step", "resets to a state")


def given(mode: str, device: str) -> dict:
    return ZONEOUT | {"noise": ZONEOUT["noise"].to(device) if mode == "training" else None}


def faults(cell: str, backend: str, kind: str, mode: str, device: str) -> dict[str, str]:
    """What a kernel errs beyond the budget of the reference in float32; a zoneout that does nothing is an error too."""
    tensors, of_sequences = arguments(cell, kind, Case(T=5, B=3, H=36, D=2), device, torch.float32)
    exact = {name: t.double() for name, t in tensors.items()}
    specification = functools.partial(reference.run, cell, heads=HEADS, **given(mode, device))
    truth = results(specification, exact, of_sequences)
    plain = results(functools.partial(reference.run, cell, heads=HEADS), exact, of_sequences)
    assert not torch.allclose(plain["y"], truth["y"], rtol=1e-2)
    allowed = errors(results(specification, tensors, of_sequences), truth)
    run = functools.partial(kernel, cell, backend, **given(mode, device))
    return excess(
        results(run, tensors, of_sequences), truth, allowed, torch.float32,
        times_allowed(torch.float32, torch.device(device)),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ("training", "evaluation"))
@pytest.mark.parametrize("backend", ("resident", "cooperative", "cpu"))
@pytest.mark.parametrize("cell", ("lstm", "gru", "rnn_tanh", "slstm"))
@pytest.mark.one_in(3)
def test_kernels_zone_out_as_the_reference(cell, backend, mode, kind, device):
    if backend == "cpu":  # one draw in eight is over the budget of the RNN's in evaluation, by any kernel
        torch.manual_seed(1)
    assert not faults(cell, backend, kind, mode, device)


@pytest.mark.parametrize("backend", TIERS)
def test_compiled_kernels_match_the_reference(backend):
    """PTX of both passes for sm_90, executed."""
    done = children.run(["-m", "tests.support.heads", "sm_90", backend, "zoneout"])
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == len(CELLS) and not any(record["faults"] for record in records), records


@triton.jit
def _philox(out_ptr, seed_ptr, c0_ptr, c1_ptr, c2_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    c0, c1, c2 = tl.load(c0_ptr + at), tl.load(c1_ptr + at), tl.load(c2_ptr + at)
    number, _1, _2, _3 = tl.philox(
        tl.load(seed_ptr), c0.to(tl.int32), c1.to(tl.uint32), c2.to(tl.uint32), (c2 * 0).to(tl.uint32)
    )
    tl.store(out_ptr + at, number.to(tl.int64))


@pytest.mark.parametrize("seed", (0, 1, 0x7FFFFFFFFFFFFFFF, 0x123456789ABCDEF))
def test_random_numbers_are_tritons_bit_by_bit(seed, device):
    seed, c0 = torch.tensor([seed], device=device), torch.randint(0, 2**31, (64,), device=device)
    c1, c2 = torch.randint(0, 2**32, (2, 64), device=device)
    out = torch.empty(64, dtype=torch.int64, device=device)
    _philox[(1,)](out, seed, c0, c1, c2, 64)
    assert torch.equal(out, noise.philox(seed[0], c0, c1, c2))


def kept(device: str, p: float = P) -> torch.Tensor:
    """Of 40 steps, 20 sequences, 2 directions and 30 units."""
    (numbers,) = noise.draw(1, 2, torch.device(device))
    slots = torch.arange(800, device=device).view(40, 20, 1).expand(-1, -1, 2)
    return noise.stays(numbers, p, slots, torch.arange(60, device=device).view(2, 30))


@pytest.mark.parametrize("p", (0.0, 0.1, 0.75, 1.0))
def test_rate(p, device):
    found = kept(device, p).double()
    assert abs(found.mean().item() - p) <= 5 * (p * (1 - p) / found.numel()) ** 0.5  # five sigma


def test_steps_sequences_directions_and_units_are_independent(device):
    found = kept(device).double() - P
    for dim in range(4):
        pairs = found.narrow(dim, 1, found.shape[dim] - 1) * found.narrow(dim, 0, found.shape[dim] - 1)
        assert abs(pairs.mean().item()) < 5 * P * (1 - P) / pairs.numel() ** 0.5
    other = kept(device).double() - P  # of another seed
    assert abs((found * other).mean().item()) < 5 * P * (1 - P) / found.numel() ** 0.5


# What is broken: in which function, which text, by what, and the cell, mode and kind that show it.
MUTATIONS = {
    "another unit": (
        "kernels.zoneout.share", "rows.recurrence * K.H + units.offs", "units.offs", "gru", "training", "plain"),
    "another slot": ("kernels.zoneout.share", "time_index(rows, step)", "step", "gru", "training", "plain"),
    "not from where time begins": ("kernels.zoneout.share", "first + time", "time", "lstm", "training", "plain"),
    "slots of 32 bits": ("kernels.zoneout.share", "high, high * 0", "high * 0, high * 0", "lstm", "training", "plain"),
    "of ragged slots": ("kernels.zoneout.share", "* rows.stride", "* 3", "lstm", "training", "ragged"),
    "the others stay": (
        "kernels.zoneout.share", "< K.zoneout, 0.0, 1.0", "< K.zoneout, 1.0, 0.0", "gru", "training", "plain"),
    "the mean of another share": (
        "kernels.zoneout.zoned", "(1.0 - K.zoneout)", "K.zoneout", "gru", "evaluation", "plain"),
    "gradients of what stayed": (
        "kernels.zoneout.with_stayed", "d_before[0] + stayed", "d_before[0]", "lstm", "training", "plain"),
    "gradients of what was made": (
        "kernels.zoneout.new_share", "with_first(d_new, d_state)", "d_state", "lstm", "training", "plain"),
    "h as it was made": (
        "kernels.zoneout.as_made", "noise_ptr is not None", "True", "rnn_tanh", "evaluation", "plain"),
    "gradients of frozen rows": (
        "kernels.loop.differentiate", "keep(alive, d_before, given)", "keep(alive | True, d_before, given)", "gru",
        "training", "lengths"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_error_budget_catches(name, mutate, device):
    function, old, new, cell, mode, kind = MUTATIONS[name]
    assert not faults(cell, "resident", kind, mode, device)
    mutate({function: (old, new)})
    assert faults(cell, "resident", kind, mode, device)
