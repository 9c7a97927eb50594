"""A call as a CUDA graph would hold it: the same launches each time, and nothing that asks the device."""

import json

import pytest
import torch

import fastrnn
from fastrnn.nn import options

from ..support import children
from ..support.versions import NEEDS_CLUSTERS

# Launches of a training step, by case of tests/support/captured.py: two a layer, and one more to compute again.
LAUNCHES = {"resident": 4, "cooperative": 2, "projected": 2, "lengths": 2, "resets": 2, "checkpoints": 6}
WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "cpu"}
WAITING |= {"lift_fresh", "pin_memory", "_pin_memory"}  # of what lies on the host
BROKEN = {
    "counters": ("cooperative", "counters_zero"),
    "launches": ("lengths", "same"),
    "waiting": ("resets", "operators"),
    "stream": ("resident", "stream"),
}


def captured(*arguments: str) -> list[dict]:
    done = children.run(["-m", "tests.support.captured", *arguments])
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def faults(record: dict, launches: int) -> set[str]:
    found = {key for key in ("same", "stream", "counters_zero") if not record[key]}
    found |= {"operators"} if WAITING & {*record["operators"]} else set()
    return found | ({"launches"} if record["launches"] != launches else set())


def test_a_training_step_is_captured_whole():
    """Kernels, grids, sizes, kinds of pointers and torch's operators are those of the step before, on its stream.

    The barrier's counters are zero at each launch, whatever the last one left.
    """
    records = captured(*LAUNCHES)
    assert {r["case"]: found for r in records if (found := faults(r, LAUNCHES[r["case"]]))} == {}
    assert len(records) == len(LAUNCHES) and all({"empty", "mm"} <= {*r["operators"]} for r in records)


@NEEDS_CLUSTERS
def test_so_is_a_clusters():
    assert [faults(record, 2) for record in captured("cluster")] == [set()]


@pytest.mark.parametrize("broken", BROKEN)
def test_what_a_graph_cannot_repeat_is_noticed(broken):
    case, key = BROKEN[broken]
    [record] = captured("--broken", broken, case)
    assert key in faults(record, LAUNCHES[case])


def moved(name: str = "lengths") -> torch.Tensor:
    return options._moved(name, torch.tensor([3, 5]), torch.device("meta"))


def test_lengths_on_the_host_are_refused_while_a_graph_is_captured(monkeypatch):
    assert moved().is_meta
    monkeypatch.setattr(options, "_capturing", lambda device: True)
    with pytest.raises(ValueError, match="^lengths: expected a tensor on meta while a CUDA graph is captured"):
        moved()
    assert options._moved("lengths", torch.tensor([3, 5]), torch.device("cpu")).tolist() == [3, 5]


@pytest.mark.parametrize("name", ("lengths", "cu_seqlens", "reset"))
def test_each_of_them_is(name, monkeypatch):
    """Of a call on a GPU, which a device without memory stands for."""
    monkeypatch.setattr(options, "_capturing", lambda device: True)
    layer = fastrnn.GRU(3, 4, backend="reference", device="meta")
    given = {"lengths": [5, 2], "cu_seqlens": [0, 2, 5], "reset": [[False, True]] * 5}[name]
    x = torch.randn(5, 3, device="meta") if name == "cu_seqlens" else torch.randn(5, 2, 3, device="meta")
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on meta while"):
        layer(x, **{name: given})


def test_packed_input_is_refused_where_our_kernels_run(monkeypatch):
    layer, x = fastrnn.GRU(3, 4, backend="reference"), torch.nn.utils.rnn.pack_sequence([torch.randn(5, 3)])
    layer(x)
    monkeypatch.setattr(options, "_capturing", lambda device: True)
    with pytest.raises(ValueError, match="^input: expected a tensor and lengths while"):
        layer(x)


def test_capture_is_asked_for_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert options._capturing(torch.device("cuda", 0)) and not options._capturing(torch.device("cpu"))
