"""The cooperative kernels under many seeded schedules: no race, no deadlock, and bitwise the same result in each.

All programs are alive; the schedule picks who runs at every atomic, load and store of shared state. A cell and pass
runs under 20, and under 200 with --wide=yes; `--schedules N` sets how many it is at most.
"""

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
from ..support.planned import plan_for
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
            grads, states = groups.get("grads"), groups["exchange"].states
            sent = states if states is not None and not states.is_floating_point() else None
            shared = (states,) if grads is None else (grads.d_x_gates, grads.d_rec_last)
            tensors = [tensor for tensor in shared if tensor is not None and tensor is not sent]
            launch(
                kernel,
                grid,
                *args,
                choose=lambda alive, last: choices.choice(alive),
                watch=RaceDetector(tensors, sent).watch,
                **kwargs,
            )

        monkeypatch.setattr(concurrent_interpreter, "launch", watched_launch)

    return seed_launches


@pytest.fixture(params=("polled", "barrier"))
def protocol(request, monkeypatch):
    """Which of both the next cooperative launches go by."""
    if request.param == "barrier":
        plan_for(monkeypatch, ROUND=0)
    return request.param


def small(cell: str):
    """Two programs in each of two groups: the least that can race within a group and between groups.

    Seven steps, so that a slot of those that poll is taken twice.
    """
    case = Case(T=7, B=1, H=34, D=2)
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
    tensors, _ = heads.arguments(cell, "plain", Case(T=5, B=1, H=34 * heads.HEADS, D=1), "cpu", torch.float32)
    return of_both(Args(**tensors, cell=cell, save=True, backend="cooperative", heads=heads.HEADS))


@pytest.mark.parametrize("seeds", (range(20), wide(range(20, 200))), ids=("20", "200"))
@pytest.mark.parametrize("which", ("forward", "backward"))
@pytest.mark.parametrize("cell", CELLS)
def test_every_schedule_gives_the_same_bits(cell, which, seeds, protocol, scheduled, request):
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
def test_heads_wait_for_none_but_their_own(cell, which, protocol, scheduled):
    run = passes_in_heads(cell)[which]
    expected = run()
    for seed in range(5):
        scheduled(seed)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b), f"schedule {seed}"


@pytest.mark.parametrize("cell", CELLS)
def test_schedules_stay_in_the_budget(cell, protocol, scheduled):
    for case in (Case(T=1, B=3, H=34, D=2), Case(T=5, B=17, H=34, D=1)):
        scheduled(0)
        problem = make_problem(cell, case, torch.bfloat16, "cpu")
        assert not over_budget(problem, functools.partial(recurrence, backend="cooperative"))


ARRIVE = "        arrive(group.counter)\n"
MEET, RECEIVED, PUBLISH, ANNOUNCE, SLOT, BEGIN, SEND, POLL = (
    f"kernels.exchange.{name}"
    for name in ("meet", "receive", "publish", "announce", "slot_of", "begin_step", "send", "poll")
)
STORE = "        tl.store(slot_of"
NO_WAIT = {MEET: ("wait(group.counter, times * group.programs, F.SPIN_ON_LOAD)", "pass")}
NO_ARRIVAL = {PUBLISH: ("arrive(group.counter)", "pass"), ANNOUNCE: ("arrive(held.group.counter)", "pass")}
LOW, HIGH = ({MEET: ("times * group.programs", f"times * group.programs {off} 1")} for off in "-+")
LATE = {RECEIVED: ("meet(held.group, step + 1, F)", "pass"), PUBLISH: (STORE, f"        meet(group, step, F)\n{STORE}")}
RELAXED = {"release": "kernels.barrier.arrive", "acquire": "kernels.barrier.wait"}
SHARED_COUNTER = {"kernels.exchange.counter_of": ("* COUNTER_STRIDE", "* 0")}

# What is broken: in each function a text and what takes its place, in which pass it must be caught, and as what.
OF_BARRIER = {
    "barrier removed": (NO_WAIT | NO_ARRIVAL, "both", Race),
    "wait removed": (NO_WAIT, "both", Race),
    "arrival removed": (NO_ARRIVAL, "both", RuntimeError),
    "arrival before the store": ({PUBLISH: (STORE, ARRIVE + STORE)}, "forward", Race),
    "target one too low": (LOW, "both", Race),
    "target one too high": (HIGH, "both", RuntimeError),
    "groups share a counter": (SHARED_COUNTER, "both", Race),
    "release made relaxed": ({RELAXED["release"]: ('sem="release"', 'sem="relaxed"')}, "both", Race),
    "acquire made relaxed": ({RELAXED["acquire"]: ('sem="acquire"', 'sem="relaxed"')}, "both", Race),
    "state loaded before the barrier": (LATE, "forward", Race),
    "d_gates read a step early": (
        {"kernels.tile.cooperative.d_hidden": ("meet(group, back + 1, F)", "meet(group, back, F)")}, "backward", Race),
    "one buffer for even and odd steps": ({SLOT: ("(step % 2) * group.buffer", "0")}, "forward", Race),
}  # fmt: skip
TAKEN_BACK = "for back in range(F.ROUND):"
OF_POLLED = {
    "read once": ({POLL: ("tl.sum((bits == MISSING).to(tl.int32)) > 0", "False")}, "both", AssertionError),
    "some missing taken for all": ({POLL: ("> 0", "== bits.numel")}, "both", AssertionError),
    "what is not missing polled": ({POLL: ("bits == MISSING", "bits != MISSING")}, "both", RuntimeError),
    "never taken back": ({BEGIN: (TAKEN_BACK, "for back in range(0):")}, "both", Race),
    "one slot not taken back": ({BEGIN: (TAKEN_BACK, "for back in range(F.ROUND - 1):")}, "both", Race),
    "one slot too many taken back": ({BEGIN: (TAKEN_BACK, "for back in range(-1, F.ROUND):")}, "both", Exception),
    "the round taken back that goes on": ({BEGIN: ("step - 1 - back", "step + F.ROUND - 1 - back")}, "both", Exception),
    "slots of one round": ({SLOT: ("2 * F.ROUND", "F.ROUND")}, "both", Race),
    "one slot": ({SLOT: ("(step % (2 * F.ROUND))", "0")}, "both", Race),
    "no meeting": ({BEGIN: ("meet(group, step // F.ROUND, F)", "pass")}, "both", Race),
    "taken back before the meeting": (
        {BEGIN: ("        arrive(group.counter)\n        meet(group, step // F.ROUND, F)\n", "")}, "both", Race),
    "met a step late": ({BEGIN: ("step % F.ROUND == 0", "step % F.ROUND == 1")}, "both", Race),
    "arrival removed": ({BEGIN: ("arrive(group.counter)", "pass")}, "both", RuntimeError),
    "target one too low": (LOW, "both", Race),
    "target one too high": (HIGH, "both", RuntimeError),
    "groups share a counter": (SHARED_COUNTER, "both", Race),
    "release made relaxed": ({RELAXED["release"]: ('sem="release"', 'sem="relaxed"')}, "both", Race),
    "acquire made relaxed": ({RELAXED["acquire"]: ('sem="acquire"', 'sem="relaxed"')}, "both", Race),
    "sent a slot early": ({SEND: ("slot_of(group, step, F)", "slot_of(group, step - 1, F)")}, "both", Exception),
    "read weakly": ({POLL: ("volatile=True", "volatile=False")}, "both", Race),
}  # fmt: skip
MUTATIONS = {("barrier", name): of for name, of in OF_BARRIER.items()}
MUTATIONS |= {("polled", name): of for name, of in OF_POLLED.items()}


@pytest.mark.parametrize("cell", ("lstm", "gru"))
@pytest.mark.parametrize("protocol, name", MUTATIONS, indirect=["protocol"])
def test_every_broken_protocol_is_caught(protocol, name, cell, scheduled, mutate):
    catch(protocol, name, passes(cell), scheduled, mutate)


@pytest.mark.parametrize(
    "protocol, name",
    [("barrier", "groups share a counter"), ("barrier", "wait removed"), ("polled", "groups share a counter")],
    indirect=["protocol"],
)
def test_a_protocol_that_is_broken_in_heads_is_caught(protocol, name, scheduled, mutate):
    catch(protocol, name, passes_in_heads("slstm"), scheduled, mutate)


def catch(protocol: str, name: str, runs: dict, scheduled, mutate) -> None:
    changes, where, kind = MUTATIONS[protocol, name]
    expected = {which: run() for which, run in runs.items()}
    mutate(changes)
    for which in ("forward", "backward") if where == "both" else (where,):
        caught = None
        for seed in range(20):
            scheduled(seed)
            try:
                found = runs[which]()
                assert all(map(torch.equal, found, expected[which])), "other bits"
            except Exception as error:
                caught = error
                break
        assert caught is not None, f"{which}: nothing noticed in 20 schedules"
        text = str(caught)
        if kind is Race:
            assert "race: " in text and text.count(".py:") >= 1 + (name != "read weakly"), text
        elif kind is RuntimeError:
            assert "deadlock: all of" in text, text
        else:
            assert isinstance(caught, kind)


def test_a_nan_of_all_ones_is_sent_as_another(mutate, scheduled):
    """It would be waited for until the end of time."""
    x_gates, W_hh, b_hh, h_0, c_0 = small("lstm").inputs
    h_0 = h_0.clone()
    h_0.view(torch.int32)[0, 0, 0] = -1
    run = of_both(Args(x_gates, W_hh, b_hh, reference.stacked(h_0, c_0), "lstm", True, "cooperative"))["forward"]
    scheduled(0)
    y, *_ = run()
    assert y[:, :, 0].isnan().all() and not y[:, :, 1].isnan().any()
    mutate({SEND: ("tl.where(bits == MISSING, MISSING - 1, bits)", "bits")})
    scheduled(0)
    with pytest.raises(Exception, match="race: write at .* of what another program reads"):  # as if it was taken back
        run()


@pytest.mark.parametrize("cell", CELLS)
def test_the_form_that_spins_on_a_load(cell, protocol, scheduled, monkeypatch):
    """AMD's form of the wait, under the same schedules."""
    run = passes(cell)
    expected = {which: run[which]() for which in run}
    plan_for(monkeypatch, SPIN_ON_LOAD=True)
    for which in run:
        for seed in range(5):
            scheduled(seed)
            for a, b in zip(run[which](), expected[which], strict=True):
                assert torch.equal(a, b)
