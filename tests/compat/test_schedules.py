"""The cooperative kernels under many seeded schedules: no race, no deadlock, and bitwise the same result in each.

All programs are alive; the schedule picks who runs at every atomic, load and store of shared state. A cell and pass
runs under 20, and under 200 with --wide=yes; `--schedules N` sets how many it is at most.
"""

import dataclasses
import functools
import random

import pytest
import torch

from fastrnn import reference
from fastrnn.compat import interpreter
from fastrnn.ops import library, recurrence
from fastrnn.ops.schema import Args, BackwardArgs
from fastrnn.planning.planner import plan

from ..support import heads
from ..support.cases import CELLS, Case, make_problem, over_budget
from ..support.race import Race, RaceDetector
from ..support.width import wide

pytestmark = pytest.mark.skipif(
    not interpreter.ENABLED, reason="schedules are the interpreter's: set TRITON_INTERPRET=1"
)


@pytest.fixture
def scheduled(monkeypatch):
    """scheduled(seed): the next cooperative launches run under that schedule, watched for races."""
    from fastrnn.compat import concurrent_interpreter

    launch = concurrent_interpreter.launch

    def seed_launches(seed: int) -> None:
        choices = random.Random(seed)

        def watched_launch(kernel, grid, *args, **kwargs):
            groups = dict(zip(kernel.arg_names, args))  # noqa: B905
            # What one program writes and another reads.
            grads, exchange = groups.get("grads"), groups["exchange"]
            shared = (exchange.states,) if grads is None else (grads.d_x_gates, grads.d_rec_last)
            tensors = [tensor for tensor in shared if tensor is not None]
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
    x_gates, W_hh, b_hh, *states = small(cell).inputs
    return of_both(Args(x_gates, W_hh, b_hh, reference.stacked(*states), cell, True, "cooperative"))


def of_both(args: Args):
    forward = functools.partial(library._recurrence, *args)
    y, finals, saved, steps = forward()
    upstream = torch.randn_like(y), torch.randn_like(finals), None
    same = args.W_hh, args.state_0, y, saved, steps, args.cell, False, False, "cooperative"
    backward = functools.partial(library._recurrence_backward, *BackwardArgs(*upstream, *same, heads=args.heads))
    return {"forward": forward, "backward": backward}


def passes_in_heads(cell: str):
    """Two programs for each of three heads, a group each."""
    tensors, _ = heads.arguments(cell, "plain", Case(T=2, B=1, H=34 * heads.HEADS, D=1), "cpu", torch.float32)
    return of_both(Args(**tensors, cell=cell, save=True, backend="cooperative", heads=heads.HEADS))


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


@pytest.mark.parametrize("which", ("forward", "backward"))
@pytest.mark.parametrize("cell", CELLS)
def test_heads_wait_for_none_but_their_own(cell, which, scheduled):
    run = passes_in_heads(cell)[which]
    expected = run()
    for seed in range(5):
        scheduled(seed)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b), f"schedule {seed}"


@pytest.mark.parametrize("cell", CELLS)
def test_schedules_stay_in_the_budget(cell, scheduled):
    for case in (Case(T=1, B=3, H=34, D=2), Case(T=3, B=17, H=34, D=1)):
        scheduled(0)
        problem = make_problem(cell, case, torch.bfloat16, "cpu")
        assert not over_budget(problem, functools.partial(recurrence, backend="cooperative"))


ARRIVE = "    arrive(group.counter)\n"
RECEIVE = "    meet(group, step + 1, F)\n"  # h of the step before; publish hands on that of the next
MEET, RECEIVED, PUBLISH, ANNOUNCE = (f"kernels.exchange.{name}" for name in ("meet", "receive", "publish", "announce"))
NO_WAIT = {MEET: ("wait(group.counter, times * group.programs, F.SPIN_ON_LOAD)", "pass")}
NO_ARRIVAL = {PUBLISH: ("arrive(group.counter)", "pass"), ANNOUNCE: ("arrive(held.group.counter)", "pass")}
LOW, HIGH = ({MEET: ("times * group.programs", f"times * group.programs {off} 1")} for off in "-+")
LATE = {RECEIVED: (RECEIVE, ""), PUBLISH: ("    tl.store(", "    meet(group, step, F)\n    tl.store(")}

# What is broken: in each function a text and what takes its place, in which pass it must be caught, and as what.
MUTATIONS = {
    "barrier removed": (NO_WAIT | NO_ARRIVAL, "both", Race),
    "wait removed": (NO_WAIT, "both", Race),
    "arrival removed": (NO_ARRIVAL, "both", RuntimeError),
    "arrival before the store": ({PUBLISH: ("    tl.store(", ARRIVE + "    tl.store(")}, "forward", Race),
    "target one too low": (LOW, "both", Race),
    "target one too high": (HIGH, "both", RuntimeError),
    "groups share a counter": ({"kernels.exchange.counter_of": ("* COUNTER_STRIDE", "* 0")}, "both", Race),
    "release made relaxed": ({"kernels.barrier.arrive": ('sem="release"', 'sem="relaxed"')}, "both", Race),
    "acquire made relaxed": ({"kernels.barrier.wait": ('sem="acquire"', 'sem="relaxed"')}, "both", Race),
    "state loaded before the barrier": (LATE, "forward", Race),
    "d_gates read a step early": (
        {"kernels.tile.cooperative.d_hidden": ("meet(group, back + 1, F)", "meet(group, back, F)")}, "backward", Race),
    "one buffer for even and odd steps": (
        {RECEIVED: ("(step % 2) * group.buffer", "0"), PUBLISH: ("(step % 2) * group.buffer", "0")}, "forward", Race),
}  # fmt: skip


@pytest.mark.parametrize("cell", ("lstm", "gru"))
@pytest.mark.parametrize("name", MUTATIONS)
def test_every_broken_protocol_is_caught(name, cell, scheduled, mutate):
    catch(name, passes(cell), scheduled, mutate)


@pytest.mark.parametrize("name", ("groups share a counter", "wait removed"))
def test_a_protocol_that_is_broken_in_heads_is_caught(name, scheduled, mutate):
    catch(name, passes_in_heads("slstm"), scheduled, mutate)


def catch(name: str, runs: dict, scheduled, mutate) -> None:
    changes, where, kind = MUTATIONS[name]
    mutate(changes)
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
    from fastrnn.planning import planner

    run = passes(cell)
    expected = {which: run[which]() for which in run}
    planned = planner.kernel_for
    monkeypatch.setattr(planner, "kernel_for", lambda *args: spinning(planned(*args)))
    for which in run:
        for seed in range(5):
            scheduled(seed)
            for a, b in zip(run[which](), expected[which], strict=True):
                assert torch.equal(a, b)


def spinning(kernel):
    return dataclasses.replace(kernel, form={**kernel.form, "SPIN_ON_LOAD": True})
