"""RNN, GRU and LSTM with torch.nn's names, arguments, parameters, initialisation and errors, and a backend.

They share torch.nn.RNNBase, and so the state_dict, with torch.nn's, but not the classes torch.nn.LSTM, GRU and RNN:
torch.compile breaks the graph at those.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..planning.arguments import as_int, check_checkpoint_every
from ..planning.planner import BACKENDS, Plan
from ..sequences import Packing, stops_at_torchs_kernels, untraced
from ..stack import Stack
from . import calls, paths, streaming
from .older_tools import OlderTools, leaf_module
from .options import Options
from .validation import check_rank


class _Recurrent(OlderTools, torch.nn.RNNBase):
    """What the three share: choose a backend, and run it on batched or unbatched input."""

    # torch.nn's own forward of the same layer (and the checks that it calls), for backend "torch".
    _torch: Any

    def __init__(
        self, mode: str, *args: Any, backend: str = "auto", checkpoint_every: int | None = None, **kwargs: Any
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
        checkpoint_every = as_int(checkpoint_every)
        check_checkpoint_every(checkpoint_every)
        torch.nn.RNNBase.__init__(
            self, mode, *map(as_int, args), **{name: as_int(value) for name, value in kwargs.items()}
        )
        self.backend = backend
        self.checkpoint_every = checkpoint_every

    def _stack(self) -> Stack:
        """What this module is now: any of it may have been set since it was made."""
        return Stack(
            self.mode.lower(), self.num_layers, self.bias, self.batch_first, self.dropout, self.training,
            self.bidirectional, self.backend, self.checkpoint_every,
        )  # fmt: skip

    def plan(self, input: "Tensor | PackedSequence") -> Plan:
        """The Plan that forward(input) follows; each layer runs by it."""
        if isinstance(input, PackedSequence):
            data, T, B = input.data, len(input.batch_sizes), int(input.batch_sizes[0])
        else:
            data, T = input, input.shape[1 if self.batch_first and input.dim() == 3 else 0]
            B = input.shape[0 if self.batch_first else 1] if input.dim() == 3 else 1
        return calls.planned(self._stack(), self.hidden_size, T, B, data)

    @leaf_module
    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: "Tensor | Sequence[int] | None" = None,
        cu_seqlens: "Tensor | Sequence[int] | None" = None,
        reset: "Tensor | Sequence | None" = None,
        reset_state: Any = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Run all layers over all of time, each sequence over its own.

            the state of b before step t is reset_state where reset[t, b], and its steps end with lengths[b]

        input (T, B, I), (B, T, I) with batch_first, unbatched (T, I), ragged (total, I) with cu_seqlens, or a
        PackedSequence, which makes output one; hx and what is returned as torch.nn's.

        lengths (B,) int64 or int32, each 0 to T: output is zero past a sequence's end, h_n is the state at its end,
        where direction 1 begins: what pack_padded_sequence does, unsorted, and with no need for lengths on the CPU.
        Padding is not read, it may hold NaN. Of a sequence without steps h_n is hx.
        cu_seqlens (N + 1,): sequence n is rows cu_seqlens[n] to cu_seqlens[n + 1] of input, as in flash attention.
        reset (T, B), with batch_first (B, T), ragged (total,), bool: a segment begins here. Segments do not see each
        other: the state starts anew before this step and, in direction 1, after it.
        reset_state, as hx: what it starts from instead of zeros, (num_layers * D, B or 1, H), or by step (T,
        num_layers * D, B or 1, H), ragged (total, num_layers * D, 1, H), given at the first step of the later segment.
        return_cell_states (LSTM): a third result, c_t of the last layer for all t, as output.
        lengths, cu_seqlens and reset may be lists or NumPy arrays, too.

        Raises ValueError, with expected and got, where these do not fit. Values of lengths and cu_seqlens that are on a
        GPU are checked there, since nothing here waits for it: torch says "device-side assert
        triggered" at a later call. Give them on the CPU, or set CUDA_LAUNCH_BLOCKING=1, to see the call that was wrong.
        NotImplementedError where checkpoint_every meets ragged or packed input or, for lengths and resets, a
        bidirectional layer or backend="torch".

        >>> import torch, fastrnn
        >>> gru, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
        >>> output, h_n = gru(x, lengths=torch.tensor([5, 3]))
        >>> torch.equal(h_n[0, 1], output[2, 1]), output[3:, 1].count_nonzero().item()
        (True, 0)
        >>> episodes, _ = gru(x, reset=torch.tensor([[False, True]] + 4 * [[False, False]]).roll(2, 0))
        >>> torch.allclose(episodes[2:, 1], gru(x[2:])[0][:, 1])
        True
        """
        # CPU tensors take torch's path with next to nothing before it, so that "auto" costs there what torch.nn costs.
        plain = lengths is None and cu_seqlens is None and reset is None and reset_state is None
        backend, packed = self.backend, isinstance(input, PackedSequence)
        whole = plain and not return_cell_states and self.checkpoint_every is None
        if whole and (backend == "torch" or (backend == "auto" and not input.is_cuda)):
            return self._run_torchs(input, hx)
        options = Options.of(lengths, cu_seqlens, reset, reset_state, return_cell_states)
        if packed and not plain:
            raise ValueError("lengths, cu_seqlens, reset: expected None beside a PackedSequence")
        if not packed and cu_seqlens is None:
            check_rank(self._torch.__name__, input, hx)
        if whole and backend == "auto" and calls.backend_of(self.plan(input)) == "torch":
            return self._run_torchs(input, hx)
        if packed or (input.dim() == 2 and cu_seqlens is None):
            if not plain:
                raise ValueError("lengths, reset: expected None beside unbatched input")
            return (self._run_packed if packed else self._run_unbatched)(input, hx, options)
        return self._run(input, hx, options)

    def _run(self, input: Tensor, hx: Any, options: Options) -> tuple:
        """Batched or ragged input."""
        own = self._parameters  # where a parametrization took one away, an attribute is in its place
        params: Any = [own[name] if name in own else getattr(self, name) for name in self._flat_weights_names]
        output, finals, *cell_states = paths.run(self._stack(), input, hx, params, options)
        return output, finals[0] if len(finals) == 1 else finals, *cell_states

    def _run_unbatched(self, input: Tensor, hx: Any, options: Options) -> tuple:
        batch_dim = 0 if self.batch_first else 1
        hx = _map(lambda state: state.unsqueeze(1), hx)
        output, state, *cell_states = self._run(input.unsqueeze(batch_dim), hx, options)
        outputs = [y.squeeze(batch_dim) for y in (output, *cell_states)]
        return outputs[0], _map(lambda s: s.squeeze(1), state), *outputs[1:]

    def _run_packed(self, input: PackedSequence, hx: Any, options: Options) -> tuple:
        packing, order = Packing.of(input), (input.sorted_indices, input.unsorted_indices)
        hx = _map(lambda state: _reordered(state, order[0]), hx)
        of_packing = Options.of(cu_seqlens=packing.cu_seqlens, cell_states=options.cell_states)
        output, state, *cell_states = self._run(input.data[packing.slot], hx, of_packing)
        outputs = [PackedSequence(y[packing.packed], input.batch_sizes, *order) for y in (output, *cell_states)]
        return outputs[0], _map(lambda s: _reordered(s, order[1]), state), *outputs[1:]

    def _run_torchs(self, input: Any, hx: Any) -> Any:
        """torch.nn's forward; what torch.compile cannot trace, or not in time, breaks its graph."""
        untraced = isinstance(input, PackedSequence) or stops_at_torchs_kernels()
        return (_untraced if untraced else self._torch.forward)(self, input, hx)

    def step(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Run one time step, for input that arrives step by step; a sequence's steps are equal to its forward.

            output_t, state_t = step(input_t, state_{t-1})

        input (B, I) or (I,). hx and the state returned are forward's: (num_layers, B, H), or (num_layers, H), for the
        LSTM a pair; None is zeros. output (B, H) or (H,). Differentiable; dropout between layers only in training.
        Nothing stays on chip between calls, so that backend "auto" takes torch's cells (torch.nn.LSTMCell's); a named
        backend runs its own kernel. The state passes from call to call in input's dtype: in float32 the kernels' bits
        are forward's if x_gates' are, in 16 bits it is rounded each step, which forward does not.

        Raises ValueError for a bidirectional layer and for input of another rank, and forward's errors.

        Source: torch.nn.LSTMCell, GRUCell and RNNCell.

        >>> import torch, fastrnn
        >>> lstm, state = fastrnn.LSTM(3, 5, num_layers=2), None
        >>> for input in torch.randn(7, 2, 3):
        ...     output, state = lstm.step(input, state)
        >>> output.shape, state[0].shape
        (torch.Size([2, 5]), torch.Size([2, 2, 5]))
        """
        return streaming.step(self, input, hx)

    def extra_repr(self) -> str:
        added = f", backend={self.backend!r}" if self.backend != "auto" else ""
        added += f", checkpoint_every={self.checkpoint_every}" if self.checkpoint_every is not None else ""
        return super().extra_repr() + added


@untraced  # torch.compile fails where it traces torch.nn's forward of packed input, instead of stopping before it
def _untraced(module: "_Recurrent", input: Any, hx: Any) -> Any:
    return module._torch.forward(module, input, hx)


def _map(f, state):
    """f of a tensor, of each tensor of a pair, or None of None."""
    if state is None:
        return None
    return tuple(map(f, state)) if isinstance(state, tuple | list) else f(state)


def _reordered(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


class LSTM(_Recurrent):
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

    Layers of one direction run as a wavefront over chunks of time, each on a CUDA stream, if fastrnn.explain says so.

    Raises torch.nn.LSTM's errors for wrong arguments, ValueError for an unknown backend or checkpoint_every,
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


class GRU(_Recurrent):
    """A GRU whose forward and backward passes are one persistent kernel launch each per layer.

        r, z = sigmoid(x + rec),  n = tanh(x_n + r rec_n),  h' = n + z (h - n)

    with x = W_ih x_t + b_ih and rec = W_hh h + b_hh. Constructor, forward, parameters and errors are torch.nn.GRU's;
    backend, checkpoint_every, dtypes and shapes as in fastrnn.LSTM, with hx one tensor (num_layers * D, B, H).

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


class RNN(_Recurrent):
    """A simple recurrent network whose forward and backward passes are one persistent kernel launch each per layer.

        h' = act(W_ih x_t + b_ih + W_hh h + b_hh),  act = tanh or relu

    Constructor (nonlinearity="tanh" or "relu", also as the fourth argument), forward, parameters and errors are
    torch.nn.RNN's; backend, checkpoint_every, dtypes and shapes as in fastrnn.GRU.

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


def explain(module: torch.nn.Module, input: "Tensor | PackedSequence") -> Plan:
    """Print the plan that a fastrnn module would run for this input and, for a fallback, the reason; return it.

    module is a fastrnn.RNN, GRU or LSTM (else a ValueError); nothing is run.
    Raises NotImplementedError, as running would, where the module's named backend cannot run.

    >>> import torch, fastrnn
    >>> plan = fastrnn.explain(fastrnn.LSTM(8, 16), torch.randn(5, 2, 8))
    lstm, T=5, B=2, H=16, float32, on cpu: backend torch
      why       CPU tensors take torch's own kernel
    """
    if not isinstance(module, _Recurrent):
        raise ValueError(f"module: expected a fastrnn.RNN, GRU or LSTM; got {type(module).__name__}")
    chosen = module.plan(input)
    print(chosen)
    return chosen
