"""W_hh in heads: recurrences side by side, in every tier, against the reference."""

import functools
import json

import pytest
import torch

from fastrnn import reference
from fastrnn.ops import recurrence
from fastrnn.planning.tiers import TIERS

from ..support import children
from ..support.cases import CELLS, Case
from ..support.heads import HEADS, arguments, faults

KINDS = ("plain", "lengths", "ragged", "resets to a state", "ragged, resets by step")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ("resident", "cooperative", "cpu"))
@pytest.mark.parametrize("cell", ("lstm", "gru", "slstm"))
def test_heads_match_the_reference(cell, backend, kind, device):
    assert not faults(cell, backend, kind, device, torch.float32)


@pytest.mark.parametrize("backend", TIERS)
def test_compiled_kernels_match_the_reference(backend):
    """PTX of both passes for sm_90, executed."""
    done = children.run(["-m", "tests.support.heads", "sm_90", backend])
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == len(CELLS) and not any(record["faults"] for record in records), records


def test_each_head_is_a_layer_of_its_own(device):
    """Head n sees none of the others' units: alone it gives the same."""
    tensors, _ = arguments("lstm", "plain", Case(T=4, B=3, H=36, D=2), device, torch.float32)
    y, finals, _ = reference.run("lstm", **tensors, heads=HEADS)
    K = y.shape[-1] // HEADS
    for n in range(HEADS):
        units, own = slice(n * K, (n + 1) * K), slice(n, None, HEADS)
        alone = reference.run(
            "lstm", tensors["x_gates"][..., own, :, :], tensors["W_hh"][own], tensors["b_hh"][own],
            tensors["state_0"][..., units],
        )  # fmt: skip
        torch.testing.assert_close(y[..., units], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(finals[..., units], alone[1], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("function", "old", "new"),
    (
        ("kernels.tile.resident.load_weights", "(recurrence * K.gates + g)", "(recurrence // K.N * K.N * K.gates + g)"),
        ("kernels.rows.find_rows", "* K.N + head", "* K.N"),
        ("kernels.rows.find_rows", "recurrence // K.N, recurrence", "recurrence % K.D, recurrence"),
        ("fastrnn.ops.sums._own", "r % N * K, K", "0, K"),
    ),
)
def test_another_head_is_noticed(function, old, new, mutate, device):
    mutate({function: (old, new)})
    assert faults("gru", "resident", "plain", device, torch.float32)


@pytest.mark.parametrize("cell", ("lstm", "slstm"))
def test_the_op_takes_heads(cell, device):
    """By its public arguments, as the reference; what does not fit is refused."""
    tensors, _ = arguments(cell, "plain", Case(T=4, B=3, H=36, D=2), device, torch.float32)
    x_gates, W_hh, b_hh, states = tensors.values()
    given = x_gates, W_hh, b_hh, states[0], reference.beside_h(states)
    options = {"cell_states": True, "num_heads": HEADS}
    for run in (
        functools.partial(recurrence, backend="resident"),
        functools.partial(recurrence, backend="cooperative"),
    ):
        for found, expected in zip(
            run(cell, *given, **options), reference.recurrence(cell, *given, **options), strict=True
        ):
            torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"x_gates: expected \(T, B, D \* 5, 4, H / 5\) with D 1 or 2"):
        recurrence(cell, *given, num_heads=5)
    with pytest.raises(ValueError, match="num_heads: expected a positive int, got 0"):
        recurrence(cell, *given, num_heads=0)
