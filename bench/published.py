"""Times that others have published, beside the workloads that repeat them; only what a source states.

A number is None where its source does not give it in figures, or was not at hand: the report leaves it blank and says
why. Nothing here was measured by us, and hardware differs: these stand beside our numbers, not against them.
"""

from typing import NamedTuple

from tests.support.cases import Case

from .workload import Workload


class Published(NamedTuple):
    what: str  # implementation
    which: str  # pass
    value: float | None
    unit: str
    hardware: str
    source: str
    note: str = ""


FLASHRNN = "https://github.com/NX-AI/flashrnn"
FLASHRNN_NOTE = "without the input's product, which ours include; ours run all heads in one launch"
DEEPBENCH = "https://github.com/baidu-research/DeepBench/blob/master/README.md"
DEEPBENCH_SIZES = "https://github.com/baidu-research/DeepBench/blob/master/code/kernels/rnn_problems.h"
PACKED = "https://github.com/pytorch/pytorch/issues/149194"
SMALL_H = "https://github.com/xwang233/code-snippet/blob/master/cudnn-rnn-bench-62143/forward/readme.txt"
TORCHRL = "https://github.com/pytorch/rl/pull/3725"

Rows = dict[Workload, tuple[Published, ...]]


# Milliseconds of T = 1024 steps by units of a head, 768 in all: forward, and forward and backward where it fits.
FLASHRNN_MS: dict[str, dict[int, tuple[float, float | None]]] = {
    "FlashRNN Triton, fused": {16: (1.97, 3.47), 32: (1.44, 4.10), 64: (1.99, 18.94), 128: (3.23, None)},
    "FlashRNN CUDA, fused": {
        16: (3.56, 8.22), 32: (2.90, 8.20), 64: (3.10, 8.64), 128: (3.22, 9.02), 256: (3.62, 11.3), 768: (4.87, 13.61),
    },
    "FlashRNN CUDA, alternating": {
        16: (7.84, 17.88), 32: (8.12, 18.8), 64: (8.19, 20.5), 128: (8.80, 21.66), 256: (10.47, 33.48),
        768: (10.79, 26.49),
    },
    "torch.nn (cuDNN) in float16, with the input's product": {768: (2.01, 5.19)},
    "haste in float32": {768: (18.41, 43.86)},
}  # fmt: skip


def _flashrnn() -> Rows:
    """768 units as heads of every size: labels of the bars in the figure of its repository."""
    rows: Rows = {}
    for H in (16, 32, 64, 128, 256, 768):
        numbers = []
        for what, times in FLASHRNN_MS.items():
            passes = zip(("forward", "forward+backward"), times.get(H, ()), strict=False)
            numbers += [Published(what, which, ms, "ms", "H100", FLASHRNN, FLASHRNN_NOTE) for which, ms in passes]
        rows[Workload("FlashRNN", "lstm", Case(1024, 16, H, 1), "bfloat16", heads=768 // H)] = tuple(numbers)
    return rows


def _deepbench() -> Rows:
    """Training sizes; the README states four times, which are of forward and backward."""
    note = "cuDNN in fp32, input's product left out, which ours include; ours in fp16 with fp32 sums"
    stated = {
        ("rnn_relu", 1760, 16, 50): (7.75, "TITAN X Pascal"),
        ("rnn_relu", 2560, 32, 50): (21.99, "TITAN X Maxwell"),
        ("lstm", 1024, 128, 25): (9.76, "TITAN Xp"),
        ("gru", 2816, 32, 1500): (1790.75, "TITAN X Pascal"),
    }
    others = [
        ("rnn_relu", 2048, 64, 50), ("lstm", 512, 16, 25), ("lstm", 2048, 16, 25), ("lstm", 4096, 16, 25),
        ("lstm", 1536, 8, 50), ("lstm", 256, 16, 150), ("gru", 2560, 32, 187), ("gru", 2048, 32, 187),
        ("gru", 1536, 32, 187), ("gru", 512, 32, 1), ("gru", 1024, 32, 1500),
    ]  # fmt: skip
    rows: Rows = {}
    for cell, H, B, T in [*stated, *others]:
        value, hardware = stated.get((cell, H, B, T), (None, ""))
        source, why = (DEEPBENCH, note) if value else (DEEPBENCH_SIZES, "the size only: times are in spreadsheets")
        number = Published("cuDNN", "forward+backward", value, "ms", hardware, source, why)
        rows[Workload("DeepBench", cell, Case(T, B, H, 1), "float16")] = (number,)
    return rows


def _packed() -> Rows:
    """What torch.nn takes for a packed sequence, as a multiple of the padded one, two layers."""
    stated = {100: (15.07, 3.96), 1000: (95.83, 27.94), 4000: (113.85, 80.90)}
    note = "hardware and sizes but L and two layers are not in the text that we have: ours are B=32, I=H=128"
    return {
        Workload("packed", "lstm", Case(T, 32, 128, 1), layers=2, kind="ragged"): (
            Published("torch.nn, packed over padded", "forward", forward, "times", "not stated", PACKED, note),
            Published("torch.nn, packed over padded", "backward", backward, "times", "not stated", PACKED, note),
        )
        for T, (forward, backward) in stated.items()
    } | {Workload("packed", "lstm", Case(T, 32, 128, 1), layers=2): () for T in stated}


def _small_h() -> Rows:
    """Shapes (T, B, I) -> H at which cuDNN's algorithm for small H, which torch takes, is slower than its standard."""
    stated = {
        (2058, 62, 16, 168, 1): (29.9, 156.9),
        (1981, 45, 56, 152, 4): (90.2, 269.4),
        (1125, 44, 40, 160, 1): (13.0, 37.6),
    }
    note = "that this build has PR 62143 is our reading of the file"
    return {
        Workload("small H", "lstm", Case(T, B, H, 1), input_size=I, layers=layers): (
            Published("torch.nn of 1.11.0a0+git251686f", "forward", before, "ms", "not stated", SMALL_H),
            Published("torch.nn of 1.11.0a0+git9d80e6d", "forward", after, "ms", "not stated", SMALL_H, note),
        )
        for (T, B, I, H, layers), (before, after) in stated.items()
    }


def _torchrl() -> Rows:
    """Resets at p = 0.01 in TorchRL's modules."""
    stated = {16: (1.67, 3.46, 0.81), 64: (2.66, 11.16, 2.96)}
    note = "unit, pass, hardware and H are not in the text that we have: taken as ms, forward; ours has H=256"
    names = ("TorchRL pad (cuDNN)", "TorchRL scan", "TorchRL scan, compiled")
    return {
        Workload("TorchRL", "gru", Case(T, 128, 256, 1), kind="reset"): tuple(
            Published(name, "forward", value, "ms", "not stated", TORCHRL, note)
            for name, value in zip(names, values, strict=True)
        )
        for T, values in stated.items()
    }


PUBLISHED: Rows = _flashrnn() | _deepbench() | _packed() | _small_h() | _torchrl()
