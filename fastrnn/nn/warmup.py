"""Compile the kernels of a call before it is made, so that the first training step takes as long as the others."""

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
    """Compile the kernels that a call `module(*args, **kwargs)` and its backward pass launch, before it is made.

    Triton compiles a kernel once for each combination of sizes, dtypes, present tensors and their alignment. Call
    warmup once for each kind of call, under torch.autocast if the call runs under it.

    Args:
        module (torch.nn.Module): A fastrnn layer, or a model that has some, on the device where it will run.
        args (Any): The arguments of the call. A tuple of ints stands for a tensor of zeros with this shape, on the
            device of the module's parameters.
        dtype (torch.dtype | None): The dtype of those zeros. None is that of the module's parameters.
        training (bool): True compiles the kernels of a call with gradients, and of its backward pass. False compiles
            those of a call under torch.no_grad(), which are others.
        loss (Callable[[Any], Tensor] | None): In training, makes the tensor to differentiate from the call's result.
            None takes the sum of the result's first tensor, which for a layer is its output.
        jobs (int | None): How many processes compile at once. None is as many as there are idle CPUs that this process
            may use.
        kwargs (Any): The keyword arguments of the call, such as lengths= or reset= for a layer.

    Returns:
        int: How many kernels were compiled. Those in Triton's caches do not count.

    Raises:
        ValueError: module is no module, a shape is given but the module has no parameters to say where, jobs is below
            1, or training finds no gradient in the result.
        RuntimeError: Another process that compiles has failed. Whatever the call raises passes too.

    The call is made once, on its device, with zeros in place of our kernels' results. Parameters, their .grad, buffers
    and random numbers stay as they are, and hooks run. No other thread may run fastrnn's layers meanwhile. On CPU
    tensors "auto" runs torch's own kernels, so nothing is compiled. Nothing is compiled either where
    TRITON_INTERPRET=1.

    Starting another process takes as long as about three kernels, so this process compiles a few kernels alone. A
    script needs no `if __name__ == "__main__"`. A cell that is defined in `__main__` is compiled by this process.

    Examples:
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
    """The arguments, with a tensor of zeros in place of each shape."""
    if type(given) not in (tuple, torch.Size):  # a PackedSequence is a tuple too, and no shape
        return given
    if not given or not all(type(size) is int for size in given):
        return tuple(_made(member, parameter, dtype) for member in given)
    if parameter is None:
        raise ValueError(
            f"module: expected parameters, because a tensor of {tuple(given)} takes their device; got none"
        )
    return torch.zeros(given, dtype=dtype or parameter.dtype, device=parameter.device)


@contextlib.contextmanager
def _random_numbers_kept(module: torch.nn.Module) -> Iterator[None]:
    devices = {p.device.index for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        yield


def _zero(arguments: tuple) -> None:
    """Write zeros where a kernel would write its results. Unwritten memory may hold NaN, which a model may refuse."""
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
    """Count the CPUs that this process may use and that were idle in the last minute; at least one."""
    everywhere = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everywhere
    idle = everywhere - round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else everywhere
    return max(1, min(allowed, idle))
