"""Layers of other packages by their own code and, converted, by ours: what bench/tirex.py and bench/xlstm.py share.

A record is of ours beside one of their backends, each called once a round, in an order that changes: milliseconds of
both (medians), the median of theirs over ours of a round, and how far apart the results are. Nothing else is asserted
of them: tests/nn/test_foreign.py holds what converted layers compute.
"""

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import prepare, processes
from .adapters import Missing
from .stages import Record
from .turns import Turns, in_turns

Results = tuple[Tensor, ...]
Call = Callable[[], Results]


class Pair(NamedTuple):
    """One record to be: its key, and both calls, made when it is its turn."""

    key: Record
    build: Callable[[], dict[str, Call]]  # "ours", "theirs"


def apart(found: Results, wanted: Results) -> float:
    """The largest difference over the wanted results' standard deviation, of the worst tensor.

    >>> apart((torch.tensor([1.0, 3.5]),), (torch.tensor([1.0, 3.0]),))
    0.5
    """
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    return max(((a - b).abs().max() / b.std(correction=0)).item() for a, b in pairs)


def needs_nvcc() -> None:
    """Raise Missing where xlstm's CUDA kernels, which are compiled at first use, cannot be."""
    from torch.utils import cpp_extension

    if not torch.cuda.is_available():
        raise Missing("a GPU is not there")
    if cpp_extension.CUDA_HOME is None:
        raise Missing("nvcc is not installed")
    if not cpp_extension.is_ninja_available():
        raise Missing("ninja is not installed")


def measured(pair: Pair, rounds: int, timer: Any) -> Record:
    """Return the times of a pair, or the reason why there are none."""
    try:
        calls = pair.build()
        results = {name: call() for name, call in calls.items()}  # compiles
        for call in calls.values():
            call()
    except ModuleNotFoundError as error:
        return {"missing": f"{error.name} is not installed"}
    except Missing as reason:
        return {"missing": str(reason)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:600]}"}
    seconds = in_turns(calls, rounds, timer)
    found: Record = {f"{name}_ms": round(1e3 * statistics.median(times), 4) for name, times in seconds.items()}
    found["x"] = round(Turns(seconds).pairs("ours")["theirs"][1], 2)
    return found | {"apart": round(apart(results["ours"], results["theirs"]), 6)}


def options(doc: str) -> argparse.ArgumentParser:
    """Return the parser of the options that both processes take."""
    parser = processes.options(doc)
    parser.add_argument("--rounds", type=int, default=11, help="calls of each (default: 11)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="on a CPU (default: 1); more wait for each other if the CPU has other work",
    )
    return parser


def device(dry: bool) -> str:
    return "cuda" if torch.cuda.is_available() and not dry else "cpu"


def measure(log: processes.Log, pairs: Iterable[Pair], args: argparse.Namespace, timer: Any) -> None:
    """Time the pairs that the file lacks."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    prepare.warm_up(device(args.dry_run) == "cpu")
    for pair in log.each(pairs, lambda pair: pair.key):
        torch.manual_seed(0)
        found = measured(pair, args.rounds, timer)
        log.add(pair.key | found | {"torch": torch.__version__, "triton": triton.__version__})
