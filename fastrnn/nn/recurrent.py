"""What the modules share: parameters, the choice of a backend, and the forms of input.

The classes derive from torch.nn.RNNBase, so their parameters and state_dict are torch.nn's. They do not derive from
torch.nn.LSTM, GRU and RNN, because torch.compile breaks its graph at those.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..planning import cpu
from ..planning.arguments import as_int, check_checkpoint_every, check_clips, check_heads, check_share
from ..planning.planner import BACKENDS, Plan
from ..sequences import Packing, stops_at_torchs_kernels, untraced
from ..stack import Stack
from . import calls, paths, streaming
from .older_tools import OlderTools, leaf_module
from .options import Options, check_packed, named
from .shown import Shown
from .validation import check_rank


class Recurrent(OlderTools, Shown, torch.nn.RNNBase):
    """The base class of all layers: it chooses a backend, and takes batched, unbatched, ragged and packed input."""

    # The class of torch.nn whose forward runs for backend "torch".
    _torch: Any
    # Defaults for layers that were pickled before these options existed.
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
        """Make the parameters, as torch.nn.RNNBase does for this mode."""
        torch.nn.RNNBase.__init__(self, mode, *args, **kwargs)

    def _split(self, num_heads: int) -> None:
        """Make W_hh block-diagonal: keep the columns of one block, with their initial values."""
        if self.proj_size:
            raise NotImplementedError("num_heads with a projection (proj_size) is missing")
        self.num_heads = num_heads
        for name, weight in list(self.named_parameters(recurse=False)):
            if name.startswith("weight_hh"):
                setattr(self, name, torch.nn.Parameter(weight.detach()[:, : self.hidden_size // num_heads].clone()))

    def _tie(self) -> None:
        """Remove the parameters of direction 1, which uses those of direction 0."""
        if not self.bidirectional:
            raise ValueError("tie_directions: expected False for a layer of one direction, got True")
        self.tie_directions = True
        for name in self._flat_weights_names:
            if name.endswith("_reverse"):
                delattr(self, name)
        self._all_weights = self._all_weights[::2]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]

    def flatten_parameters(self) -> None:
        """Lay the weights out for cuDNN, as torch.nn does. Where torch has no such layer, do nothing."""
        if self._stack_is_torchs(dropping=False):
            super().flatten_parameters()

    def _stack_is_torchs(self, dropping: bool = True) -> bool:
        """Whether torch has a kernel for this layer. With dropping=False, as if drop_connect were 0."""
        if self.zoneout or (dropping and self.drop_connect) or self.tie_directions or self.num_heads != 1:
            return False
        return self.mode != "SLSTM" and self.clip_grad_state is None and self.clip_state is None

    def _stack(self) -> Stack:
        """The module's settings now. Any of them may have been set after the constructor ran."""
        return Stack(
            self.mode.lower(), self.num_layers, self.bias, self.batch_first, self.dropout, self.training,
            self.bidirectional, self.backend, self.checkpoint_every, self.num_heads, self.clip_grad_state,
            self.clip_state, self.tie_directions, self.drop_connect, self.zoneout,
        )  # fmt: skip

    def plan(self, input: "Tensor | PackedSequence", **options: Any) -> Plan:
        """Return the plan that forward(input, **options) follows: the backend, why, and the kernel's launch.

        Args:
            input (Tensor | PackedSequence): An input that forward accepts. Only its shape, dtype and device matter.
            **options: lengths, cu_seqlens, reset, reset_state and return_cell_states, as forward takes them. Only
                their shapes matter.

        Returns:
            Plan: What would run. Nothing is run.

        Raises:
            ValueError: An option does not fit.
            NotImplementedError: The module's named backend cannot run. The message names what is missing.

        Examples:
            >>> import torch, fastrnn
            >>> fastrnn.GRU(8, 16, backend="reference").plan(torch.randn(5, 2, 8), lengths=[5, 3]).backend
            'reference'
        """
        return calls.plan_of(self._stack(), self.hidden_size, self.proj_size or self.hidden_size, input, named(options))

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
        """Run all layers over all time steps. Sequences may differ in length, and may be reset inside.

            the state of sequence b before step t is reset_state where reset[t, b];  its last step is lengths[b] - 1

        Args:
            input (Tensor | PackedSequence): (T, B, I), or (B, T, I) with batch_first; unbatched (T, I); ragged (total,
                I) with cu_seqlens; or a PackedSequence, and then output is one too.
            hx (Tensor | tuple[Tensor, ...] | None): The first state, (num_layers * D, B, H), or (num_layers * D, H)
                without a batch. The LSTM takes a pair (h_0, c_0). None is zeros.
            lengths (Tensor | Sequence[int] | None): (B,), int64 or int32, each from 0 to T. Output is zero past the end
                of a sequence, and the final state is the state at its end. Direction 1 begins at that end. Padding is
                never read and may hold NaN. The result is that of pack_padded_sequence, but sequences need no order and
                lengths may be on the GPU. A sequence of length 0 returns hx as its final state.
            cu_seqlens (Tensor | Sequence[int] | None): (N + 1,), int64 or int32. Sequence n is rows cu_seqlens[n] to
                cu_seqlens[n + 1] of input, as in flash attention.
            reset (Tensor | Sequence | None): bool (T, B), or (B, T) with batch_first, or ragged (total,). True begins a
                new segment at this step. Segments do not see each other: the state starts anew before this step and, in
                direction 1, after it.
            reset_state (Tensor | tuple[Tensor, ...] | None): The state after a reset, in the form of hx. None is zeros.
                Shape (num_layers * D, B or 1, H), or one state a step: (T, num_layers * D, B or 1, H), ragged (total,
                num_layers * D, 1, H). The state of a step is used where that step begins a segment.
            return_cell_states (bool): For the LSTM: whether to return c of all time steps too.

        Returns:
            output (Tensor | PackedSequence): h of the last layer at every step: `(T, B, D*H)`, or in the form of input.
            state (Tensor | tuple[Tensor, ...]): The final state, shaped as hx: h_n, or for the LSTM (h_n, c_n).
            cell_states (Tensor | PackedSequence): With return_cell_states only: c of the last layer at every step,
                shaped as output.

        Raises:
            ValueError: An argument does not fit. The message says what was expected and what was given. torch.nn's own
                errors keep their types and texts.
            NotImplementedError: checkpoint_every meets ragged or packed input, or it meets lengths or resets in a
                bidirectional layer or with backend="torch".

        lengths, cu_seqlens and reset may also be lists or NumPy arrays. Wrong values of lengths or cu_seqlens on a GPU
        raise asynchronously: a later call fails with "device-side assert triggered". To see which call was wrong, give
        them on the CPU, or set CUDA_LAUNCH_BLOCKING=1.

        Examples:
            >>> import torch, fastrnn
            >>> gru, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
            >>> output, h_n = gru(x, lengths=torch.tensor([5, 3]))
            >>> torch.equal(h_n[0, 1], output[2, 1]), output[3:, 1].count_nonzero().item()
            (True, 0)
            >>> episodes, _ = gru(x, reset=torch.tensor([[False, True]] + 4 * [[False, False]]).roll(2, 0))
            >>> torch.allclose(episodes[2:, 1], gru(x[2:])[0][:, 1])
            True
        """
        # CPU tensors take torch's path as early as possible: a plan is asked for only where a call takes far longer.
        plain = lengths is None and cu_seqlens is None and reset is None and reset_state is None
        backend, packed = self.backend, isinstance(input, PackedSequence)
        ours = plain and hx is None and (input.is_cuda or backend not in ("auto", "torch"))
        if ours and not (packed or return_cell_states):
            found = paths.again(self._stack(), input, self._params())
            if found is not None:
                return found
        whole = plain and not return_cell_states and self.checkpoint_every is None and backend in ("auto", "torch")
        whole = whole and self._stack_is_torchs(self.training)
        asked = whole and backend == "auto" and (input.is_cuda or cpu.may_pay(self.mode, input, self.batch_first))
        if whole and not asked:
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
        """Run batched or ragged input."""
        output, finals, *cell_states = paths.run(self._stack(), input, hx, self._params(), options)
        return output, finals[0] if len(finals) == 1 else finals, *cell_states

    def _params(self) -> Any:
        """The parameters of this moment, in the order of torch.nn's flat weights."""
        own = self._parameters
        try:
            return [own[name] for name in self._flat_weights_names]
        except KeyError:  # a parametrization replaced a parameter by a property
            return [getattr(self, name) for name in self._flat_weights_names]

    def _run_unbatched(self, input: Tensor, hx: Any, options: Options) -> tuple:
        batch_dim = 0 if self.batch_first else 1
        hx = _map(lambda state: state.unsqueeze(1), hx)
        output, state, *cell_states = self._run(input.unsqueeze(batch_dim), hx, options)
        outputs = [y.squeeze(batch_dim) for y in (output, *cell_states)]
        return outputs[0], _map(lambda s: s.squeeze(1), state), *outputs[1:]

    def _run_packed(self, input: PackedSequence, hx: Any, options: Options) -> tuple:
        check_packed(input.data.device)
        packing, order = Packing.of(input), (input.sorted_indices, input.unsorted_indices)
        hx = _map(lambda state: _reordered(state, order[0]), hx)
        of_packing = Options.of(cu_seqlens=packing.cu_seqlens, cell_states=options.cell_states)
        output, state, *cell_states = self._run(input.data[packing.slot], hx, of_packing)
        outputs = [PackedSequence(y[packing.packed], input.batch_sizes, *order) for y in (output, *cell_states)]
        return outputs[0], _map(lambda s: _reordered(s, order[1]), state), *outputs[1:]

    def _run_torchs(self, input: Any, hx: Any) -> Any:
        """Run torch.nn's forward. Where torch.compile cannot trace it, or only in minutes, the graph breaks here."""
        untraced = isinstance(input, PackedSequence) or stops_at_torchs_kernels()
        return (_untraced if untraced else self._torch.forward)(self, input, hx)

    def step(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """Run one time step. The steps of a sequence give what forward gives for the whole sequence.

            output_t, state_t = step(input_t, state_{t-1})

        Args:
            input (Tensor): (B, I), or (I,) without a batch.
            hx (Tensor | tuple[Tensor, ...] | None): The state before this step: (num_layers, B, H), or (num_layers, H)
                without a batch. The LSTM takes a pair. None is zeros.

        Returns:
            output (Tensor): h of the last layer, (B, H) or (H,).
            state (Tensor | tuple[Tensor, ...]): The state after this step, shaped as hx.

        Raises:
            ValueError: The layer is bidirectional, or input has another rank.

        Other errors are those of forward. The step is differentiable. Dropout between layers acts in training only.

        Nothing stays on chip between two calls. "auto" therefore takes torch's cells, such as torch.nn.LSTMCell; a
        named backend runs its own kernel. The state passes from call to call in the input's dtype. In float32 the
        kernels then give forward's bits if x_gates has them. In 16 bits the state is rounded at each step, but not in
        forward.

        Source: torch.nn.LSTMCell, GRUCell and RNNCell.

        Examples:
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
        """The name that torch.nn's errors give this layer."""
        return self.mode.split("_")[0]


@untraced  # torch.compile fails inside torch.nn's forward of packed input: break the graph before it
def _untraced(module: "Recurrent", input: Any, hx: Any) -> Any:
    return module._torch.forward(module, input, hx)


def _map(f, state):
    """f of a tensor, or of each tensor of a tuple. None stays None."""
    return tuple(map(f, state)) if isinstance(state, tuple | list) else None if state is None else f(state)


def _reordered(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)
