"""The layers that replace those of torch.nn: RNN, GRU and LSTM. SLSTM is in slstm.py."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..planning.planner import Plan
from .foreign import Foreign
from .recurrent import Recurrent
from .slstm import SLSTM as SLSTM


class LSTM(Recurrent):
    """Stacked LSTM layers. Each pass of a layer, forward or backward, is one launch of a persistent kernel.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(...)
        c' = f c + i g,  h' = o tanh(c')

    This layer replaces torch.nn.LSTM. It has the same parameters, initial values, shapes and errors, and a state_dict
    loads in both directions. The arguments from backend on are keyword-only, and torch.nn.LSTM lacks them.

    Kernels compute in float32, bfloat16 and float16. Products of float32 tensors follow
    torch.backends.cudnn.rnn.fp32_precision. Stacked layers of one direction may run as a wavefront over chunks of time,
    each layer on its own CUDA stream. `fastrnn.explain` says whether they do.

    Args:
        input_size (int): I, the number of features of the input.
        hidden_size (int): H, the number of units of the state.
        num_layers (int): How many layers are stacked. Each layer reads the output of the layer below. Default: 1.
        bias (bool): Whether layers have the biases b_ih and b_hh. Default: True.
        batch_first (bool): Whether input and output are (B, T, ...) instead of (T, B, ...). States keep their shape.
            Default: False.
        dropout (float): In training, the probability that an element of a layer's output is dropped before the next
            layer reads it. Default: 0.
        bidirectional (bool): Whether each layer has a second direction, which runs from the last time step to the
            first. D, the number of directions, is then 2, else 1. Default: False.
        proj_size (int): P. If P is above 0, weight_hr projects each h to P units. P then takes H's place in the shapes
            of h, output and the columns of weight_hh. Default: 0.
        device (torch.device | str | None): Where the parameters are. Default: None.
        dtype (torch.dtype | None): The dtype of the parameters. Default: None.
        backend (str): "auto" takes the cheapest persistent kernel, or torch's own kernel where none fits or torch's
            costs less. On a GPU a `fastrnn.FallbackWarning` then says why. CPU tensors take "cpu" or torch's, whichever
            was measured to be faster. "resident" keeps W_hh in one program. "cluster" splits it over a thread-block
            cluster, and "cooperative" over the GPU. "cpu" is machine code for CPU tensors (pip install llvmlite).
            "torch" is torch's own kernel. "reference" is a differentiable loop in torch. A named backend runs or
            raises. Default: "auto".
        checkpoint_every (int | None): None keeps the gates of all T time steps for backward. A positive K keeps the
            state of every K-th step, and backward computes the gates again, K steps at a time. This needs memory for
            the gates of K steps and for T / K states, and it costs one more forward pass. Every backend takes it. It
            does not work with packed sequences. Default: None.
        num_heads (int): N makes W_hh block-diagonal: N heads of K = H / N units, and each head sees only its own h.
            weight_hh_l0 is then `(4*H, K)`, and its row `g*H + n*K + k` belongs to gate g and unit k of head n. W_ih
            stays dense. It does not work with proj_size. Default: 1.
        clip_grad_state (float | None): v clips the gradient that comes back to h through W_hh to [-v, v] at each time
            step, so that it cannot explode over a long sequence. 0 cuts it. Second derivatives then raise
            NotImplementedError. Default: None.
        clip_state (float | None): v clips c to [-v, v] (h, in a cell without c) before each time step reads it. The
            final state is clipped too. The output is not. Default: None.
        tie_directions (bool): Whether both directions use the parameters of direction 0. They still run in one launch.
            Default: False.
        drop_connect (float): In training, each call drops elements of W_hh with probability p and scales the others by
            1 / (1 - p). Each layer and direction has one mask for all time steps. Each call of step draws its own. The
            same seed gives the same masks on every backend. Default: 0.
        zoneout (float): In training, each unit of h keeps its old value with probability p, drawn at every time step.
            In evaluation h' = h_prev + (1 - p) (h_new - h_prev). c has no zoneout. The same seed gives the same draws
            on every backend. Ragged and packed input gets other draws than dense input. It does not work with
            proj_size. Default: 0.

    Raises:
        ValueError: An argument has a wrong value. Where torch.nn.LSTM raises, the error has its type and its text.
        NotImplementedError: A named backend or a pair of options cannot run. The message names what is missing.
        LaunchRefusedError: The GPU refuses to launch the kernel of a named backend, or any kernel in a backward pass or
            in code of torch.compile.

    torch has no kernels for num_heads above 1, clip_grad_state, clip_state and zoneout. With these, "auto" takes the
    reference where no persistent kernel fits. On CPU tensors it takes "cpu", or the reference without llvmlite.

    With checkpoint_every, the recurrence and its gradients have the same bits as without, provided that x_gates has:
    its product over fewer rows may be rounded differently. Gradients of the parameters, and of a bidirectional layer's
    input, are equal up to rounding. They are summed over chunks in fp32, and 16-bit layers round each chunk's share
    once. torch.compile decides by itself what is kept for backward.

    Source: torch.nn.LSTM. DropConnect: Wan et al. 2013. Zoneout: Krueger et al. 2016 (arXiv:1606.01305).

    Examples:
        >>> import torch, fastrnn
        >>> lstm = fastrnn.LSTM(10, 20, num_layers=2)
        >>> _ = lstm.load_state_dict(torch.nn.LSTM(10, 20, num_layers=2).state_dict())
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
        >>> output.shape
        torch.Size([5, 3, 20])
    """

    _torch = torch.nn.LSTM
    # torch.nn.LSTM.forward, which backend "torch" runs, calls these methods of self.
    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    if not TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__("LSTM", *args, **kwargs)

    else:  # for editors, type checkers and the reference

        def __init__(
            self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
            batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
            device: Any = None, dtype: Any = None, *, backend: str = "auto",
            checkpoint_every: int | None = None, num_heads: int = 1, clip_grad_state: float | None = None,
            clip_state: float | None = None, tie_directions: bool = False, drop_connect: float = 0.0,
            zoneout: float = 0.0,
        ) -> None: ...  # fmt: skip


class GRU(Recurrent):
    """Stacked GRU layers. Each pass of a layer, forward or backward, is one launch of a persistent kernel.

        r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)

    Here x = W_ih x_t + b_ih and rec = W_hh h + b_hh. This layer replaces torch.nn.GRU. It has the same parameters,
    initial values, shapes and errors. Its state is one tensor.

    The arguments are those of `fastrnn.LSTM`, without proj_size: input_size, hidden_size, num_layers, bias,
    batch_first, dropout, bidirectional, device, dtype, backend, checkpoint_every, num_heads, clip_grad_state,
    clip_state, tie_directions, drop_connect and zoneout. clip_state clips h. Dtypes and errors are those of
    `fastrnn.LSTM` too.

    Source: torch.nn.GRU.

    Examples:
        >>> import torch, fastrnn
        >>> output, h_n = fastrnn.GRU(10, 20, bidirectional=True)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    _torch = torch.nn.GRU

    if not TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if "proj_size" in kwargs:
                raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
            super().__init__("GRU", *args, **kwargs)

    else:  # for editors, type checkers and the reference

        def __init__(
            self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
            batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
            device: Any = None, dtype: Any = None, backend: str = "auto",
            checkpoint_every: int | None = None, num_heads: int = 1, clip_grad_state: float | None = None,
            clip_state: float | None = None, tie_directions: bool = False, drop_connect: float = 0.0,
            zoneout: float = 0.0,
        ) -> None: ...  # fmt: skip


class RNN(Recurrent):
    """Stacked simple recurrent layers. Each pass of a layer, forward or backward, is one launch of a persistent kernel.

        h' = act(W_ih x_t + b_ih + W_hh h + b_hh),  act = tanh or relu

    This layer replaces torch.nn.RNN. It has the same parameters, initial values, shapes and errors. Its state is one
    tensor.

    Args:
        nonlinearity (str): "tanh" or "relu". It may be the fourth positional argument, as in torch.nn.RNN.

    The other arguments are those of `fastrnn.GRU`: input_size, hidden_size, num_layers, bias, batch_first, dropout,
    bidirectional, device, dtype, backend, checkpoint_every, num_heads, clip_grad_state, clip_state, tie_directions,
    drop_connect and zoneout. Dtypes and errors are those of `fastrnn.GRU` too.

    Source: torch.nn.RNN.

    Examples:
        >>> import torch, fastrnn
        >>> output, h_n = fastrnn.RNN(10, 20, nonlinearity="relu", batch_first=True)(torch.randn(3, 5, 10))
        >>> output.shape
        torch.Size([3, 5, 20])
    """

    _torch = torch.nn.RNN

    if not TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if "proj_size" in kwargs:
                raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
            if len(args) > 3:
                self.nonlinearity, args = args[3], args[:3] + args[4:]
            else:
                self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
            if self.nonlinearity not in ("tanh", "relu"):
                raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
            super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)

    else:  # for editors, type checkers and the reference

        def __init__(
            self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh", bias: bool = True,
            batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
            device: Any = None, dtype: Any = None, backend: str = "auto",
            checkpoint_every: int | None = None, num_heads: int = 1, clip_grad_state: float | None = None,
            clip_state: float | None = None, tie_directions: bool = False, drop_connect: float = 0.0,
            zoneout: float = 0.0,
        ) -> None: ...  # fmt: skip


def explain(module: torch.nn.Module, input: "Tensor | PackedSequence", **options: Any) -> Plan:
    """Print and return the plan that a module follows for an input and options of forward. Nothing is run.

    The printed plan says which backend runs, and the reason where it is not a persistent kernel.

    Args:
        module (torch.nn.Module): A fastrnn.RNN, GRU, LSTM or SLSTM, or another package's cell that `fastrnn.convert`
            has swapped.
        input (Tensor | PackedSequence): An input that the module accepts. Only its shape, dtype and device matter.
        **options: lengths, cu_seqlens, reset, reset_state and return_cell_states, if the call has them.

    Returns:
        Plan: What would run.

    Raises:
        ValueError: module is none of these, or an option does not fit.
        NotImplementedError: The module's named backend cannot run. A call would raise this too.

    Examples:
        >>> import torch, fastrnn
        >>> plan = fastrnn.explain(fastrnn.LSTM(8, 16), torch.randn(5, 2, 8))
        lstm, T=5, B=2, H=16, float32, on cpu: backend torch
          why       CPU tensors take torch's own kernel...
        >>> plan = fastrnn.explain(fastrnn.LSTM(8, 16), torch.randn(5, 2, 8), lengths=[5, 3])
        lstm, T=5, B=2, H=16, float32, on cpu: backend ...
          why       ...
    """
    if not isinstance(module, Recurrent | Foreign):
        inside = "; fastrnn.report lists the layers inside a model" if isinstance(module, torch.nn.Module) else ""
        raise ValueError(f"module: expected a fastrnn.RNN, GRU, LSTM or SLSTM; got {type(module).__name__}{inside}")
    if not isinstance(input, Tensor | PackedSequence):
        raise ValueError(f"input: expected a tensor or a PackedSequence; got {type(input).__name__}")
    if options and isinstance(module, Foreign):
        raise ValueError(f"options: expected none for another package's cell; got {', '.join(options)}")
    chosen = module.plan(input, **options)
    print(chosen)
    return chosen
