"""Approximate activations stay within twice the rounding's own error over time, if the carry gate is kept exact."""

import pytest
import torch

from bench import accuracy


@pytest.mark.parametrize("bias", accuracy.BIASES)
def test_bfloat16_hides_tanh_approx_of_all_gates_but_the_carried(bias):
    errors = accuracy.errors(torch.bfloat16, bias, T=256)
    assert errors["tanh.approx, but f"] <= 2 * errors["exact"]


def test_it_does_not_hide_that_of_the_forget_gate_nor_does_float16():
    errors = accuracy.errors(torch.bfloat16, 8.0, T=256)
    assert errors["tanh.approx"] > 2 * errors["exact"]
    errors = accuracy.errors(torch.float16, 0.0, T=256)
    assert errors["tanh.approx, but f"] > 2 * errors["exact"]
