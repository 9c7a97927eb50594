"""torch's kernels over a packed batch: as dense blocks on a CPU, and elsewhere in its own packed form.

A packed batch lists step 0 of all sequences, the longest first, then step 1 of those that have it, and so on. Between
the ends of two sequences it is dense: a block (steps, sequences, I) without padding. There are as many blocks as
different lengths.

On a CPU, torch's packed form cuts each step out of the whole batch, and the gradient of each slice is as long as the
batch: backward costs the square of the steps. Nor does it have oneDNN's fused LSTM, which dense batches use. The packed
form still wins in some cases: without gradients where blocks are short or have no fused kernel, with projections, which
warn in dense form, and under autocast on CPUs where oneDNN lacks bfloat16. bench/segments.py measures both forms.

Source: aten/src/ATen/native/RNN.cpp of torch (PackedLayer, use_mkldnn).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import dropout

from ..stack import Stack

# Without gradients, oneDNN's fused LSTM beats the packed form from this mean number of steps in a block on. There is no
# fused GRU or RNN. `python -m bench.segments --blocks` measures it; docs/performance.md has the table.
FUSED, LEAST_STEPS = ("lstm",), 3

State = tuple[Tensor, ...]  # (h,) or (h, c), each (L*D, S, H) for S sequences; in a block (1, the live ones, H)
Kernel = Callable[[Tensor, State], tuple[Tensor, State]]  # one layer, one direction of a block


def run(
    stack: Stack, data: Tensor, batch_sizes: Tensor, state: State, params: Sequence[Tensor]
) -> tuple[Tensor, State]:
    """Run all layers over a packed batch of S sequences with M steps in all. Nothing is validated.

    data (M, I) and batch_sizes (longest,), on the CPU, are those of a torch.nn.utils.rnn.PackedSequence. state, each
    (L*D, S, H), and params are those of segments.run. Returns output (M, D*H) and the final states, shaped as state.

    >>> import torch
    >>> from fastrnn.stack import Stack
    >>> from fastrnn.torch_path import packed
    >>> gru, data, h_0 = torch.nn.GRU(3, 4), torch.randn(4, 3), torch.zeros(1, 2, 4)
    >>> sizes = torch.tensor([2, 1, 1])  # sequences of 3 steps and of 1
    >>> y, _ = packed.run(Stack("gru"), data, sizes, (h_0,), list(gru.parameters()))
    >>> torch.allclose(y[[0, 2, 3]], gru(data[[0, 2, 3]])[0], atol=1e-6)
    True
    """
    shapes = list(zip(*(sizes.tolist() for sizes in batch_sizes.unique_consecutive(return_counts=True)), strict=True))
    if not in_blocks(stack.cell, data, state, params, len(batch_sizes) / len(shapes)):
        y, *final = stack.torch_kernel(data, batch_sizes, state=state, params=list(params))
        return y, tuple(final)

    D = stack.directions
    per_direction = len(params) // (stack.num_layers * D)
    alone = Stack(stack.cell, bias=stack.bias, training=stack.training)
    finals = []
    for layer in range(stack.num_layers):
        if layer:
            data = dropout(data, stack.dropout, stack.training)
        # One split joins all its gradients at once. A slice's gradient would be as long as data.
        parts = data.split([B * steps for B, steps in shapes])
        blocks = [part.unflatten(0, (steps, B)) for part, (B, steps) in zip(parts, shapes, strict=True)]
        outputs = []
        for k, walk in zip(range(layer * D, layer * D + D), (_ahead, _back), strict=False):
            weights = list(params[k * per_direction : (k + 1) * per_direction])

            def block(x: Tensor, state: State, weights=weights) -> tuple[Tensor, State]:
                y, *final = alone.torch_kernel(x, state=state, params=weights)
                return y, tuple(final)

            y, final = walk(block, blocks, tuple(s[k : k + 1] for s in state))
            outputs.append(torch.cat([of_block.flatten(0, 1) for of_block in y]))
            finals.append(final)
        data = torch.cat(outputs, -1) if D == 2 else outputs[0]
    return data, tuple(torch.cat(of_all) for of_all in zip(*finals, strict=True))


def on_its_own(params: Sequence[Tensor], bias: bool) -> list[Tensor]:
    """The parameters of a part of a module's layers or directions, in a form that is safe for torch's GPU kernels.

    All parameters of a module may lie in one block of memory. If the first one given begins that block, torch hands the
    block to cuDNN. It does not check for biases: without them, cuDNN would add the next layer's weights as if they were
    biases. A copy of the first parameter lies elsewhere.

    Source: try_get_weight_buf in aten/src/ATen/native/cudnn/RNN.cpp.
    """
    return list(params) if bias or params[0].device.type == "cpu" else [params[0].clone(), *params[1:]]


def in_blocks(cell: str, data: Tensor, state: State, params: Sequence[Tensor], steps: float) -> bool:
    """Whether dense blocks, with so many steps on average, are faster than torch's packed form."""
    projected = state[0].shape[-1] != state[-1].shape[-1]
    if data.device.type != "cpu" or projected or torch.is_autocast_enabled("cpu"):
        return False
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (data, *state, *params))
    return differentiated or (cell in FUSED and steps >= LEAST_STEPS)


def _ahead(kernel: Kernel, blocks: Sequence[Tensor], state: State) -> tuple[list[Tensor], State]:
    """Run forward in time. At each block's end the shortest sequences end, and leave their final states."""
    ys, ended = [], []
    for x, later in zip(blocks, [*(block.shape[1] for block in blocks[1:]), 0], strict=True):
        y, state = kernel(x, state)
        ys.append(y)
        state, final = zip(*(s.split([later, x.shape[1] - later], 1) for s in state), strict=True)
        ended.append(final)
    return ys, tuple(torch.cat(finals, 1) for finals in zip(*reversed(ended), strict=True))


def _back(kernel: Kernel, blocks: Sequence[Tensor], state: State) -> tuple[list[Tensor], State]:
    """Run from the end. At each block's end the sequences that are one block shorter join, with their first states."""
    sizes = [0, *(block.shape[1] for block in reversed(blocks))]
    joining = zip(*(s.split([now - before for before, now in pairwise(sizes)], 1) for s in state), strict=True)
    state = tuple(s[:, :0] for s in state)
    ys = []
    for x, first in zip(reversed(blocks), joining, strict=True):
        state = tuple(torch.cat(both, 1) for both in zip(state, first, strict=True))
        y, state = kernel(x.flip(0), state)
        ys.append(y.flip(0))
    return ys[::-1], state
