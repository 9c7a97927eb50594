"""Wrong arguments: torch.nn's own error types and texts on every backend, and ours where torch.nn has none."""

import re

import pytest
import torch

import fastrnn

ZEROS = torch.zeros


def state(name: str, *shape: int, **kwargs):
    h = ZEROS(shape, **kwargs)
    return (h, h) if name == "LSTM" else h


# Calls of a module with input size 3, hidden size 4 and 2 layers that torch.nn refuses.
CALLS = {
    "rank-4 input": lambda n: (ZEROS(1, 5, 2, 3),),
    "rank-1 input": lambda n: (ZEROS(3),),
    "wrong input size": lambda n: (ZEROS(5, 2, 7),),
    "wrong input size, unbatched": lambda n: (ZEROS(5, 7),),
    "wrong dtype": lambda n: (ZEROS(5, 2, 3, dtype=torch.float64),),
    "integer input": lambda n: (ZEROS(5, 2, 3, dtype=torch.long),),
    "no time steps": lambda n: (ZEROS(0, 2, 3),),
    "state of another batch": lambda n: (ZEROS(5, 2, 3), state(n, 2, 9, 4)),
    "state of another size": lambda n: (ZEROS(5, 2, 3), state(n, 2, 2, 5)),
    "state of too few layers": lambda n: (ZEROS(5, 2, 3), state(n, 1, 2, 4)),
    "rank-2 state of a batch": lambda n: (ZEROS(5, 2, 3), state(n, 2, 4)),
    "rank-3 state without a batch": lambda n: (ZEROS(5, 3), state(n, 2, 1, 4)),
    "input on another device": lambda n: (ZEROS(5, 2, 3, device="meta"),),
    "state on another device": lambda n: (ZEROS(5, 2, 3), state(n, 2, 2, 4, device="meta")),
}


@pytest.mark.parametrize("backend", ("auto", "torch", "reference", "resident", "cooperative"))
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ("RNN", "GRU", "LSTM"))
def test_wrong_calls_fail_as_in_torch_nn(name, call, backend):
    arguments = CALLS[call](name)
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn, name)(3, 4, num_layers=2)(*arguments)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        getattr(fastrnn, name)(3, 4, num_layers=2, backend=backend)(*arguments)


CONSTRUCTORS = {
    "no hidden units": ((3, 0), {}),
    "no input": ((0, 4), {}),
    "no layers": ((3, 4), {"num_layers": 0}),
    "hidden size no int": ((3, 4.0), {}),
    "bias no bool": ((3, 4), {"bias": 1}),
    "dropout above 1": ((3, 4), {"dropout": 1.5}),
    "proj_size": ((3, 4), {"proj_size": 4}),
    "nonlinearity": ((3, 4), {"nonlinearity": "sin"}),
    "no such argument": ((3, 4), {"hidden": 4}),
}


@pytest.mark.parametrize("arguments", CONSTRUCTORS)
@pytest.mark.parametrize("name", ("RNN", "GRU", "LSTM"))
def test_wrong_constructors_fail_as_in_torch_nn(name, arguments):
    args, kwargs = CONSTRUCTORS[arguments]
    with pytest.raises(Exception) as theirs:
        getattr(torch.nn, name)(*args, **kwargs)
    with pytest.raises(theirs.type) as ours:
        getattr(fastrnn, name)(*args, **kwargs)
    assert str(ours.value).replace("_Recurrent", "RNNBase") == str(theirs.value)


@pytest.mark.parametrize("name", ("RNN", "GRU", "LSTM"))
def test_unknown_backend(name):
    with pytest.raises(
        ValueError,
        match="backend: expected one of 'auto', 'torch', .*'resident', 'cluster', 'cooperative', 'cpu'; got 'tpu'",
    ):
        getattr(fastrnn, name)(3, 4, backend="tpu")


def test_state_of_another_dtype():
    """torch on CUDA says this; on the CPU its text depends on the kernel that trips over it."""
    for backend in ("reference", "resident"):
        with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype, found input tensor"):
            fastrnn.GRU(3, 4, backend=backend)(ZEROS(5, 2, 3), ZEROS(1, 2, 4, dtype=torch.float64))


def test_float64_has_no_kernel(device):
    module = fastrnn.GRU(3, 4, backend="resident", dtype=torch.float64, device=device)
    x = ZEROS(5, 2, 3, dtype=torch.float64, device=device)
    with pytest.raises(NotImplementedError, match="a kernel for torch.float64 is missing"):
        module(x)
    module.backend = "reference"
    assert module(x)[0].dtype == torch.float64


@pytest.mark.parametrize("backend", ("torch", "reference", "resident"))
def test_functional_checks_its_parameters(backend):
    params = list(torch.nn.LSTM(3, 4).parameters())
    x = ZEROS(5, 2, 3)
    with pytest.raises(ValueError, match=r"params: expected 1 layers x 1 directions x 4 tensors, 4 in all; got 3"):
        fastrnn.lstm(x, None, params[:3], backend=backend)
    with pytest.raises(ValueError, match=r"params: .* 8 in all; got 4"):
        fastrnn.lstm(x, None, params, num_layers=2, backend=backend)
    with pytest.raises(ValueError, match=r"params\[0\] \(weight_ih_l0\): expected \(12, 3\), got \(16, 3\)"):
        fastrnn.gru(x, None, params, backend=backend)
    with pytest.raises(ValueError, match=r"params\[3\] \(bias_hh_l0\): expected \(16,\), got \(15,\)"):
        fastrnn.lstm(x, None, [*params[:3], params[3][1:]], backend=backend)
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not the same dtype"):
        fastrnn.lstm(x, None, [params[0], params[1].double(), *params[2:]], backend=backend)
    with pytest.raises(RuntimeError, match="input must have 3 dimensions, got 2"):
        fastrnn.lstm(x[0], None, params, backend=backend)
    with pytest.raises(ValueError, match="Unknown nonlinearity 'sin'"):
        fastrnn.rnn(x, None, params, nonlinearity="sin", backend=backend)
    with pytest.raises(ValueError, match="backend: expected one of"):
        fastrnn.lstm(x, None, params, backend="tpu")


def test_the_op_checks_its_arguments(device):
    from fastrnn.ops import recurrence

    def call(cell="gru", **replaced):
        tensors = {
            "x_gates": ZEROS(5, 2, 1, 3, 4),
            "W_hh": ZEROS(1, 12, 4),
            "b_hh": ZEROS(1, 12),
            "h_0": ZEROS(1, 2, 4),
        }
        tensors = {k: v.to(device) for k, v in (tensors | {"c_0": None} | replaced).items() if v is not None}
        return recurrence(cell, *(tensors.get(k) for k in ("x_gates", "W_hh", "b_hh", "h_0", "c_0")))

    assert call()[0].shape == (5, 2, 1, 4)
    for wrong, text in (
        ({"cell": "mgu"}, "cell: expected one of 'lstm'.*got 'mgu'"),
        ({"x_gates": ZEROS(5, 2, 3, 4)}, r"x_gates: expected \(T, B, D, 3, H\) with D 1 or 2, got \(5, 2, 3, 4\)"),
        ({"x_gates": ZEROS(0, 2, 1, 3, 4)}, "at least one time step"),
        ({"W_hh": ZEROS(1, 12, 5)}, r"W_hh: expected \(1, 12, 4\), got \(1, 12, 5\)"),
        ({"b_hh": ZEROS(12)}, r"b_hh: expected \(1, 12\), got \(12,\)"),
        ({"h_0": ZEROS(1, 3, 4)}, r"h_0: expected \(1, 2, 4\), got \(1, 3, 4\)"),
        ({"h_0": ZEROS(1, 2, 4).half()}, "h_0: expected torch.float32 on .* got torch.float16"),
        ({"c_0": ZEROS(1, 2, 4)}, "c_0: expected None, got a tensor"),
        (
            {"cell": "lstm", "x_gates": ZEROS(5, 2, 1, 4, 4), "W_hh": ZEROS(1, 16, 4)},
            "c_0: expected a tensor, got None",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call(**wrong)
