"""The table *host*: rivals' wrappers run as ours does, no kernel is compiled, and ratios are of others to ours."""

import json

import pytest

from bench import host_table
from bench.host_table import BASELINE, LIBRARIES, OURS

from ..project.test_packaging import commands
from ..support import children

FLASHRNN = "FlashRNN, triton_fused"
# A library that launches an autotuned kernel, with what reaches the driver: it is found as FlashRNN is.
RIVAL = """
import torch, triton
import triton.language as tl

@triton.autotune([triton.Config({"SIZE": size}) for size in (16, 32)], key=["T"])
@triton.jit
def copied(x_ptr, y_ptr, T, SIZE: tl.constexpr):
    y_ptr.does_not_compile()

class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.empty_like(x)
        with torch.cuda.device(x.device):
            copied[lambda meta: (triton.cdiv(x.shape[1], meta["SIZE"]),)](x, y, x.shape[1])
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy

def flashrnn(Wx, R, b, function, backend, dtype):
    assert backend == "triton_fused" and dtype == "float32"
    B, T, G, N, H = Wx.shape
    return (Function.apply(Wx + R.sum() + b.sum())[:, :, 0][None], None)
"""
NOT_INSTALLED = "raise ImportError('no flashrnn')"
TABLE = "from bench import host_table\nhost_table.main(['--rounds', '5', '--out', sys.path[0]])"
COMPILED = f"""
from unittest import mock
from bench import host_table
from triton.runtime.jit import JITFunction
with mock.patch.object(host_table, "_not_compiled", JITFunction._do_compile):
    {TABLE.splitlines()[1]}
"""


@pytest.fixture
def table(tmp_path):
    """Records of the table, with a FlashRNN of this text."""

    def run(rival: str, script: str = TABLE) -> dict[tuple[str, str, str], dict]:
        (tmp_path / "flashrnn.py").write_text(rival)
        (tmp_path / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{script}")
        done = children.run([str(tmp_path / "script.py")], errors=False)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "stage-host.json").read_text())["records"]
        return {(record["cell"], record["pass"], record["library"]): record for record in found}

    return run


def test_every_library_has_its_rows(table):
    found = table(RIVAL)
    assert len(found) == 2 * 2 * len(LIBRARIES)
    for cell in ("lstm", "gru"):
        for which, launches in (("forward", 1), ("forward+backward", 2)):
            ours = found[cell, which, OURS]
            assert ours["launches"] == launches and ours["times ours"] == "1.00 (1.00 to 1.00)" and ours["us"] > 0
            assert found[cell, which, BASELINE]["launches"] == 0
    rival = found["lstm", "forward", FLASHRNN]
    assert rival["launches"] == 1 and rival["us"] > 0  # not compiled, tuned, launched
    assert "no GRU" in found["gru", "forward", FLASHRNN]["note"]


def test_what_is_not_installed_is_said(table):
    found = table(NOT_INSTALLED)
    assert found["lstm", "forward", FLASHRNN]["note"] == "not installed: no flashrnn"
    assert found["lstm", "forward", OURS]["us"] > 0


def test_a_kernel_that_is_compiled_is_noticed(table):
    """The rival's has an error that only a compiler finds."""
    assert "CompilationError" in table(RIVAL, COMPILED)["lstm", "forward", FLASHRNN]["note"]


def test_ratios_are_of_others_to_ours():
    assert host_table.times_ours([4.0, 6.0, 8.0], [2.0, 2.0, 2.0]) == "3.00 (2.50 to 3.50)"


def test_ratios_the_other_way_are_noticed(mutate):
    mutate({"bench.host_table.times_ours": ("other / ours for", "ours / other for")})
    with pytest.raises(AssertionError):
        test_ratios_are_of_others_to_ours()


def test_make_bench_makes_it():
    made = commands("bench", "VENV=no")
    assert made.count("-m bench.host_table --out=bench/results/cpu-") == 1
    assert made.index("bench.host_table") < made.index("bench.report")
