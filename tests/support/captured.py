"""What a CUDA graph would hold of a call, on a driver that launches nothing: launches, and torch's operators.

python -m tests.support.captured [--broken NAME] CASE...      a JSON object a case
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.runtime import driver

import fastrnn
from bench import host_cost
from fastrnn.compat import launcher
from fastrnn.kernels.arguments import Exchange
from fastrnn.ops import launch
from fastrnn.ops.prepared import Kernels

STREAM = 4321  # of which the capture is
T, B, I = 4, 2, 3


def not_looked_at(*arguments: object) -> None:
    """Values of lengths, which are looked at on a CPU, a GPU asserts by itself (torch._assert_async)."""


CASES = {
    "resident": ("LSTM", 20, {"num_layers": 2, "bidirectional": True}, {}),
    "cooperative": ("GRU", 264, {}, {}),
    "cluster": ("LSTM", 128, {"dtype": torch.bfloat16}, {}),
    "projected": ("LSTM", 20, {"proj_size": 5}, {}),
    "lengths": ("GRU", 20, {}, {"lengths": torch.tensor([4, 2])}),
    "resets": ("LSTM", 20, {}, {"reset": torch.rand(T, B) < 0.5, "reset_state": (torch.zeros(1, 1, 20),) * 2}),
    "checkpoints": ("GRU", 20, {"checkpoint_every": 2}, {}),
}


def told(argument: object) -> object:
    """What of an argument a replay would repeat: sizes, constants, and what kind of memory a pointer is to."""
    if isinstance(argument, Tensor):
        return ["pointer", str(argument.dtype), list(argument.shape), argument.data_ptr() % 16]
    if isinstance(argument, tuple):
        return [told(member) for member in argument]
    return argument if isinstance(argument, int) else str(type(argument))


def polled(states: Tensor) -> bool:
    return not states.is_floating_point()


@contextlib.contextmanager
def launches() -> Iterator[list]:
    """Each launch; after it counters and slots of an exchange are as a kernel leaves them: not as it finds them."""
    found: list = []

    def launched(self, x, y, z, stream, function, *arguments):
        exchanges = [group for group in arguments if isinstance(group, Exchange)]
        counters = [group.counters.numpy() for group in exchanges]
        slots = [group.states.numpy() for group in exchanges if group.states is not None and polled(group.states)]
        zero = all(not values.any() for values in counters) and all((values == -1).any() for values in slots)
        found.append([[x, y, z], stream, zero, told(arguments)])
        for values in (*counters, *slots):
            values[...] = 77

    with (
        mock.patch.object(host_cost.Launcher, "__call__", launched),
        mock.patch.object(driver.active, "get_current_stream", lambda device: STREAM),
    ):
        yield found


def call(module, x: Tensor, options: dict) -> None:
    """A training step."""
    output, final = module(x, **options)
    results = (output, *(final if isinstance(final, tuple) else (final,)))
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    module.zero_grad(set_to_none=True)


def ran(case: str) -> dict:
    name, H, of_module, options = CASES[case]
    of_module = {"backend": case if case in ("cooperative", "cluster") else "resident"} | of_module
    module = getattr(fastrnn, name)(I, H, **of_module)
    x = torch.randn(T, B, I, dtype=module.weight_hh_l0.dtype)
    with (
        mock.patch("fastrnn.nn.options._on_host", lambda tensor: False),
        mock.patch("fastrnn.nn.options._check_values", not_looked_at),
    ):
        with launches():
            call(module, x, options)  # compiles
        found = []
        for _ in range(2):
            # acc_events: see fastrnn/inspect/memory.py
            with launches() as own, profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
                call(module, x, options)
            operators = sorted((e.key, e.count) for e in profiled.key_averages() if e.key.startswith("aten::"))
            found.append((own, operators))
    (first, operators), (second, others) = found
    return {
        "case": case,
        "launches": len(first),
        "same": first == second and operators == others,
        "stream": all(stream == STREAM for _, stream, *_ in first + second),
        "counters_zero": all(zero for _, _, zero, _ in first + second),
        "operators": [name.removeprefix("aten::") for name, _ in operators],
    }


def kept_counters():
    """Counters and slots made once, and not set inside of a call."""
    kept, made = {}, Kernels._exchange

    def exchange(self, which, T, like):
        return kept.setdefault(which, made(self, which, T, like))

    return mock.patch.object(Kernels, "_exchange", exchange)


def twice_at_times():
    """A launch more at every second call."""
    forward, count = launch.launch_forward, 0

    def run(*arguments):
        nonlocal count
        count += 1
        for _ in range(1 + count % 2):
            forward(*arguments)

    return mock.patch.object(launch, "launch_forward", run)


def asking_the_device():
    forward = launch.launch_forward

    def run(prepared, inputs, *others):
        inputs.x_gates.sum().item()
        forward(prepared, inputs, *others)

    return mock.patch.object(launch, "launch_forward", run)


def on_another_stream():
    def run(self, grid, arguments):
        self.run(*(*grid, 1, 1)[:3], 0, self.function, self.metadata, None, None, None, *arguments)

    return mock.patch.object(launcher.Ready, "launch", run)


BROKEN = {
    "counters": kept_counters,
    "launches": twice_at_times,
    "waiting": asking_the_device,
    "stream": on_another_stream,
}


def main(*names: str) -> None:
    broken = contextlib.nullcontext
    if names[0] == "--broken":
        broken, names = BROKEN[names[1]], names[2:]
    with host_cost.launching_nothing(), broken():
        for name in names:
            print(json.dumps(ran(name)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
