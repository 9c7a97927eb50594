"""sLSTM cells of the packages xlstm and tirex-ts: one to convert, and one that computes the same by their code."""

import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import cpp_extension

XLSTM = ("xlstm", "xlstm_cuda")  # its cell in plain torch, and the one that compiles CUDA: their layouts differ
KINDS = (*XLSTM, "tirex")
N, K = 3, 8
H = N * K


class Uncast(TorchFunctionMode):
    """TiRex's code computes in bfloat16, and its steps in float32: here in its input's dtype."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func in (torch.Tensor.float, torch.Tensor.to) else func(*args, **(kwargs or {}))


def uncast_tirex() -> type:
    from tirex.models.slstm import cell as cells

    class Theirs(cells.sLSTMCell):
        def forward(self, input, state=None):
            with Uncast():
                return super().forward(input, state)

    return Theirs


def tirex(dtype: torch.dtype):
    from tirex.models.slstm import cell as cells

    cell = cells.sLSTMCell(cells.sLSTMBlockConfig(H, N), "torch").to(dtype)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs = copy.deepcopy(cell)
    theirs.__class__ = uncast_tirex()
    return cell, theirs


def xlstm_cells():
    """xlstm's module of cells, which cannot be imported where there is a GPU without CUDA's toolkit."""
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        pytest.skip("xlstm wants CUDA's toolkit where torch finds a GPU")
    from xlstm.blocks.slstm import cell

    return cell


def pair(kind: str, dtype: torch.dtype = torch.float32, **config):
    """A cell of a package to convert, and one that computes the same in plain torch by their code, not to convert."""
    if kind == "tirex":
        return tirex(dtype)
    cells = xlstm_cells()
    init = {"recurrent_weight_init": "standard", "bias_init": "standard"}
    config = cells.sLSTMCellConfig(H, N, **init, **config)
    theirs = cells.sLSTMCell_vanilla(copy.copy(config)).to(dtype)
    if kind == "xlstm":
        return copy.deepcopy(theirs), theirs
    cell = cells.sLSTMCell_cuda(config, skip_backend_init=True).to(dtype)
    with torch.no_grad():  # by their own views of either layout
        cell._recurrent_kernel_.copy_(cell._recurrent_kernel_ext2int(theirs.recurrent_kernel[:]))
        cell._bias_.copy_(cell._bias_ext2int(theirs.bias[:]))
    return cell, theirs


def in_layout_of(cell, theirs) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the kernel and the bias of theirs, as they lie in the cell."""
    if not hasattr(cell, "recurrent_kernel"):
        return theirs._recurrent_kernel_.grad, theirs._bias_.grad
    kernel = theirs._recurrent_kernel_int2ext(theirs._recurrent_kernel_.grad)
    bias = theirs._bias_int2ext(theirs._bias_.grad)
    return cell._recurrent_kernel_ext2int(kernel), cell._bias_ext2int(bias)


def run(cell, x, state=None) -> dict[str, torch.Tensor]:
    """Output, states and gradients of a loss of outputs and h, in two calls of which the second goes on."""
    x = x.clone().requires_grad_()
    state = None if state is None else state.clone().requires_grad_()
    first, between = cell(x[:, :3], state)
    rest, last = cell(x[:, 3:], between)
    y = torch.cat((first, rest), 2)
    cell.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum().backward()
    found = {"y": y, "state": last, "dx": x.grad}
    return found if state is None else found | {"d_state": state.grad[:3]}  # m only rescales the others


def compare(cell, theirs, x, state, **tolerance):
    ours, expected = run(cell, x, state), run(theirs, x, state)
    for name, truth in expected.items():
        torch.testing.assert_close(ours[name], truth, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    for grad, truth in zip((cell._recurrent_kernel_.grad, cell._bias_.grad), in_layout_of(cell, theirs), strict=True):
        torch.testing.assert_close(grad, truth, **tolerance)


def start(device: str, dtype: torch.dtype) -> torch.Tensor:
    """A state as sequences leave them."""
    h, c, n, m = torch.randn(4, 2, H, dtype=dtype, device=device)
    return torch.stack((h.tanh(), c, 1 + n.abs(), m))
