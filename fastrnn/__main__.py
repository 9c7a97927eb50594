"""Show which kernel would run, what the compiler makes of it, how long it takes, and what this machine can run.

    python -m fastrnn plan --cell lstm --hidden 128 --batch 64 --steps 1000 --dtype bfloat16 --arch sm_90
    python -m fastrnn inspect --cell lstm --hidden 256 --batch 16 --dtype bfloat16 --arch sm_90
    python -m fastrnn profile --cell lstm --hidden 512 --batch 16 --seq 1024,4096,16384,65536 --compare torch
    python -m fastrnn doctor

No command needs a GPU. In plan and inspect, --cell, --hidden, --dtype, --arch and --precision take several values.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import plan
from .cells import CELLS
from .compat import interpreter
from .device import SPECS, DeviceSpec
from .planning.planner import BACKENDS, KERNEL_DTYPES, torch_precision
from .planning.tiers import TIERS

# What an option that is not given stands for: prices of a plan need a sequence, and inspect compiles a short one.
PLANNED = {"batch": 16, "dtype": ["bfloat16"], "arch": ["sm_90"], "steps": 1024}
INSPECTED = PLANNED | {"steps": 3}


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Return 0 if it ran, 1 if there is no kernel for anything that was asked, 2 after an error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = _parser().parse_args(arguments)
    try:
        return args.run(args, arguments)
    except (ValueError, NotImplementedError, RuntimeError, ImportError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fastrnn", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    planner = commands.add_parser("plan", help="show which kernel would run, its tiles, and why")
    planner.set_defaults(run=_plan, assumed=PLANNED)
    inspect = commands.add_parser("inspect", help="show what the compiler makes of a kernel, and simulate a time step")
    inspect.set_defaults(run=_inspect, assumed=INSPECTED)
    profile = commands.add_parser("profile", help="measure time and memory of long sequences on this machine")
    profile.set_defaults(run=_profile)
    _add_profile_options(profile)
    doctor = commands.add_parser("doctor", help="show what is installed, and which backends can run here")
    doctor.set_defaults(run=_doctor)

    dtypes = [str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES]
    for command in (planner, inspect):
        help = ", ".join(CELLS)
        command.add_argument("--cell", nargs="+", choices=list(CELLS), required=True, metavar="CELL", help=help)
        command.add_argument("--hidden", nargs="+", type=int, required=True, metavar="H", help="hidden units")
        command.add_argument("--batch", type=int, metavar="B", help="sequences (default: 16)")
        help = "directions of the layer (default: 1)"
        command.add_argument("--directions", type=int, choices=(1, 2), default=1, help=help)
        _add_heads(command)
        help = f"{', '.join(dtypes)} (default: bfloat16)"
        command.add_argument("--dtype", nargs="+", choices=dtypes, metavar="DTYPE", help=help)
        archs = [arch for arch in SPECS if arch != "interpreter"]
        help = f"GPU architectures: {', '.join(archs)} (default: sm_90, an H100)"
        command.add_argument("--arch", nargs="+", choices=archs, metavar="ARCH", help=help)
        help = "auto (the cheapest) or one tier (default: auto)"
        command.add_argument("--backend", choices=["auto", *TIERS], default="auto", help=help)
        help = "precision of float32 products (default: torch's setting)"
        command.add_argument("--precision", nargs="+", choices=("ieee", "tf32"), default=[torch_precision()], help=help)
    planner.add_argument("--steps", type=int, metavar="T", help="time steps, on which prices depend (default: 1024)")
    inspect.add_argument("--steps", type=int, metavar="T", help="time steps to compile for and to execute (default: 3)")
    help = "which kernel of the pair (default: both)"
    inspect.add_argument("--pass", dest="which", choices=("forward", "backward", "both"), default="both", help=help)
    inspect.add_argument(
        "--execute", action="store_true", help="run the compiled PTX on the CPU, and check the results"
    )
    inspect.add_argument("--measure", action="store_true", help="also time it on this machine's GPU")
    help = "show only six lower bounds of a step's time, without a simulation: a quick look"
    inspect.add_argument("--bounds", action="store_true", help=help)
    help = (
        "show a simulated step: each warp, what it waits for, how busy each pipe is; FILE gets a picture (matplotlib)"
    )
    inspect.add_argument("--timeline", nargs="?", const="", metavar="FILE", help=help)
    help = "simulate the step again with one resource made free at a time, and print the cycles"
    inspect.add_argument("--what-if", action="store_true", help=help)
    inspect.add_argument("--seed", type=int, default=0, help="seed of the tensors and of the schedule (--execute)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object a line, for each pass")
    inspect.add_argument("--dump", type=Path, metavar="DIR", help="write ttgir, llir, ptx, cubin, sass (amdgcn, hsaco)")
    return parser


def _add_profile_options(profile: argparse.ArgumentParser) -> None:
    profile.add_argument("--cell", choices=list(CELLS), required=True, metavar="CELL", help=", ".join(CELLS))
    profile.add_argument("--hidden", type=int, required=True, metavar="H", help="hidden units")
    profile.add_argument("--batch", type=int, default=16, metavar="B", help="sequences (default: 16)")
    profile.add_argument("--seq", required=True, metavar="T,T,...", help="sequence lengths, in time steps")
    profile.add_argument("--input", type=int, metavar="I", help="input features (default: H)")
    profile.add_argument("--layers", type=int, default=1, metavar="L", help="stacked layers (default: 1)")
    help = "directions of the layer (default: 1)"
    profile.add_argument("--directions", type=int, choices=(1, 2), default=1, help=help)
    _add_heads(profile)
    profile.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: float32)")
    device, help = "cuda" if torch.cuda.is_available() else "cpu", "default: cuda if there is a GPU"
    profile.add_argument("--device", choices=("cpu", "cuda"), default=device, help=help)
    help = f"{', '.join(BACKENDS)} (default: auto)"
    profile.add_argument("--backend", choices=BACKENDS, default="auto", metavar="BACKEND", help=help)
    profile.add_argument("--checkpoint-every", type=int, metavar="K", help="keep every K-th state, not all gates")
    help = "other backends to measure beside it"
    profile.add_argument("--compare", nargs="+", choices=BACKENDS, default=[], metavar="BACKEND", help=help)
    profile.add_argument(
        "--json", action="store_true", help="print one JSON object a line, for each length and backend"
    )
    profile.add_argument(
        "--trace", type=Path, metavar="FILE", help="write a trace of the shortest sequence, for Perfetto"
    )
    profile.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of time and memory over T")
    profile.add_argument(
        "--nvtx", action="store_true", help="run the shortest sequence once with NVTX ranges, for Nsight"
    )


def _add_heads(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--heads", "--num-heads", type=int, default=1, metavar="N", help="heads, which are blocks of W_hh (default: 1)"
    )


def _asked(args: argparse.Namespace) -> Iterator[dict]:
    """Yield the arguments of `compile.Problem` for each combination that was asked for."""
    for arch, cell, hidden, dtype in itertools.product(args.arch, args.cell, args.hidden, args.dtype):
        # Only float32 has precisions, and only devices with tf32 have two.
        several = dtype == "float32" and DeviceSpec.named(arch).has_tf32
        for precision in args.precision if several else ["ieee"]:
            yield {
                "cell": cell,
                "hidden_size": hidden,
                "batch_size": args.batch,
                "seq_len": args.steps,
                "directions": args.directions,
                "num_heads": args.heads,
                "dtype": getattr(torch, dtype),
                "arch": arch,
                "backend": args.backend,
                "precision": precision,
            }


def _fill(args: argparse.Namespace) -> list[str]:
    """Set the options that were not given to what they stand for, and return them as they would be written."""
    missing = {name: value for name, value in args.assumed.items() if getattr(args, name) is None}
    vars(args).update(missing)
    return [f"--{name} {value[0] if isinstance(value, list) else value}" for name, value in missing.items()]


def _plan(args: argparse.Namespace, arguments: list[str]) -> int:
    assumed = _fill(args)
    for asked in _asked(args):
        print(plan(device=asked.pop("arch"), **asked))
    if assumed:
        print(f"defaults taken: {', '.join(assumed)}")
    return 0


def _inspect(args: argparse.Namespace, arguments: list[str]) -> int:
    if interpreter.ENABLED:  # this process interprets kernels: compile in another one
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, "-m", "fastrnn", *arguments], env=environment).returncode
    from .inspect.compile import PASSES, Problem
    from .inspect.report import Simulation, as_json, print_table, records, show_steps

    _fill(args)
    is_shown = args.timeline is not None
    if args.bounds and (is_shown or args.what_if):
        raise ValueError("bounds: expected neither --timeline nor --what-if with it, because both simulate a step")
    if args.json and is_shown and not args.timeline:
        raise ValueError(
            "timeline: expected --timeline FILE with --json, for a picture; got no FILE, and the text is not JSON"
        )
    passes = PASSES if args.which == "both" else (args.which,)
    planned = False
    every = list(_asked(args))
    for asked in every:
        simulation = None if args.bounds else Simulation(args.what_if, is_shown)
        options = {"execute": args.execute, "measure": args.measure, "dump": args.dump, "simulation": simulation}
        rows = list(records(Problem(**asked, seed=args.seed), passes, **options))
        planned |= "missing" not in rows[0]
        if args.json:
            for row in rows:
                print(as_json(row), flush=True)
        else:
            print_table(rows)
        if simulation is not None and is_shown:
            show_steps(
                rows, simulation, None if args.json else print, args.timeline, is_alone=len(every) * len(passes) == 1
            )
    return 0 if planned else 1


def _profile(args: argparse.Namespace, arguments: list[str]) -> int:
    from .inspect import profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints every start and stop
    lengths = [int(text) if text.strip().isdecimal() else 0 for text in args.seq.split(",")]
    if 0 in lengths:
        raise ValueError(f"seq: expected positive numbers of steps, such as 1024,4096; got {args.seq!r}")
    request = profile.Request(
        args.cell, args.hidden, args.batch, min(lengths), args.hidden if args.input is None else args.input,
        args.layers, args.directions, args.dtype, args.backend, args.checkpoint_every, args.device, args.heads,
    )  # fmt: skip
    if args.nvtx:
        profile.Run(request).nvtx()
    if args.trace:
        profile.Run(request).trace(args.trace)
    found = profile.profiles(request, lengths, args.compare)
    if args.json:
        for one in found:
            print(json.dumps(profile.as_dict(one)))
    else:
        print(profile.table(found))
    if args.plot:
        profile.plot(found, args.plot)
    return 0


def _doctor(args: argparse.Namespace, arguments: list[str]) -> int:
    from .inspect.doctor import diagnosis

    for what, found in diagnosis():
        print(f"{what:<20} {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
