"""What the modules share: parameters, the choice of a backend, and input in all its forms.

They have torch.nn.RNNBase, and so the state_dict, with torch.nn's, but not the classes torch.nn.LSTM, GRU and RNN:
torch.compile breaks the graph at those.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..planning.arguments import as_int, check_checkpoint_every, check_clips, check_heads, check_share
from ..planning.planner import BACKENDS, Plan
from ..sequences import Packing, stops_at_torchs_kernels, untraced
from ..stack import Stack
from . import calls, paths, streaming
from .older_tools import OlderTools, leaf_module
from .options import Options
from .validation import check_rank


class Recurrent(OlderTools, torch.nn.RNNBase):
    """What they share: choose a backend, and run it on batched or unbatched input."""

    # torch.nn's own forward of the same layer (and the checks that it calls), for backend "torch".
    _torch: Any
    # Of layers that were pickled before there were any.
    num_heads = 1
    clip_grad_state: float | None = None
    clip_state: float | None = None
    tie_directions = False
    drop_connect = 0.0
    zoneout = 0.0

    def __init__(
        self,
        mode: str,
        *args: Any,
        backend: str = "auto",
        checkpoint_every: int | None = None,
        num_heads: int = 1,
        clip_grad_state: float | None = None,
        clip_state: float | None = None,
        tie_directions: bool = False,
        drop_connect: float = 0.0,
        zoneout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
        checkpoint_every = as_int(checkpoint_every)
        check_checkpoint_every(checkpoint_every)
        check_clips(clip_grad_state=clip_grad_state, clip_state=clip_state)
        check_share("drop_connect", drop_connect)
        check_share("zoneout", zoneout)
        self.init_as(mode, *map(as_int, args), **{name: as_int(value) for name, value in kwargs.items()})
        self.backend = backend
        self.checkpoint_every = checkpoint_every
        self.clip_grad_state, self.clip_state = clip_grad_state, clip_state
        self.drop_connect, self.zoneout = drop_connect, zoneout
        if zoneout and self.proj_size:
            raise NotImplementedError("zoneout with a projection (proj_size) is missing")
        num_heads = as_int(num_heads)
        check_heads(num_heads, self.hidden_size)
        if num_heads > 1:
            self._split(num_heads)
        if tie_directions:
            self._tie()

    def init_as(self, mode: str, *args: Any, **kwargs: Any) -> None:
        torch.nn.RNNBase.__init__(self, mode, *args, **kwargs)

    def _split(self, num_heads: int) -> None:
        """Make W_hh block-diagonal: its blocks' rows only, initialized as they were."""
        if self.proj_size:
            raise NotImplementedError("num_heads with a projection (proj_size) is missing")
        self.num_heads = num_heads
        for name, weight in list(self.named_parameters(recurse=False)):
            if name.startswith("weight_hh"):
                setattr(self, name, torch.nn.Parameter(weight.detach()[:, : self.hidden_size // num_heads].clone()))

    def _tie(self) -> None:
        """Leave out the parameters of direction 1: those of direction 0 are its own."""
        if not self.bidirectional:
            raise ValueError("tie_directions: expected False where bidirectional is, got True")
        self.tie_directions = True
        for name in self._flat_weights_names:
            if name.endswith("_reverse"):
                delattr(self, name)
        self._all_weights = self._all_weights[::2]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """torch.nn's, for cuDNN, which has no heads and not every cell."""
        if self._stack_is_torchs(dropping=False):
            super().flatten_parameters()

    def _stack_is_torchs(self, dropping: bool = True) -> bool:
        """Whether torch has such a layer; of one that drops connections, whether it has it where none are dropped."""
        if self.zoneout or (dropping and self.drop_connect):
            return False
        clips = self.clip_grad_state is not None or self.clip_state is not None
        return self.num_heads == 1 and self.mode != "SLSTM" and not clips and not self.tie_directions

    def _stack(self) -> Stack:
        """What this module is now: any of it may have been set since it was made."""
        return Stack(
            self.mode.lower(), self.num_layers, self.bias, self.batch_first, self.dropout, self.training,
            self.bidirectional, self.backend, self.checkpoint_every, self.num_heads, self.clip_grad_state,
            self.clip_state, self.tie_directions, self.drop_connect, self.zoneout,
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
        whole = backend in ("auto", "torch") and plain and not return_cell_states and self.checkpoint_every is None
        whole = whole and self._stack_is_torchs(dropping=self.training)
        if whole and (backend == "torch" or not input.is_cuda):
            return self._run_torchs(input, hx)
        options = Options.of(lengths, cu_seqlens, reset, reset_state, return_cell_states)
        if packed and not plain:
            raise ValueError("lengths, cu_seqlens, reset: expected None beside a PackedSequence")
        if not packed and cu_seqlens is None and (hx is not None or input.dim() != 3):
            check_rank(self._name, input, hx)
        if whole and calls.backend_of(self.plan(input)) == "torch":
            return self._run_torchs(input, hx)
        if packed or (input.dim() == 2 and cu_seqlens is None):
            if not plain:
                raise ValueError("lengths, reset: expected None beside unbatched input")
            return (self._run_packed if packed else self._run_unbatched)(input, hx, options)
        return self._run(input, hx, options)

    def _run(self, input: Tensor, hx: Any, options: Options) -> tuple:
        """Batched or ragged input."""
        output, finals, *cell_states = paths.run(self._stack(), input, hx, self._params(), options)
        return output, finals[0] if len(finals) == 1 else finals, *cell_states

    def _params(self) -> Any:
        """torch.nn's flat weights, which must be what the parameters are now."""
        own = self._parameters
        try:
            return [own[name] for name in self._flat_weights_names]
        except KeyError:  # a parametrization took one away: an attribute is in its place
            return [getattr(self, name) for name in self._flat_weights_names]

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

    @property
    def _name(self) -> str:
        """torch.nn's, in errors."""
        return self.mode.split("_")[0]

    def extra_repr(self) -> str:
        added = f", backend={self.backend!r}" if self.backend != "auto" else ""
        added += f", checkpoint_every={self.checkpoint_every}" if self.checkpoint_every is not None else ""
        added += f", num_heads={self.num_heads}" if self.num_heads > 1 else ""
        added += ", tie_directions=True" if self.tie_directions else ""
        for name, unset in (("drop_connect", 0.0), ("zoneout", 0.0), ("clip_grad_state", None), ("clip_state", None)):
            added += f", {name}={getattr(self, name)}" if getattr(self, name) != unset else ""
        return super().extra_repr() + added


@untraced  # torch.compile fails where it traces torch.nn's forward of packed input, instead of stopping before it
def _untraced(module: "Recurrent", input: Any, hx: Any) -> Any:
    return module._torch.forward(module, input, hx)


def _map(f, state):
    """f of a tensor, of each tensor of a pair, or None of None."""
    if state is None:
        return None
    return tuple(map(f, state)) if isinstance(state, tuple | list) else f(state)


def _reordered(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)
