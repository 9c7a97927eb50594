"""Tests run as on a machine with a GPU (tests/support/pretend_gpu.py): what is not native fails before there is one."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
# A part of the suite that takes a minute; `python -m pytest -p tests.support.pretend_gpu FILES` takes any files.
PART = {
    "tests/nn/test_bad_input.py": "GRU or float64 or functional or op_checks",
    "tests/nn/test_options.py": "(GRU and resident) or bad_input",
    "tests/nn/test_streaming.py": "GRU and resident",
    "tests/nn/test_checkpoint.py": "plan_says or wrong_values",
    "tests/nn/test_wavefront.py": "never or order_runs",
    "tests/nn/test_modules.py": "GRU and (resident or auto)",
    "tests/nn/test_compile.py": "no_launch and GRU and resident",
    "tests/nn/test_empty_sequences.py": "gru-auto",
    "tests/nn/test_lists.py": "too_many",
    "tests/nn/test_convert.py": "packed or (alone and GRU and auto)",
    "tests/nn/test_torch_inputs.py": "auto and (no_sequence or (own_inputs and GRU and eval))",
    "tests/ops/test_func.py": "no_sequence and GRU",
    "tests/gpu/test_native.py": "budget_of_tf32 or given_no_other",
}


def pretending(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.support.pretend_gpu"]
    command += ["-p", "no:cacheprovider", "-v", "--tb=short", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_tests_are_native():
    """In one process, of which each takes seconds to import torch and its tests."""
    chosen = " or ".join(f"({Path(path).name} and ({part}))" for path, part in PART.items())
    done = pretending("--wide=no", *PART, "-k", chosen)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    for path in PART:
        if path.endswith("torch_inputs.py") and find_spec("expecttest") is None:
            continue  # all of it needs that
        assert re.search(rf"^{path} s*\.", done.stdout, re.MULTILINE), path


NOT_NATIVE = """
import pytest, torch, fastrnn

def layer(where, dtype=torch.float32, backend="resident"):
    return fastrnn.GRU(3, 4, backend=backend, device=where, dtype=dtype)

def test_native():
    x = torch.randn(5, 2, 3, device="cuda", requires_grad=True)
    module = layer("cuda")
    module(x)[0].sum().backward()
    assert x.grad.is_cuda and module.weight_hh_l0.grad.is_cuda
    truth = fastrnn.revert(module)(x)[0]
    torch.testing.assert_close(layer_of(module)(x)[0], truth)

def layer_of(module):
    return fastrnn.convert(module, backend="resident")

def test_cpu_tensors_to_a_kernel():
    layer("cpu")(torch.randn(5, 2, 3))

def test_devices_mixed():
    torch.randn(5, 3, device="cuda") + torch.randn(5, 3)

def test_a_state_on_the_cpu():
    layer("cuda")(torch.randn(5, 2, 3, device="cuda"), torch.zeros(1, 2, 4))

def test_values_without_copying():
    torch.randn(5, device="cuda").numpy()

def test_no_kernel_for_float64():
    layer("cuda", torch.float64, "auto")(torch.randn(5, 2, 3, device="cuda", dtype=torch.float64))
"""
FAILS = {
    "cpu_tensors_to_a_kernel": "a kernel for cpu tensors is missing",
    "devices_mixed": "Expected all tensors to be on the same device",
    "a_state_on_the_cpu": "not at the same device",
    "values_without_copying": "to numpy",
    "no_kernel_for_float64": "FallbackWarning",
}


def test_what_is_not_native_is_noticed(tmp_path):
    path = tmp_path / "test_not_native.py"
    path.write_text(NOT_NATIVE)
    done = pretending(str(path))
    assert re.search(r"^=+ 5 failed, 1 passed", done.stdout, re.MULTILINE), done.stdout + done.stderr
    for name, text in FAILS.items():
        of_test = done.stdout.split(f"_ test_{name} _")[1].split("\n____")[0]
        assert text in of_test, of_test
