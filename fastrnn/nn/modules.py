"""RNN, GRU, LSTM and sLSTM with torch.nn's names, arguments, parameters, initialisation and errors, and a backend."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..planning.planner import Plan
from .foreign import Foreign
from .recurrent import Recurrent


class LSTM(Recurrent):
    """An LSTM whose forward and backward passes are one persistent kernel launch each per layer.

        i, f, o = sigmoid(W_ih x + b_ih + W_hh h + b_hh),  g = tanh(...),  c' = f c + i g,  h' = o tanh(c')

    Constructor, forward, parameters and errors are torch.nn.LSTM's, so that a state_dict loads both ways: input
    (T, B, I), (B, T, I) with batch_first, or unbatched (T, I); hx a pair of (num_layers * D, B, H), or without B;
    output (T, B, D*H) and (h_n, c_n). And one keyword more:

    backend: "auto" takes a persistent kernel where one fits and torch's own elsewhere (on CPU tensors always; on a GPU
    with a fastrnn.FallbackWarning that says why); "resident" is the kernel that keeps W_hh in one program,
    "cluster" the one that splits it over a thread-block cluster, "cooperative" over the GPU, "torch" is torch's own
    kernel, "reference" a differentiable loop in torch. A named backend runs or raises. Kernels compute in float32,
    bfloat16 and float16; float32 products follow torch.backends.cudnn.rnn.fp32_precision.

    checkpoint_every: None keeps all gates of all T time steps for backward. A positive int K keeps the state of every
    K-th step, and backward computes the gates again, K steps at a time: memory for K steps' gates and T / K states,
    for one more forward pass. Every backend takes it; with packed sequences it is missing. Recurrence
    and its gradients have the bits of the plain run, if x_gates has: a product of fewer rows may be rounded
    otherwise. Equal to rounding are gradients of parameters, sums over chunks in fp32, each chunk's rounded once in 16
    bits, and that of a bidirectional layer's input. torch.compile decides by itself what is kept.

    num_heads: N makes W_hh block-diagonal, N heads of K = H / N units, each of which sees its own h only: weight_hh_l0
    is (4*H, K), gate by gate as ever, row g*H + n*K + k for unit k of head n; W_ih stays dense, and N = 1 is no change.
    A launch runs them side by side, D * N recurrences of K units. torch has no such kernel, so that "auto" takes the
    reference in its place; with proj_size it is missing. Parameters start as torch.nn's, uniform up to 1/sqrt(H).

    clip_grad_state: v clips the gradient of h that comes back through W_hh to [-v, v] at each step, so that it cannot
    explode over a long sequence; 0 cuts it. clip_state: v lets each step see c, of a cell without c h, clipped to
    [-v, v]; the final state is as a next step would see it, output is not clipped. None for neither, which costs
    nothing; torch has no such kernels, as for heads, and second derivatives are missing with the first of them.

    tie_directions: both directions have one set of parameters, that of direction 0; they run in one launch as ever.

    drop_connect: in training each call drops elements of W_hh with probability p, from 0 to 1, and scales the others by
    1 / (1 - p) (DropConnect, Wan et al. 2013). One mask a layer and direction serves all time steps; a call of step has
    its own. Every backend takes it; of one seed masks are the same on each, in chunks or as a wavefront. Gradients
    reach what was kept. In evaluation nothing is dropped.

    zoneout: in training each unit of h stays what it was with probability p, from 0 to 1, drawn anew for each step,
    sequence and unit, in evaluation all are in between: h' = h_prev + (1 - p) (h_new - h_prev) (Krueger et al. 2016,
    arXiv:1606.01305). c is not zoned out. A call draws one seed a layer; what it keeps depends on that and on the place
    (t, b) in input alone, whatever backend, chunks or wavefront run it. Ragged and packed input counts places otherwise
    than (T, B). torch has no such kernels, as for heads; with proj_size it is missing.

    Layers of one direction run as a wavefront over chunks of time, each on a CUDA stream, if fastrnn.explain says so.

    Raises torch.nn.LSTM's errors for wrong arguments, ValueError for another backend, checkpoint_every or num_heads,
    NotImplementedError, naming what is missing, where a named backend or checkpoint_every cannot run,
    fastrnn.LaunchRefusedError where a GPU refuses a named backend's kernel, or backward's, or one in torch.compile.

    Source: torch.nn.LSTM.

    >>> import torch, fastrnn
    >>> lstm = fastrnn.LSTM(10, 20, num_layers=2)
    >>> _ = lstm.load_state_dict(torch.nn.LSTM(10, 20, num_layers=2).state_dict())
    >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
    >>> output.shape
    torch.Size([5, 3, 20])
    """

    _torch = torch.nn.LSTM
    # What torch.nn.LSTM.forward calls of its own class, on a pair of states.
    get_expected_cell_size: Any = torch.nn.LSTM.get_expected_cell_size
    check_forward_args: Any = torch.nn.LSTM.check_forward_args
    permute_hidden: Any = torch.nn.LSTM.permute_hidden

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)


class GRU(Recurrent):
    """A GRU whose forward and backward passes are one persistent kernel launch each per layer.

        r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)

    with x = W_ih x_t + b_ih and rec = W_hh h + b_hh. Constructor, forward, parameters and errors are torch.nn.GRU's;
    backend, checkpoint_every, num_heads, clips, drop_connect, zoneout, dtypes and shapes as in fastrnn.LSTM; hx is one
    tensor.

    Source: torch.nn.GRU.

    >>> import torch, fastrnn
    >>> output, h_n = fastrnn.GRU(10, 20, bidirectional=True)(torch.randn(5, 3, 10))
    >>> output.shape, h_n.shape
    (torch.Size([5, 3, 40]), torch.Size([2, 3, 20]))
    """

    _torch = torch.nn.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)


class RNN(Recurrent):
    """A simple recurrent network whose forward and backward passes are one persistent kernel launch each per layer.

        h' = act(W_ih x_t + b_ih + W_hh h + b_hh),  act = tanh or relu

    Constructor (nonlinearity="tanh" or "relu", also as the fourth argument), forward, parameters and errors are
    torch.nn.RNN's; backend, checkpoint_every, num_heads, clips, drop_connect, zoneout, dtypes and shapes as in
    fastrnn.GRU.

    Source: torch.nn.RNN.

    >>> import torch, fastrnn
    >>> output, h_n = fastrnn.RNN(10, 20, nonlinearity="relu", batch_first=True)(torch.randn(3, 5, 10))
    >>> output.shape
    torch.Size([3, 5, 20])
    """

    _torch = torch.nn.RNN

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


class SLSTM(Recurrent):
    """An sLSTM whose forward and backward passes are one persistent kernel launch each per layer.

        i, f, z, o = W_ih x + b_ih + W_hh h + b_hh;    l = m + logsigmoid(f);    m' = max(i, l), but i where n is 0
        c' = exp(l - m') c + exp(i - m') tanh(z);    n' = exp(l - m') n + exp(i - m');    h' = sigmoid(o) c' / n'

    m only rescales c and n, so that exp cannot overflow: h is what it would be without, and no gradient goes through m.
    From zeros n is 1 at least, since one of the two exp is: FlashRNN's n' = max(n', 1) is the same cell, and no option.
    It would differ only where hx or reset_state has an n between 0 and 1.

    Arguments, shapes, dtypes and errors as in fastrnn.LSTM, without proj_size: input_size, hidden_size, num_layers,
    bias, batch_first, dropout, bidirectional, tie_directions, num_heads, backend, checkpoint_every, clips,
    drop_connect and zoneout. Parameters too, for gates i, f, z, o in this order: weight_ih_l0 (4*H, I), weight_hh_l0
    (4*H, K), K = H / num_heads, bias_ih_l0 and bias_hh_l0 (4*H,). hx and the final state are tuples (h, c, n, m), each
    (num_layers * D, B, H), zeros by default. They are float32 where input has 16 bits: m and n mean nothing when they
    are rounded so; hx may be either. torch has no such kernel: "auto" takes the reference, a loop in torch, where none
    of ours runs, on CPU tensors always.

    Raises what fastrnn.LSTM raises.

    Source: Beck et al. 2024 (arXiv:2405.04517), section 2.2.

    >>> import torch, fastrnn
    >>> slstm = fastrnn.SLSTM(10, 20, num_heads=4)
    >>> output, (h_n, c_n, n_n, m_n) = slstm(torch.randn(5, 3, 10))
    >>> output.shape, m_n.shape, slstm.weight_hh_l0.shape
    (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]), torch.Size([80, 5]))
    """

    _torch = torch.nn.LSTM  # for what asks by class; its kernel is another cell's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs or len(args) > 7:  # the eighth, where torch.nn has it
            raise ValueError("proj_size argument is only supported for LSTM, not SLSTM")
        super().__init__("SLSTM", *args, **kwargs)

    def init_as(self, mode: str, *args: Any, **kwargs: Any) -> None:
        """As the LSTM, which has as many gates: torch.nn.RNNBase knows no other modes than torch's."""
        super().init_as("LSTM", *args, **kwargs)
        self.mode = mode

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: "Tensor | Sequence[int] | None" = None,
        cu_seqlens: "Tensor | Sequence[int] | None" = None,
        reset: "Tensor | Sequence | None" = None,
        reset_state: Any = None,
        return_states: bool = False,
    ) -> Any:
        """Run all layers over all of time, each sequence over its own: arguments and results as fastrnn.LSTM.forward's.

        reset_state is a tuple of four, as hx. return_states: a third result, (h, c, n, m) of the last layer for all t,
        each as output, h in its dtype and the others float32 at least; differentiable.

        >>> import torch, fastrnn
        >>> slstm, x = fastrnn.SLSTM(3, 4), torch.randn(5, 2, 3)
        >>> output, final, (h, c, n, m) = slstm(x, lengths=torch.tensor([5, 3]), return_states=True)
        >>> torch.equal(c[2, 1], final[1][0, 1]), h is output
        (True, True)
        """
        found = super().forward(input, hx, lengths, cu_seqlens, reset, reset_state, return_states)
        if not return_states:
            return found
        output, final, *others = found
        return output, final, (output, *others)


def explain(module: torch.nn.Module, input: "Tensor | PackedSequence") -> Plan:
    """Print the plan that a fastrnn module would run for this input and, for a fallback, the reason; return it.

    module is a fastrnn.RNN, GRU, LSTM or SLSTM, or a cell of another package that fastrnn.convert swapped (else a
    ValueError); nothing is run.
    Raises NotImplementedError, as running would, where the module's named backend cannot run.

    >>> import torch, fastrnn
    >>> plan = fastrnn.explain(fastrnn.LSTM(8, 16), torch.randn(5, 2, 8))
    lstm, T=5, B=2, H=16, float32, on cpu: backend torch
      why       CPU tensors take torch's own kernel
    """
    if not isinstance(module, Recurrent | Foreign):
        raise ValueError(f"module: expected a fastrnn.RNN, GRU, LSTM or SLSTM; got {type(module).__name__}")
    chosen = module.plan(input)
    print(chosen)
    return chosen
