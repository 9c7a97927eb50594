"""The same tests run in Triton's interpreter where there is no GPU, and natively where there is one."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastrnn and triton are imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the tests that compare runs bit by bit


@pytest.fixture(autouse=True)
def _seeded_and_exact():
    """Seed, and fp32 products in full precision, so that a GPU is held to the same error budget as the CPU."""
    torch.manual_seed(0)
    rnn, matmul = torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision, torch.backends.cuda.matmul.fp32_precision = rnn, matmul


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
