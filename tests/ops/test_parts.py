"""A batch whose programs would not all run at once, in launches one after the other: the bits of one launch."""

import dataclasses

import pytest
import torch

import fastrnn
from fastrnn.device import DeviceSpec
from fastrnn.ops import prepared

T, B, H = 5, 37, 40  # three batch tiles of 16 rows, two slices of 32 units
CASES = {
    "plain": ("LSTM", {}, ()),
    "both directions": ("GRU", {"bidirectional": True}, ()),
    "a state": ("LSTM", {}, ("hx",)),
    "lengths": ("LSTM", {}, ("lengths",)),
    "ragged": ("GRU", {}, ("cu_seqlens",)),
    "resets to a state": ("LSTM", {}, ("reset", "reset_state")),
    "heads": ("LSTM", {"num_heads": 2}, ()),
    "zoneout": ("LSTM", {"zoneout": 0.5}, ("lengths",)),
    "chunks": ("RNN", {"checkpoint_every": 2}, ()),
}


@pytest.fixture
def board(monkeypatch, device):
    """Plan as if the device had so many multiprocessors."""
    own = DeviceSpec.of(torch.device(device))

    def put(multiprocessors: int) -> None:
        spec = dataclasses.replace(own, multiprocessors=multiprocessors)
        monkeypatch.setattr(DeviceSpec, "of", lambda _: spec)

    return put


@pytest.fixture
def grids(monkeypatch):
    """Of all launches."""
    found, interpret = [], prepared._interpret

    def noted(function, grid, arguments):
        found.append(grid)
        interpret(function, grid, arguments)

    monkeypatch.setattr(prepared, "_interpret", noted)
    return found


def results(case: str, device: str) -> list[torch.Tensor]:
    cell, _, given = CASES[case]
    torch.manual_seed(1)
    layer = layer_of(case, device)
    D, wide = layer.bidirectional + 1, torch.float32
    state = torch.randn(D, B, H, dtype=wide, device=device), torch.randn(D, B, H, dtype=wide, device=device)
    lengths = torch.arange(B) % T + 1
    every = {
        "hx": state if cell == "LSTM" else state[0], "lengths": lengths, "reset_state": state,
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        "reset": torch.rand(T, B, device=device) < 0.3,
    }  # fmt: skip
    x = torch.randn(T, B, 6, device=device)
    x = (x[:, 0].repeat(B, 1)[: int(lengths.sum())] if "cu_seqlens" in given else x).requires_grad_()
    torch.manual_seed(2)
    y, final = layer(x, **{name: every[name] for name in given})
    finals = final if isinstance(final, tuple) else (final,)
    loss = sum((out.float() * torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)).sum()
               for out in (y, *finals))  # fmt: skip
    return [y, *finals, *torch.autograd.grad(loss, [x, *layer.parameters()])]


def layer_of(case: str, device: str) -> torch.nn.Module:
    cell, options, _ = CASES[case]
    return getattr(fastrnn, cell)(6, H, backend="cooperative", device=device, **options)


def parts(case: str, device: str) -> int:
    """Multiprocessors of a board that two batch tiles of the case fill, asked of one that holds all."""
    slices, _, R = layer_of(case, device).plan(torch.zeros(T, B, 6, device=device)).kernel.grid
    return 2 * slices * R


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_batch_have_the_bits_of_the_whole(case, device, board, grids):
    board(1 << 20)
    whole = results(case, device)
    in_one = len(grids)
    board(parts(case, device))
    for found, expected in zip(results(case, device), whole, strict=True):
        assert torch.equal(found, expected)
    if device == "cpu":
        assert [grid[1] for grid in grids[:in_one]] == [3] * in_one
        assert [grid[1] for grid in grids[in_one:]] == [2, 1] * in_one


@pytest.mark.parametrize(
    "change",
    (
        {"kernels.exchange.first_row_of": ("tile += tl.load(first_tile)", "tile += 0")},
        {"kernels.exchange.first_row_of": ("tile += tl.load(first_tile)", "tile += tl.load(first_tile) + 1")},
        {"fastrnn.ops.prepared._parts": ("min(batch_tiles, end - first)", "1")},
    ),
    ids=("the first part again", "a tile too far", "a tile less"),
)
def test_rows_left_out_are_noticed(change, device, board, mutate, poisoned):
    board(1 << 20)
    whole = results("a state", device)
    prepared.forget()
    mutate(change)
    board(parts("a state", device))
    try:
        found = results("a state", device)
    except Exception as error:  # programs beyond the batch send nothing, and wait for it
        assert "deadlock: all of" in str(error)
    else:
        assert not all(torch.equal(*pair) for pair in zip(found, whole, strict=True))


def test_counters_of_a_part_are_its_own(device, board, grids, mutate):
    """A part that met at the counters of the one before it would find all arrived, and read what is not there."""
    board(1 << 20)
    board(parts("plain", device))
    seen = []
    made = prepared.Kernels._exchange

    def exchange(self, which, T, like):
        found = made(self, which, T, like)
        seen.append(found.counters)
        return found

    prepared.Kernels._exchange, kept = exchange, made
    try:
        results("plain", device)
    finally:
        prepared.Kernels._exchange = kept
    assert len(seen) == 2
    for counters in seen:
        assert counters.shape[0] == 2 and (counters[0, :, 0] > 0).all() and (counters[1, :1, 0] > 0).all()
