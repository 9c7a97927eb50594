"""Measure resets and unequal lengths on this CPU: fastrnn.torch_path beside what people write today, LSTM, fp32.

    python -m bench.segments            print the tables (a few minutes)
    python -m bench.segments --blocks   another table: without gradients, by dense blocks and by torch's packed form
    ... --write                         put them into docs/performance.md

Times are of forward and backward (x, weights), medians of runs that take turns in one process, threads pinned. With p,
each step of each row begins an episode with probability p; it is compared with the loop over time that reinforcement
learning code runs, one call of torch.nn.LSTM a step. Lengths are uniform in 1 to T; they are compared with torch's
pack_padded_sequence and pad_packed_sequence. Both must give the same outputs and gradients, or nothing is printed.

Source of the loop: Agent.get_states in cleanrl/ppo_atari_lstm.py of github.com/vwxyzjn/cleanrl.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.stack import Stack
from fastrnn.torch_path import packed, segments

from . import clock, write

SHAPES = ((128, 8, 512, 128), (128, 32, 128, 128), (512, 16, 64, 64), (128, 32, 256, 256))  # T, B, I, H
RESETS = (0.01, 0.1)
Form = Callable[[Tensor], Tensor]  # from x to what is summed, and differentiated
HEAD = "| LSTM, T, B, I, H | {what} | {today}, ms | segments, ms | ratio | segments with c_t, ms |"


def of_resets(lstm: torch.nn.LSTM, reset: Tensor) -> dict[str, Form]:
    state = (torch.zeros(1, reset.shape[1], lstm.hidden_size),) * 2
    keep = (~reset).float()[:, None, :, None]

    def step_loop(x: Tensor) -> Tensor:
        (h, c), outputs = state, []
        for x_t, kept in zip(x, keep, strict=True):
            y, (h, c) = lstm(x_t[None], (kept * h, kept * c))
            outputs.append(y)
        return torch.cat(outputs)

    return {"step loop": step_loop, **_forms(lstm, state, reset=reset)}


def of_lengths(lstm: torch.nn.LSTM, lengths: Tensor, T: int) -> dict[str, Form]:
    state = (torch.zeros(1, len(lengths), lstm.hidden_size),) * 2

    def packed(x: Tensor) -> Tensor:
        y, _ = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), state)
        return pad_packed_sequence(y, total_length=T)[0]

    return {"pack_padded_sequence": packed, **_forms(lstm, state, lengths=lengths)}


def _forms(lstm: torch.nn.LSTM, state: tuple[Tensor, ...], **how: Tensor) -> dict[str, Form]:
    stack, params = Stack("lstm", training=True), list(lstm.parameters())

    def run(x: Tensor, cell_states: bool = False) -> Tensor:
        y, _, c = segments.run(stack, x, state, params, **how, cell_states=cell_states)
        return y if c is None else torch.cat([y, c], -1)

    return {"segments": run, "with c_t": lambda x: run(x, True)}


def results(form: Form, lstm: torch.nn.LSTM, x: Tensor) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of its sum."""
    y = form(x)
    return y, *torch.autograd.grad(y.sum(), [x, *lstm.parameters()])


def row(forms: dict[str, Form], lstm: torch.nn.LSTM, x: Tensor, what: str, repeats: int) -> str:
    today, segmented, _ = (results(form, lstm, x) for form in forms.values())  # warms up, too
    torch.testing.assert_close(segmented, today, rtol=1e-4, atol=1e-4 * max(g.abs().max().item() for g in today))
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, form in forms.items():
            start = time.perf_counter()
            results(form, lstm, x)
            times[name].append(1e3 * (time.perf_counter() - start))
    today, ours, with_cells = (statistics.median(of_form) for of_form in times.values())
    shape = ", ".join(map(str, (*x.shape, lstm.hidden_size)))
    return f"| {shape} | {what} | {today:.1f} | {ours:.1f} | {today / ours:.1f}x | {with_cells:.1f} |"


def tables(shapes: tuple[tuple[int, int, int, int], ...], repeats: int) -> Iterator[str]:
    yield f"Measured on one {clock.cpu()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}."
    for kind in ("resets", "lengths"):
        today = "step loop" if kind == "resets" else "pack_padded_sequence"
        yield ""
        yield HEAD.format(what="p" if kind == "resets" else "steps that are real", today=today)
        yield "|---" * (HEAD.count("|") - 1) + "|"
        for T, B, I, H in shapes:
            torch.manual_seed(0)
            lstm, x = torch.nn.LSTM(I, H), torch.randn(T, B, I, requires_grad=True)
            if kind == "resets":
                for p in RESETS:
                    yield row(of_resets(lstm, torch.rand(T, B) < p), lstm, x, f"{p:g}", repeats)
            else:
                lengths = torch.randint(1, T + 1, (B,))
                real = f"{lengths.sum().item() / (T * B):.0%}"
                yield row(of_lengths(lstm, lengths, T), lstm, x, real, repeats)


BLOCKS = ((64, 64, 128), (64, 16, 128), (128, 32, 256), (512, 16, 64))  # T, B, I = H
BLOCKS_HEAD = (
    "| T, B, I = H | steps of a block | LSTM: packed form, ms | blocks, ms | ratio | GRU: ratio | RNN: ratio |"
)


def blocks(repeats: int) -> Iterator[str]:
    """Without gradients, lengths evenly from 1 to T: the time of the packed form over that of blocks."""
    yield f"Measured on one {clock.cpu()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}."
    yield ""
    yield BLOCKS_HEAD
    yield "|---" * (BLOCKS_HEAD.count("|") - 1) + "|"
    for T, B, H in BLOCKS:
        torch.manual_seed(0)
        lengths, x = torch.linspace(1, T, B).round().long(), torch.randn(T, B, H)
        columns = []
        for name in ("LSTM", "GRU", "RNN"):
            form, ways = getattr(fastrnn, name)(H, H), (False, True)
            times: dict[bool, list[float]] = {way: [] for way in ways}
            for run in range(2 + repeats):
                for way in ways:
                    with torch.no_grad(), mock.patch.object(packed, "in_blocks", lambda *_, way=way: way):
                        start = time.perf_counter()
                        form(x, lengths=lengths)
                    if run >= 2:  # warm
                        times[way].append(1e3 * (time.perf_counter() - start))
            of_torch, dense = (statistics.median(times[way]) for way in ways)
            ratio = f"{of_torch / dense:.2f}x"
            columns += [f"{of_torch:.1f}", f"{dense:.1f}", ratio] if name == "LSTM" else [ratio]
        steps = T / len(lengths.unique())
        yield f"| {T}, {B}, {H} | {steps:g} | {' | '.join(columns)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=20, help="calls of each form (default: 20)")
    parser.add_argument(
        "--blocks", action="store_true", help="compare dense blocks with torch's packed form, without gradients"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines, flag = [], " --blocks" if args.blocks else ""
    for line in blocks(args.repeats) if args.blocks else tables(SHAPES, args.repeats):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        write(f"python -m bench.segments{flag} --write", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
