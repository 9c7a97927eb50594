"""Break the path of segments in one place, and see that its checks notice; and that its benchmark compares."""

import pytest
import torch

from bench import segments as bench
from fastrnn.torch_path import segments

from ..support.segment_cases import faults, make_batch
from . import test_segments as checks

# What is broken: in which function, which text, by what.
MUTATIONS = {
    "a step past the end of a row": ("segments._cut", "device=device) < lengths", "device=device) <= lengths"),
    "reset of the first step lost": ("segments._cut", "at_start & ~resets[first]", "at_start"),
    "resets do not cut": ("segments._cut", "cut = begins | resets", "cut = begins"),
    "direction 1 takes the reset of its own first step": ("segments._cut", "when[last] + 1", "when[last]"),
    "direction 1 starts from hx at the row's start": ("segments._cut", "at_end, when[last]", "at_start, when[last]"),
    "final state of a row's first segment": ("segments._cut", "when[first], at_end)", "when[first], at_start)"),
    "final state of direction 1 at the row's end": (
        "segments._cut",
        "when[last] + 1, at_start",
        "when[last] + 1, at_end",
    ),
    "direction 1's cell states walk forward": ("segments._cut", "packed.flip(0), M - 1 - last", "packed, first"),
    "reset_state of the first step for all": ("segments._initial", "clamp(max=per_step.shape[0] - 1)", "clamp(max=0)"),
    "reset_state of the first row for all": ("segments._initial", "clamp(max=per_step.shape[2] - 1)", "clamp(max=0)"),
    "hx of direction 0 for both": ("segments._initial", "of_rows = hx[d::D]", "of_rows = hx[0::D]"),
    "a row of length 0 gets zeros": ("segments._final", "hx[d::D].to(", "hx[d::D].mul(0).to("),
    "h of the same step": (
        "segments._cell_states",
        ".roll(1, 0).index_copy(0, walk.starts, h_0)",
        ".index_copy(0, walk.starts, h_0)",
    ),
    "h_0 missing": ("segments._cell_states", ".roll(1, 0).index_copy(0, walk.starts, h_0)", ".roll(1, 0)"),
    "c_0 not forgotten": ("segments._cell_states", "f.index_select(0, walk.starts) * c_0", "c_0"),
    "c carried over a start": ("segments._scan", "starts[firsts] | starts[seconds]", "starts[firsts]"),
    "f of the same step in backward": ("segments.backward", "f.roll(-1, 0).flip(0)", "f.flip(0)"),
    "starts of the same step in backward": ("segments.backward", "starts.roll(-1, 0).flip(0)", "starts.flip(0)"),
    "df not cut at starts": ("segments.backward", ".masked_fill(starts, 0), db", ", db"),
    "direction 1 walks blocks forward": ("packed._back", "x.flip(0)", "x"),
    "direction 1's output left backwards": ("packed._back", "y.flip(0)", "y"),
    "direction 1's blocks left backwards": ("packed._back", "ys[::-1]", "ys"),
    "final states shortest first": ("packed._ahead", "reversed(ended)", "ended"),
    "direction 0's weights for both": ("packed.run", "params[k * per_direction : (k + 1)", "params[0 : (0 + 1)"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_loop_catches(name, mutate):
    function, old, new = MUTATIONS[name]
    batch = make_batch("lstm", 2, 2, reset_state="per step")
    mutate({f"fastrnn.torch_path.{function}": (old, new)})
    found = faults(batch)
    print(name, found)
    assert found


OTHERS = {
    "cell states summed in 16 bits": (
        ("segments._cell_states", "(gates.float() if gates.dtype.itemsize == 2 else gates)", "gates"),
        checks.test_cell_states_of_16_bits_are_summed_in_more,
    ),
    "starts multiplied by": (
        (
            "segments.after",
            "torch.where(starts[which], b[which], torch.addcmul(b[which], f[which], c_prev))",
            "torch.addcmul(b[which], f[which] * ~starts[which], c_prev)",
        ),
        checks.test_a_row_of_nan_leaves_other_rows_and_segments_alone,
    ),
    "the last layer's input not dropped": (
        ("segments.run", "source = dropout(source, stack.dropout, stack.training)", "pass"),
        checks.test_dropout_between_layers_is_the_same_with_cell_states,
    ),
    "dropped out of training": (
        (
            "segments.run",
            "source = dropout(source, stack.dropout, stack.training)",
            "source = dropout(source, stack.dropout)",
        ),
        checks.test_dropout_between_layers_is_the_same_with_cell_states,
    ),
    "a layer's input between not dropped": (
        ("packed.run", "data = dropout(data, stack.dropout, stack.training)", "pass"),
        checks.test_dropout_between_layers_is_the_same_with_cell_states,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_its_own_check_catches(name, mutate):
    (function, old, new), check = OTHERS[name]
    check()
    mutate({f"fastrnn.torch_path.{function}": (old, new)})
    with pytest.raises(AssertionError):
        check()


def test_the_unchanged_source_passes_as_a_mutant(mutate):
    for module in ("segments", "packed"):
        mutate({f"fastrnn.torch_path.{module}.run": ("return", "return")})
    assert segments.run.__module__ != "fastrnn.torch_path.segments"
    assert not faults(make_batch("lstm", 2, 2, reset_state="per step"))


def test_the_benchmark_runs_and_compares():
    lines = list(bench.tables(((6, 3, 2, 4),), repeats=1))
    rows = [line for line in lines if line.startswith("| 6, 3, 2, 4")]
    assert len(rows) == len(bench.RESETS) + 1 and all("x |" in row for row in rows)
    lstm, x = torch.nn.LSTM(2, 4), torch.randn(6, 3, 2, requires_grad=True)
    forms = bench.of_resets(lstm, torch.rand(6, 3) < 0.5)
    forms["segments"] = bench.of_resets(lstm, torch.zeros(6, 3).bool())["segments"]
    with pytest.raises(AssertionError, match="not close"):
        bench.row(forms, lstm, x, "other resets", repeats=1)
