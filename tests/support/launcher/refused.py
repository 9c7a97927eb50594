"""Run by test_refused.py: call fastrnn.lstm on a GPU that refuses launches, print what comes of it.

python -m tests.support.launcher.refused SCENARIO prints a JSON object a call: what the driver was asked and said, the
warnings, the error, and whether torch's own kernel ran.
"""

import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import fastrnn
from fastrnn.compat import driver as of_fastrnn
from fastrnn.device import DeviceSpec
from fastrnn.nn import calls
from fastrnn.planning import prices
from fastrnn.planning.kernel_plan import KernelPlan, Request
from fastrnn.planning.planner import plan

from .driver import Driver, pretend

GPU = torch.device("cuda", 0)
STEP = prices.step_of
NO_CLUSTER_OF_16 = (8,) * 6  # 48 multiprocessors
SMALL = (8,)


def clusters_first(kernel: KernelPlan, request: Request) -> tuple[float, float, str] | None:
    """Microseconds of a step by which clusters of 16 come before the cooperative tier."""
    found = STEP(kernel, request)
    return None if found is None else (4 * found[0], 4 * found[1], found[2]) if len(kernel.grid) > 2 else found


def call(driver: Driver, backend: str = "auto", H: int = 512, backward: bool = False) -> dict[str, Any]:
    """One call of an LSTM, forward or both passes."""
    torch.manual_seed(0)
    module = torch.nn.LSTM(4, H).bfloat16()
    x = torch.randn(3, 2, 4, dtype=torch.bfloat16, requires_grad=backward)
    driver.launches()
    error, output = None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            output, _ = fastrnn.lstm(x, None, list(module.parameters()), backend=backend)
            if backward:
                driver.set("groups", *NO_CLUSTER_OF_16)
                output.sum().backward()
        except fastrnn.LaunchRefusedError as raised:
            error = f"fastrnn.LaunchRefusedError: {raised}"
        except RuntimeError as raised:
            error = f"{type(raised).__name__}: {raised}"
    launches = [{key: launch[key] for key in ("cluster", "cooperative", "error")} for launch in driver.launches()]
    # A kernel that was launched wrote nothing: only torch's own gives values.
    by_torch = output is not None and torch.equal(output, module(x)[0])
    return {
        "launches": launches,
        "warnings": [str(w.message) for w in caught if issubclass(w.category, fastrnn.FallbackWarning)],
        "error": error,
        "by torch": by_torch,
        "remembered": len(of_fastrnn.refused),
    }


def next_tier(driver: Driver) -> Iterator[dict]:
    driver.set("groups", *NO_CLUSTER_OF_16)
    for H in (512, 512, 500):
        yield call(driver, H=H)


def torchs_own(driver: Driver) -> Iterator[dict]:
    driver.set("groups", *SMALL)
    yield call(driver)
    yield call(driver)


def named(driver: Driver) -> Iterator[dict]:
    driver.set("groups", *SMALL)
    for backend in ("cluster", "cluster", "cooperative", "auto"):
        yield call(driver, backend)


def in_backward(driver: Driver) -> Iterator[dict]:
    yield call(driver, backward=True)
    yield call(driver, backward=True)


def too_much_shared_memory(driver: Driver) -> Iterator[dict]:
    yield call(driver, H=64)


def another_error(driver: Driver) -> Iterator[dict]:
    driver.set("error", 700)
    yield call(driver)


def known_before(driver: Driver) -> Iterator[dict]:
    yield call(driver)


def forgetful(driver: Driver) -> Iterator[dict]:
    driver.set("groups", *NO_CLUSTER_OF_16)
    with mock.patch.object(of_fastrnn, "key", lambda *args: (object(),)):
        yield call(driver)


def compiled(driver: Driver) -> Iterator[dict]:
    """torch.compile traces a plan that asks the driver, and one that leaves out what was refused."""
    spec, sizes = DeviceSpec.of(GPU), {"hidden_size": 512, "batch_size": 2, "dtype": torch.bfloat16}
    with mock.patch.object(torch.cuda, "is_available", lambda: False):  # dynamo would save a generator's state
        for _ in range(2):

            def graph(x: torch.Tensor) -> torch.Tensor:
                clusters = of_fastrnn.clusters_at_once(0, 232448, (8, 16))
                found = dataclasses.replace(spec, clusters=clusters)
                return x + (1 if calls.backend_of(plan("lstm", **sizes, device=found)) == "cluster" else 0)

            yield {"cluster": torch.compile(graph, fullgraph=True, backend="eager")(torch.zeros(1)).item()}
            kernel = plan("lstm", **sizes, device=spec).kernel
            of_fastrnn.refused[of_fastrnn.key("lstm", 512, torch.bfloat16, kernel, spec)] = "it is small"


SCENARIOS = (
    next_tier,
    torchs_own,
    named,
    in_backward,
    too_much_shared_memory,
    another_error,
    known_before,
    forgetful,
    compiled,
)

if __name__ == "__main__":
    driver, scenario = Driver(), {function.__name__: function for function in SCENARIOS}[sys.argv[1]]
    pretend(driver)
    if scenario is known_before:
        driver.set("groups", *NO_CLUSTER_OF_16)
    if scenario is too_much_shared_memory:
        driver.set("shared", 8 << 10)
    # Planned as for an H100 unless the driver is smaller by now; the tensors stay on the CPU.
    spec = DeviceSpec.of(GPU)
    with (
        mock.patch.object(DeviceSpec, "of", lambda _: spec),
        mock.patch.object(prices, "step_of", clusters_first),
        mock.patch.object(calls, "plan", lambda *args, **named: plan(*args, **named | {"device": "cuda:0"})),
    ):
        for record in scenario(driver):
            print(json.dumps(record), flush=True)
