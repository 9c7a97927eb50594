"""torch.func over the recurrence's ops: grad, vjp, jacrev and vmap, in any nesting.

torch.library's own autograd does not work under torch.func's transforms, because its autograd.Function has no
setup_context. `function` makes one that has it, from the same parts. It runs wherever a transform is active.

torch.vmap runs N calls at once. If all have the same weights, they become one call with a batch of N * B sequences, in
one launch. The calls run one after the other if each has its own weights (an ensemble), or if each needs gradients of
the weights (per-sample gradients): a kernel keeps one W_hh on chip, and its gradient is one sum over the whole batch.
Calls whose sequences have their own lengths also run one after the other, because a table of sequences describes one
batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .schema import BATCH_DIMS

SHARED = ("W_hh", "b_hh", "W_ih", "b_ih")  # these tensors have no batch dimension
PLACES = ("rows", "noise")  # these refer to slots of one batch
SUMS = ("needs_dW", "needs_db")  # these ask for sums over the batch


def transforming() -> bool:
    """Whether a transform of torch.func is active, or forward-mode differentiation, which is missing and says so."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def function(op: Any, described: Any, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """Make a Function of an op and its autograd that transforms accept, and register it for torch.vmap.

    described: the NamedTuples of its arguments and results (schema.py).

    >>> import torch
    >>> from fastrnn.ops import recurrence
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU with TRITON_INTERPRET=1
    >>> x_gates, W_hh, h_0 = torch.zeros(6, 5, 2, 1, 3, 4), torch.zeros(1, 12, 4), torch.ones(1, 2, 4)
    >>> x_gates, W_hh, h_0 = (t.to(device) for t in (x_gates, W_hh, h_0))
    >>> torch.vmap(lambda x_gates: recurrence("gru", x_gates, W_hh, None, h_0, None)[0])(x_gates).shape
    torch.Size([6, 5, 2, 1, 4])
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return op(*args)

        @staticmethod
        def jvp(ctx, *tangents):
            raise NotImplementedError(
                "forward-mode differentiation of fastrnn's kernels is missing: use backend='reference'"
            )

        @staticmethod
        def vmap(info, in_dims, *args):
            return _vmap(Function.apply, described, info.batch_size, in_dims, args)

    Function.setup_context, Function.backward = staticmethod(setup_context), staticmethod(backward)
    torch.library.register_vmap(op, lambda info, in_dims, *args: _vmap(op, described, info.batch_size, in_dims, args))
    return Function


def _vmap(call: Callable, described: Any, N: int, in_dims: tuple, args: tuple) -> tuple[tuple[Tensor, ...], tuple]:
    """Run N calls. Return their outputs, and the dimension of each that counts the calls."""
    arguments, results = described
    # Arguments that are left out have their defaults.
    given = list(zip(arguments._fields, args, in_dims, strict=False))
    own_weights = any(name in SHARED and dim is not None for name, _, dim in given)
    own_places = any(name in PLACES and value is not None for name, value, _ in given)
    if own_weights or own_places or any(name in SUMS and value for name, value, _ in given):
        calls = [call(*(_of_call(n, value, dim) for _, value, dim in given)) for n in range(N)]
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * len(calls[0])
    outputs = call(*(value if name in SHARED else _one_batch(name, N, value, dim) for name, value, dim in given))
    whole, dims = [], []
    for name, output in zip(results._fields, outputs, strict=True):
        dim = None if output.dim() == 1 else BATCH_DIMS.get(name, 1)  # 1-D: this cell or call lacks it
        whole.append(output if dim is None else output.unflatten(dim, (N, output.shape[dim] // N)))
        dims.append(dim)
    return tuple(whole), tuple(dims)


def _of_call(n: int, value: Any, dim: int | None) -> Any:
    return value if dim is None else value.select(dim, n)


def _one_batch(name: str, N: int, value: Any, dim: int | None) -> Any:
    """Merge the calls' dimension into the batch: N * B in place of B. A tensor without it is repeated for all calls."""
    if not isinstance(value, Tensor) or value.dim() - (dim is not None) == 1:
        return _of_call(0, value, dim)
    place = BATCH_DIMS.get(name, 1)
    if dim is not None:
        return value.movedim(dim, place).flatten(place, place + 1)
    return value.unsqueeze(place).expand(*value.shape[:place], N, *value.shape[place:]).flatten(place, place + 1)
