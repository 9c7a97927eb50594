"""The cooperative kernels under many seeded schedules: no race, no deadlock, and bitwise the same result in each.

All programs are alive; the schedule picks who runs at every atomic, load and store of shared state. A cell and pass
runs under 20, and under 200 with --wide=yes; `--schedules N` sets how many it is at most.
"""

import functools
import random

import pytest
import torch

from fastrnn import ops
from fastrnn.compat import interpreter
from fastrnn.ops import recurrence
from fastrnn.planning.planner import plan

from ..support.cases import CELLS, Case, make_problem, over_budget
from ..support.race import Race, RaceDetector
from ..support.width import wide

pytestmark = pytest.mark.skipif(
    not interpreter.ENABLED, reason="schedules are the interpreter's: set TRITON_INTERPRET=1"
)

SHARED = {"exchanged_ptr", "d_x_gates_ptr", "d_rec_last_ptr"}  # what one program writes and another reads


@pytest.fixture
def scheduled(monkeypatch):
    """scheduled(seed): the next cooperative launches run under that schedule, watched for races."""
    from fastrnn.compat import concurrent_interpreter

    launch = concurrent_interpreter.launch

    def seed_launches(seed: int) -> None:
        choices = random.Random(seed)

        def watched_launch(kernel, grid, *args, **kwargs):
            tensors = [a for name, a in zip(kernel.arg_names, args) if name in SHARED and a is not None]  # noqa: B905
            launch(
                kernel,
                grid,
                *args,
                choose=lambda alive, last: choices.choice(alive),
                watch=RaceDetector(tensors).watch,
                **kwargs,
            )

        monkeypatch.setattr(concurrent_interpreter, "launch", watched_launch)

    return seed_launches


def small(cell: str):
    """Two programs in each of two groups: the least that can race within a group and between groups."""
    case = Case(T=2, B=1, H=34, D=2)
    kernel = plan(
        cell, hidden_size=case.H, batch_size=case.B, directions=case.D, device="cpu", backend="cooperative"
    ).kernel
    assert kernel is not None and kernel.grid == (2, 1, 2)
    return make_problem(cell, case, torch.float32, "cpu")


def passes(cell: str):
    """Run forward alone, and backward alone on what a forward kept: (name, run) with run() giving its outputs."""
    problem = small(cell)
    x_gates, W_hh, b_hh, h_0, c_0 = problem.inputs
    forward = functools.partial(ops.library._recurrence, x_gates, W_hh, b_hh, h_0, c_0, cell, True, "cooperative")
    y, _, _, saved, c = forward()
    backward = functools.partial(
        ops.library._recurrence_backward,
        *problem.upstream,
        None,
        W_hh,
        h_0,
        c_0,
        y,
        saved,
        c,
        cell,
        False,
        False,
        "cooperative",
    )
    return {"forward": forward, "backward": backward}


@pytest.mark.parametrize("seeds", (range(20), wide(range(20, 200))), ids=("20", "200"))
@pytest.mark.parametrize("which", ("forward", "backward"))
@pytest.mark.parametrize("cell", CELLS)
def test_every_schedule_gives_the_same_bits(cell, which, seeds, scheduled, request):
    run = passes(cell)[which]
    expected = run()
    for seed in seeds:
        if seed >= request.config.getoption("--schedules"):
            break
        scheduled(seed)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b), f"schedule {seed}"


@pytest.mark.parametrize("cell", CELLS)
def test_schedules_stay_in_the_budget(cell, scheduled):
    for case in (Case(T=1, B=3, H=34, D=2), Case(T=3, B=17, H=34, D=1)):
        scheduled(0)
        problem = make_problem(cell, case, torch.bfloat16, "cpu")
        assert not over_budget(problem, functools.partial(recurrence, backend="cooperative"))


BARRIER, EXCHANGE, COOPERATIVE, LAUNCH = (
    "kernels/barrier.py", "kernels/exchange.py", "kernels/tile/cooperative.py", "fastrnn/ops/launch.py"
)  # fmt: skip
STORE = "    tl.store(group.exchanged + (step % 2) * group.buffer + at, h, mask=units.mask)\n"
ARRIVE = "    arrive(group.counter)\n"
RECEIVE = "    meet(group, step + 1, F)\n"  # h of the step before; publish hands on that of the next

LATE = {RECEIVE: "", STORE: f"    meet(group, step, F)\n{STORE}"}
NO_WAIT = {"wait(group.counter, times * group.programs, F.SPIN_ON_LOAD)": "pass"}
NO_ARRIVAL = {"arrive(group.counter)": "pass", "arrive(held.group.counter)": "pass"}
LOW, HIGH = ({"times * group.programs": f"times * group.programs {off} 1"} for off in "-+")

# What is broken: where, the texts and what takes their place, in which pass it must be caught, and as what.
MUTATIONS = {
    "barrier removed": (EXCHANGE, NO_WAIT | NO_ARRIVAL, "both", Race),
    "wait removed": (EXCHANGE, NO_WAIT, "both", Race),
    "arrival removed": (EXCHANGE, NO_ARRIVAL, "both", RuntimeError),
    "arrival before the store": (EXCHANGE, {STORE + ARRIVE: ARRIVE + STORE}, "forward", Race),
    "target one too low": (EXCHANGE, LOW, "both", Race),
    "target one too high": (EXCHANGE, HIGH, "both", RuntimeError),
    "groups share a counter": (LAUNCH, {"counters.stride(0)": "0"}, "both", Race),
    "release made relaxed": (BARRIER, {'sem="release"': 'sem="relaxed"'}, "both", Race),
    "acquire made relaxed": (BARRIER, {'sem="acquire"': 'sem="relaxed"'}, "both", Race),
    "state loaded before the barrier": (EXCHANGE, LATE, "forward", Race),
    "d_gates read a step early": (COOPERATIVE, {"meet(group, back + 1, F)": "meet(group, back, F)"}, "backward", Race),
    "one buffer for even and odd steps": (
        EXCHANGE, {"(step % 2) * group.buffer": "0"}, "forward", Race),
}  # fmt: skip


@pytest.mark.parametrize("cell", ("lstm", "gru"))
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_broken_protocol_is_caught(name, cell, scheduled, mutate):
    path, texts, where, kind = MUTATIONS[name]
    runs = passes(cell)
    mutate(path, texts)
    for which in ("forward", "backward") if where == "both" else (where,):
        caught = None
        for seed in range(20):
            scheduled(seed)
            try:
                runs[which]()
            except Exception as error:
                caught = error
                break
        assert caught is not None, f"{which}: nothing noticed in 20 schedules"
        text = str(caught)
        if kind is Race:
            assert "race: " in text and text.count(".py:") >= 2, text
        else:
            assert "deadlock: all of" in text, text


@pytest.mark.parametrize("cell", CELLS)
def test_the_form_that_spins_on_a_load(cell, scheduled, monkeypatch):
    """AMD's form of the wait, under the same schedules."""
    from fastrnn.ops import launch

    run = passes(cell)
    expected = {which: run[which]() for which in run}
    planned = launch.plan
    monkeypatch.setattr(launch, "plan", lambda *args, **kwargs: spinning(planned(*args, **kwargs)))
    for which in run:
        for seed in range(5):
            scheduled(seed)
            for a, b in zip(run[which](), expected[which], strict=True):
                assert torch.equal(a, b)


def spinning(chosen):
    import dataclasses

    return dataclasses.replace(chosen, kernel=dataclasses.replace(chosen.kernel, spin_on_load=True))
