"""The persistent kernels against the fp64 reference at sizes that hypothesis chooses."""

import pytest
import torch

from ..support.cases import CELLS, DTYPES, Case, make_problem, over_budget

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    cell=st.sampled_from(CELLS),
    case=st.builds(Case, T=st.integers(1, 5), B=st.integers(1, 34), H=st.integers(1, 40), D=st.integers(1, 2)),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_matches_reference_in_any_shape(cell, case, dtype, bias):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert not over_budget(make_problem(cell, case, dtype, device, bias))
