"""Options of the benchmarks, what is recorded beside the times, and what was left out, with the reason."""
# ruff: noqa: E402 - torch, once imported, leaves this thread one core

import json
import os
import time
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))
os.environ.setdefault("OMP_PROC_BIND", "true")  # each thread stays on its core

import pytest
import torch

from . import clock

# fp32 products in full precision everywhere: implementations are compared at the same error.
torch.backends.cudnn.rnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"

STARTED = time.monotonic()


def pytest_addoption(parser):
    group = parser.getgroup("speed")
    group.addoption("--out", type=Path, help="folder for notes.json: what was left out, and ratios")
    group.addoption("--seconds", type=float, default=0.15, help="for the rounds of one measurement")
    group.addoption("--limit", type=float, default=float("inf"), help="seconds after which the rest is left out")
    group.addoption("--threads", type=int, help="of torch on a CPU (default: one for each core)")
    group.addoption("--only", nargs="*", help="groups of the table")


def pytest_configure(config):
    config.notes = {"left_out": {}, "auto_over_torch": {}}
    config.begun = set()
    clock.pin_threads(CORES[: config.getoption("--threads")])


def pytest_collection_modifyitems(config, items):
    if only := config.getoption("--only"):
        unwanted = [item for item in items if item.callspec.params["workload"].group not in only]
        items[:] = [item for item in items if item not in unwanted]
        config.hook.pytest_deselected(items=unwanted)


def pytest_collection_finish(session):
    """Which implementations of each pass of a workload are to take turns: those that were asked for."""
    names = session.config.names = {}
    for item in session.items:
        if item.originalname == "test_speed":
            params = item.callspec.params
            names.setdefault((params["workload"], params["which"]), []).append(params["name"])


def pytest_runtest_setup(item):
    params = item.callspec.params
    turns = params["workload"], params.get("which")
    if turns in item.config.begun:
        return  # it was timed with the first of them
    if time.monotonic() - STARTED > item.config.getoption("--limit"):
        pytest.skip("no time left (--limit)")
    if "which" in params:
        item.config.begun.add(turns)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if item.originalname == "test_speed" and not report.passed:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(call.excinfo.value)
        item.config.notes["left_out"][item.name] = text.removeprefix("Skipped: ")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["bench"] = clock.machine()


def pytest_sessionfinish(session):
    if out := session.config.getoption("--out"):
        out.mkdir(parents=True, exist_ok=True)
        notes = session.config.notes | {"clocks_after": clock.clocks()}
        (out / "notes.json").write_text(json.dumps(notes, indent=1))
