"""The layer of sLSTM cells, which torch.nn lacks."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .recurrent import Recurrent


class SLSTM(Recurrent):
    """Stacked sLSTM layers. Each pass of a layer, forward or backward, is one launch of a persistent kernel.

        i, f, z, o = W_ih x + b_ih + W_hh h + b_hh;    l = m + logsigmoid(f);    m' = max(i, l), but i where n is 0
        c' = exp(l - m') c + exp(i - m') tanh(z);    n' = exp(l - m') n + exp(i - m');    h' = sigmoid(o) c' / n'

    m only rescales c and n, so that exp cannot overflow. h does not depend on it, and no gradient goes through it. From
    a zero state n is at least 1, because one of the two exp is 1. The rule n' = max(n', 1) of FlashRNN is therefore the
    same cell. It would differ only where hx or reset_state has an n between 0 and 1.

    The arguments are those of `fastrnn.LSTM`, without proj_size: input_size, hidden_size, num_layers, bias,
    batch_first, dropout, bidirectional, device, dtype, backend, checkpoint_every, num_heads, clip_grad_state,
    clip_state, tie_directions, drop_connect and zoneout. Torch has no such kernel: where none of ours runs, "auto"
    takes the reference, a loop in torch. On CPU tensors ours needs llvmlite.

    The parameters of a layer are weight_ih_l0 `(4*H, I)`, weight_hh_l0 `(4*H, K)` with K = H / num_heads, bias_ih_l0
    and bias_hh_l0 `(4*H,)`. Their gates are in the order i, f, z, o. hx and the final state are tuples (h, c, n, m),
    each (num_layers * D, B, H). None is zeros. States are float32 where the input has 16 bits, since rounded m and n
    would mean nothing. hx may have either dtype.

    Errors are those of `fastrnn.LSTM`.

    Source: Beck et al. 2024 (arXiv:2405.04517), section 2.2.

    Examples:
        >>> import torch, fastrnn
        >>> slstm = fastrnn.SLSTM(10, 20, num_heads=4)
        >>> output, (h_n, c_n, n_n, m_n) = slstm(torch.randn(5, 3, 10))
        >>> output.shape, m_n.shape, slstm.weight_hh_l0.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]), torch.Size([80, 5]))
    """

    _torch = torch.nn.LSTM  # for tools that ask for torch's class; its kernel is never run

    if not TYPE_CHECKING:

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if "proj_size" in kwargs or len(args) > 7:  # torch.nn.LSTM's eighth argument is proj_size
                raise ValueError("proj_size argument is only supported for LSTM, not SLSTM")
            super().__init__("SLSTM", *args, **kwargs)

    else:  # for editors, type checkers and the reference

        def __init__(
            self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
            batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, *,
            device: Any = None, dtype: Any = None, backend: str = "auto",
            checkpoint_every: int | None = None, num_heads: int = 1, clip_grad_state: float | None = None,
            clip_state: float | None = None, tie_directions: bool = False, drop_connect: float = 0.0,
            zoneout: float = 0.0,
        ) -> None: ...  # fmt: skip

    def init_as(self, mode: str, *args: Any, **kwargs: Any) -> None:
        """Initialize as an LSTM, which has as many gates: torch.nn.RNNBase accepts only torch's own modes."""
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
        """Run all layers over all time steps. Sequences may differ in length, and may be reset inside.

        Args:
            input (Tensor | PackedSequence): See `fastrnn.LSTM.forward`.
            hx (tuple[Tensor, ...] | None): The first states (h, c, n, m), each (num_layers * D, B, H). None is zeros.
            lengths (Tensor | Sequence[int] | None): See `fastrnn.LSTM.forward`.
            cu_seqlens (Tensor | Sequence[int] | None): See `fastrnn.LSTM.forward`.
            reset (Tensor | Sequence | None): See `fastrnn.LSTM.forward`.
            reset_state (tuple[Tensor, ...] | None): The states (h, c, n, m) after a reset, each shaped as in
                `fastrnn.LSTM.forward`.
            return_states (bool): Whether to return the states of all time steps too.

        Returns:
            output (Tensor): h of the last layer at every step, shaped as in `fastrnn.LSTM.forward`.
            state (tuple[Tensor, ...]): The final states (h, c, n, m), each (num_layers * D, B, H).
            states (tuple[Tensor, ...]): With return_states only: (h, c, n, m) of the last layer at every step, each
                shaped as output. h has output's dtype, the others are float32 at least. They are differentiable.

        Errors are those of `fastrnn.LSTM.forward`.

        Examples:
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
