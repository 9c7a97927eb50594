"""The calls that torch tests its own RNN, GRU and LSTM with, right and wrong, and batches of no sequence."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import fastrnn

from .test_modules import BACKENDS, NAMES, flat

pytest.importorskip("expecttest")  # torch's own tests import it
common_modules = pytest.importorskip("torch.testing._internal.common_modules")
ModuleErrorEnum, module_db = common_modules.ModuleErrorEnum, common_modules.module_db

INFOS = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls in (torch.nn.RNN, torch.nn.GRU, torch.nn.LSTM)
}
KERNELS = ("resident", "cooperative")
pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore::fastrnn.FallbackWarning"),  # of a GPU: float64 has no kernel
]


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend in KERNELS else torch.float64


def samples(name: str, backend: str, training: bool, device: str) -> Iterator[tuple[dict, tuple]]:
    """Constructor's and forward's arguments of all of torch's samples."""
    info = INFOS[name]
    packed = {} if name == "LSTM" else {"with_packed_sequence": True}  # torch has none for the LSTM
    for sample in info.module_inputs_func(
        info, device=device, dtype=dtype_of(backend), requires_grad=True, training=training, **packed
    ):
        assert not sample.constructor_input.args and not sample.forward_input.kwargs
        yield sample.constructor_input.kwargs, sample.forward_input.args


def results(module: torch.nn.Module, arguments: tuple, gradients: bool = True) -> list[torch.Tensor]:
    """Output, states, and the gradients of the arguments and parameters."""
    with torch.set_grad_enabled(gradients):
        output, final = module(*arguments)
    outputs = flat(output.data if isinstance(output, PackedSequence) else output, final)
    if not gradients:
        return outputs
    leaves = []
    for argument in arguments:
        leaves += argument if isinstance(argument, tuple) and not isinstance(argument, PackedSequence) else [argument]
    leaves = [leaf.data if isinstance(leaf, PackedSequence) else leaf for leaf in leaves]
    torch.manual_seed(1)
    upstream = [torch.randn_like(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [*leaves, *module.parameters()], upstream)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_inputs(name, backend, training, device):
    """Outputs, states and gradients; kernels in eval without gradients, where they keep nothing."""
    gradients = training or backend not in KERNELS
    count = 0
    for kwargs, arguments in samples(name, backend, training, device):
        theirs = getattr(torch.nn, name)(**kwargs, device=device, dtype=dtype_of(backend)).train(training)
        ours = getattr(fastrnn, name)(**kwargs, backend=backend, device=device, dtype=dtype_of(backend)).train(training)
        ours.load_state_dict(theirs.state_dict())
        count += 1
        of_both = results(ours, arguments, gradients), results(theirs, arguments, gradients)
        for found, truth in zip(*of_both, strict=True):
            torch.testing.assert_close(found, truth)
    assert count >= 16


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_torchs_own_errors(name, backend, device):
    """The same type and text; torch.nn's is held to torch's own expectation, too."""
    info = INFOS[name]
    dtype = dtype_of(backend)
    count = 0
    for sample in info.module_error_inputs_func(info, device=device, dtype=dtype, requires_grad=False, training=False):
        made, given = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        found = []
        for package, added in ((torch.nn, {}), (fastrnn, {"backend": backend})):
            with pytest.raises(sample.error_type, match=sample.error_regex) as error:
                module = getattr(package, name)(*made.args, **made.kwargs, **added)
                assert sample.error_on is ModuleErrorEnum.FORWARD_ERROR
                module(*given.args, **given.kwargs)
            found.append(str(error.value))
        assert found[0] == found[1]
        count += 1
    assert count >= 14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kwargs",
    ({}, {"bidirectional": True, "num_layers": 2, "batch_first": True, "dropout": 0.5}),
    ids=("plain", "bidirectional-stacked-batch_first-dropout"),
)
def test_a_batch_of_no_sequence(name, kwargs, backend, device):
    """torch.nn takes it: outputs and states without elements, and gradients that are 0."""
    theirs = getattr(torch.nn, name)(3, 4, device=device, **kwargs)
    ours = getattr(fastrnn, name)(3, 4, backend=backend, device=device, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.zeros((0, 5, 3) if kwargs else (5, 0, 3), device=device, requires_grad=True)
    h = torch.zeros(4 if kwargs else 1, 0, 4, device=device, requires_grad=True)
    for arguments in ((x,), (x, (h, h.detach().requires_grad_()) if name == "LSTM" else h)):
        for found, truth in zip(results(ours, arguments), results(theirs, arguments), strict=True):
            assert torch.equal(found, truth) and not found.any()
