"""Write the tables of measured GPU times in docs/performance.md, from the records in bench/measured/.

    python -m bench.measured                        print them
    python -m bench.measured --write                put them into docs/performance.md

Each folder is one visit: what was timed, as JSON lines, and machine.txt, the GPU and its versions.
"""

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastrnn
from fastrnn.planning import cluster, prices, resident

from . import write

VISIT = Path(__file__).parent / "measured" / "H100-2026-11-25"
NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}
Record = dict[str, Any]


def records(name: str) -> list[Record]:
    """A file's records."""
    return [json.loads(line) for line in (VISIT / f"{name}.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def tiles_of_16_rows() -> Iterator[None]:
    """Plan as where tiles of 8 rows do not all run at once, and no cooperative kernel has a simulated price.

    Neither was measured: cooperative kernels waited at a counter on that day, and today's poll.
    """
    simulated = prices.simulated_cycles

    def forget() -> None:
        resident.resident.cache_clear()
        cluster.cluster.cache_clear()

    with (
        mock.patch.object(cluster, "in_rows", lambda _, plan: plan),
        mock.patch.object(resident, "in_rows", lambda _, plan: plan),
        mock.patch.object(
            prices, "simulated_cycles", lambda kernel, *of: None if len(kernel.grid) > 2 else simulated(kernel, *of)
        ),
    ):
        forget()
        try:
            yield
        finally:
            forget()


def today(cell: str, hidden: int, which: str) -> float | None:
    """Microseconds a step of the form that the planner takes, if it was measured."""
    kernel = fastrnn.plan(cell, hidden_size=hidden, batch_size=16, dtype=torch.bfloat16, device="sm_90").kernel
    assert kernel is not None
    if kernel.block_b == cluster.NARROW_B and len(kernel.grid) == 2:
        return None
    wanted = {"cell": cell, "H": hidden, "ctas": kernel.ctas, "warps": kernel.warps}
    form = wanted | {"pass": which, "shares": kernel.choices[which][0].get("SHARES")}
    for record in records("forms"):
        if form.items() <= record.items() and "us" in record:
            return record["us"]
    # Kernels of the cooperative tier: the last that were measured waited at a counter.
    for record in records("steps-before" if len(kernel.grid) > 2 else "steps-after"):
        if wanted.items() <= record.items():
            return record[which]
    return None


def steps() -> Iterator[str]:
    """Microseconds a step, before and after what was changed on that day."""
    yield "| cell, H | kernel before | forward, backward | kernel now | forward, backward |"
    yield "|---|---|---|---|---|"
    for before in records("steps-before"):
        cell, hidden = before["cell"], before["H"]
        with tiles_of_16_rows():
            plan = fastrnn.plan(cell, hidden_size=hidden, batch_size=16, dtype=torch.bfloat16, device="sm_90")
            found = [today(cell, hidden, which) for which in ("forward", "backward")]
        now = plan.kernel
        assert now is not None
        times = ", ".join("not measured" if us is None else f"{us:.2f}" for us in found)
        yield (
            f"| {NAMES[cell]}, {hidden} | {_kernel(before['backend'], before['ctas'], before['warps'])} "
            f"| {before['forward']:.2f}, {before['backward']:.2f} "
            f"| {_kernel(plan.backend, now.ctas, now.warps)} | {times} |"
        )


def _kernel(backend: str, ctas: int, warps: int) -> str:
    return f"{f'clusters of {ctas}' if ctas > 1 else backend}, {warps} warps"


def layers() -> Iterator[str]:
    """Milliseconds of whole layers beside torch.nn's, that is cuDNN's."""
    yield "| layer, H, dtype | backend | forward: ours, cuDNN | ratio | with gradients: ours, cuDNN | ratio |"
    yield "|---|---|---|---|---|---|"
    for row in records("compare"):
        if row["kind"] != "plain" or row["layers"] > 1 or row["bi"]:
            continue
        yield (
            f"| {row['cell']}, {row['H']}, {row['dtype']} | {row['backend']} "
            f"| {row['ours_fwd']:.2f}, {row['nn_fwd']:.2f} | {row['x_fwd']:.1f}x "
            f"| {row['ours_train']:.2f}, {row['nn_train']:.2f} | {row['x_train']:.1f}x |"
        )


def host() -> Iterator[str]:
    """Microseconds until a call returns, ours and torch.nn's."""
    yield "| layer, layers, dtype | inference: ours, cuDNN | training step: ours, cuDNN |"
    yield "|---|---|---|"
    for row in records("host"):
        if row["what"] == "host us":
            dtype = row["dtype"].removeprefix("torch.")
            yield (
                f"| {row['cell']}, {row['layers']}, {dtype} | {row['ours_inference']:.0f}, {row['nn_inference']:.0f} "
                f"| {row['ours_step']:.0f}, {row['nn_step']:.0f} |"
            )


TABLES = {"steps": steps, "layers": layers, "host": host}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    args = parser.parse_args()
    for name, table in TABLES.items():
        lines = list(table())
        if args.write:
            write(f"python -m bench.measured --write: {name}", lines)
        else:
            print("\n".join([name, *lines]))


if __name__ == "__main__":
    main()
