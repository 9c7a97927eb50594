"""A kernel launched again goes by what was compiled before, and only where all that it was compiled for is the same."""

import json

import pytest

from ..support import children

# Each line of output: what was launched through Triton's binder, as new or known, in a call of each kind.
SCRIPT = """
import dataclasses, json, sys
from unittest import mock
import torch
from bench import host_cost
from fastrnn.ops import library
from fastrnn.ops.schema import Args
from fastrnn.planning import planner
from triton.runtime.jit import JITFunction

counted, run = [0], JITFunction.run

def binder(self, *args, **kwargs):
    counted[0] += 1
    return run(self, *args, **kwargs)

binder.__module__ = run.__module__

def args(H=32, B=3, dtype=torch.float32, offset=0, bias=True, state=True):
    def make(*shape):
        size = torch.Size(shape).numel()
        return torch.zeros(size + 4, dtype=dtype)[offset : offset + size].view(shape)
    b_hh, state_0 = make(1, 3 * H) if bias else None, make(1, 1, B, H) if state else None
    return Args(make(2, B, 1, 3, H), make(1, 3 * H, H), b_hh, state_0, "gru", False, "resident")

def launches(**kinds):
    before = counted[0]
    library.run(args(**kinds))
    return counted[0] - before

def tuned(request, tier, plain=planner.kernel_for):
    kernel = plain(request, tier)
    return dataclasses.replace(kernel, choices={name: own[::-1] for name, own in kernel.choices.items()})

with host_cost.launching_nothing(), mock.patch.object(JITFunction, "run", binder):
    print(json.dumps(["first", launches()]))
    print(json.dumps(["again", launches()]))
    for kinds in ({"H": 64}, {"dtype": torch.bfloat16}, {"offset": 1}, {"bias": False}, {"state": False}, {"B": 5}):
        print(json.dumps([f"other {kinds}", launches(**kinds)]))
    print(json.dumps(["again", launches()]))
    with mock.patch.object(JITFunction, "run", lambda *args, **kwargs: counted.__setitem__(0, counted[0] + 1)):
        print(json.dumps(["other launcher", launches()]))
    with mock.patch.object(planner, "kernel_for", tuned):
        print(json.dumps(["other forms", launches(B=5)]))
"""


@pytest.fixture
def ran(tmp_path):
    def run(before: str = "") -> list:
        script = tmp_path / "ready.py"
        script.write_text(before + SCRIPT)
        done = children.run([str(script)])
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    return run


def wrong(found: list) -> list:
    """Launches that went by Triton's binder though they were known, or did not though they were not."""
    assert len(found) == 11
    return [what for what, count in found if (count == 0) != (what == "again")]


def test_only_a_launch_like_one_before_skips_the_binder(ran):
    assert not wrong(ran())


@pytest.mark.parametrize(
    ("forgotten", "noticed"),
    (
        (
            "prepared._pointers = lambda groups: ()",
            ["other {'offset': 1}", "other {'bias': False}", "other {'state': False}"],
        ),
        ("prepared._planned_by = lambda request: ()", ["other forms"]),
        ("launcher.ordinary = lambda: True", ["other launcher"]),
    ),
)
def test_what_is_forgotten_is_noticed(ran, forgotten, noticed):
    found = wrong(ran(f"from fastrnn.compat import launcher\nfrom fastrnn.ops import prepared\n{forgotten}\n"))
    assert found == noticed
