"""Compile what a call will launch before it is made, so that a first step takes as long as the others."""

import contextlib
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..compat import ahead, interpreter
from ..kernels.arguments import Gradients, Outputs


def warmup(
    module: torch.nn.Module,
    *args: Any,
    dtype: torch.dtype | None = None,
    training: bool = True,
    loss: Callable[[Any], Tensor] | None = None,
    jobs: int | None = None,
    **kwargs: Any,
) -> int:
    """Compile the kernels that module(*args, **kwargs) launches, backward too; return how many Triton's caches lacked.

    module is a fastrnn layer or any model that has some, on the device where it will run. args and kwargs are those of
    its call, lengths= or reset= of a layer among them; in place of a tensor args may have its shape, a tuple of ints:
    zeros of dtype (default: that of the module's parameters) on their device. What is compiled depends on sizes and
    dtypes, on which tensors are there and how they are aligned, and on the mode: once for each kind of call, inside
    torch.autocast if the call is.

    training: with gradients, by way of loss, which makes of the result what is differentiated (default: the sum of its
    first tensor, of a layer its output). False: as under torch.no_grad(), whose kernels are others.
    jobs: processes that compile at once (default: the idle CPUs that this one may use). A process starts in the time of
    some three kernels, so that few kernels are compiled by this one alone. They need no `if __name__ == "__main__"`. A
    cell that `__main__` defines is compiled here.

    The call is made once, on its device, with zeros in place of what our kernels compute. Parameters, their .grad,
    buffers and random numbers stay as they are; hooks run. No other thread may run our layers meanwhile. On CPU tensors
    backend "auto" runs torch's own kernels: nothing is compiled, and 0 returned; neither where TRITON_INTERPRET=1.

    Raises ValueError for what is no module, a shape without parameters to say where, jobs below 1, or a result without
    a gradient in training; RuntimeError if another process fails; whatever the call itself raises.

    >>> import torch, fastrnn
    >>> layer = fastrnn.LSTM(16, 32)  # .cuda()
    >>> fastrnn.warmup(layer, (100, 8, 16)) + fastrnn.warmup(layer, (100, 8, 16), training=False)
    0
    """
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    if jobs is not None and (not isinstance(jobs, int) or jobs < 1):
        raise ValueError(f"jobs: expected a positive int, got {jobs!r}")
    args = _made(args, next(module.parameters(), None), dtype)
    if interpreter.ENABLED or find_spec("triton") is None:
        return 0
    with ahead.asking(_zero) as kernels, _random_numbers_kept(module), torch.set_grad_enabled(training):
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        result = torch.func.functional_call(module, buffers, args, kwargs)
        if training:
            _differentiate([*module.parameters(), *tree_leaves((args, kwargs))], result, loss)
    return ahead.compile_all(kernels, jobs or cpus())


def _made(given: Any, parameter: Tensor | None, dtype: torch.dtype | None) -> Any:
    """Arguments with tensors in place of their shapes."""
    if type(given) not in (tuple, torch.Size):  # a PackedSequence is a tuple, too
        return given
    if not given or not all(type(size) is int for size in given):
        return tuple(_made(member, parameter, dtype) for member in given)
    if parameter is None:
        raise ValueError(f"module: expected parameters, which say where a tensor of {tuple(given)} lies; got none")
    return torch.zeros(given, dtype=dtype or parameter.dtype, device=parameter.device)


@contextlib.contextmanager
def _random_numbers_kept(module: torch.nn.Module) -> Iterator[None]:
    devices = {p.device.index for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        yield


def _zero(arguments: tuple) -> None:
    """Write what a kernel would: a model may refuse NaN, which memory may hold."""
    for group in arguments:
        if isinstance(group, Outputs | Gradients):
            for tensor in tree_leaves(tuple(group)):
                if tensor is not None:
                    tensor.detach().zero_()


def _differentiate(inputs: list, result: Any, loss: Callable[[Any], Tensor] | None) -> None:
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if loss is None:
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
        if not found:
            raise ValueError("training: expected a result with a gradient, or training=False; got none")
        value = found[0].sum()
    else:
        value = loss(result)
    torch.autograd.grad(value, wanted, allow_unused=True)


def cpus() -> int:
    """Those that this process may use and that had nothing to do in the last minute; at least one."""
    everywhere = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    idle = everywhere - round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else everywhere
    return max(1, min(allowed, idle))
