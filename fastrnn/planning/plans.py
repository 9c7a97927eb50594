"""What the planner answers, and how it is printed."""

from dataclasses import dataclass

import torch

from .kernel_plan import KernelPlan, as_text
from .prices import Price


@dataclass(frozen=True)
class Plan:
    """What would run for a layer: the backend, the reason, and the launch of our kernel. print(plan) shows it.

    Attributes:
        cell (str): The cell, such as "lstm".
        hidden_size (int): H, all units of a layer.
        batch_size (int): B, in sequences.
        seq_len (int): T, in time steps.
        directions (int): D, 1 or 2.
        dtype (torch.dtype): The dtype to compute in.
        device (str): An architecture such as "sm_90" if a kernel was planned. Otherwise the device as it was asked for.
        backend (str): The backend that runs: "torch", "reference", "resident", "cluster" or "cooperative".
        why (str): Why this backend runs, and why not those before it.
        kernel (KernelPlan | None): The launch of our kernel: tiles, programs, warps, and sizes in bytes. None for
            "torch" and "reference".
        num_layers (int): The number of stacked layers.
        checkpoint_every (int | None): The chunk whose gates backward computes again, in time steps. None if all are
            kept.
        wavefront (int | None): The chunk of a wavefront, in time steps. None if layers run one after the other.
        order (str): Why layers run as a wavefront, or why they do not.
        num_heads (int): N. W_hh has N blocks of hidden_size / N units.
        training (bool): Whether the prices include backward.
        prices (tuple[Price, ...]): The candidates that have a price, the cheapest first.
    """

    cell: str
    hidden_size: int
    batch_size: int
    seq_len: int
    directions: int
    dtype: torch.dtype
    device: str
    backend: str
    why: str
    kernel: KernelPlan | None = None
    num_layers: int = 1
    checkpoint_every: int | None = None
    wavefront: int | None = None
    order: str = ""
    num_heads: int = 1
    training: bool = True
    prices: tuple[Price, ...] = ()

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"T={self.seq_len}, B={self.batch_size}, H={self.hidden_size}"
        shape += f" in {self.num_heads} heads" if self.num_heads > 1 else ""
        rows = {"why": self.why}
        if k := self.kernel:
            *slices, batch_tiles, _ = k.grid
            groups = f"{batch_tiles} batch tile(s) of {k.block_b} rows x {self.directions} direction(s)"
            groups += f" x {self.num_heads} heads" if self.num_heads > 1 else ""
            split = f"{slices[0]} slices of {k.units} units x " if slices else ""
            split = f"clusters of {k.ctas} with {k.units} units each x " if k.ctas > 1 else split
            rows |= {
                "kernel": f"{k.dialect}, {k.warps} warps a program",
                "programs": f"{k.programs} = {split}{groups}"
                + (f", in {k.parts} launches, one after the other" if k.parts > 1 else ""),
                "on chip": f"{as_text(k.weight_bytes)} of W_hh a program in {k.weight_place}; shared memory: "
                f"{as_text(k.shared_bytes)} of {as_text(k.shared_limit)}",
                "math": f"products of {k.precision if self.dtype == torch.float32 else dtype}, summed in fp32; "
                f"activations: {k.activations}",
                "saved": f"{as_text(k.saved_bytes)} for backward, nothing for inference",
            }
            if K := self.checkpoint_every:
                rows["saved"] = f"{as_text(k.saved_bytes)} for backward, of one chunk of {K} steps at a time"
            if self.num_layers > 1:
                how = f"as a wavefront of chunks of {self.wavefront} steps" if self.wavefront else "one after the other"
                rows["layers"] = f"{self.num_layers}, {how}: {self.order}"
        if self.prices:
            passes = "forward and backward" if self.training else "forward"
            rows["price"] = f"us a step, {passes}: {', '.join(map(str, self.prices))}"
        head = f"{self.cell}, {shape}, {dtype}, on {self.device}: backend {self.backend}"
        return "\n".join([head, *(f"  {key:<9} {value}" for key, value in rows.items())])
