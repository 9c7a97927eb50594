"""Adapters of other libraries, each imported where it is used.

Each returns the function from input (T, B, I) to y, the tensors whose gradients it gives, and how those become the
gradients of torch.nn's parameters. NotImplementedError says what one lacks; whatever else it raises says why it does
not run here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .workload import Data


def _only_one_plain_layer(data: Data, library: str) -> None:
    workload = data.workload
    if workload.kind != "plain" or workload.layers > 1 or workload.shape.D > 1:
        raise NotImplementedError(f"{library} has one layer of one direction, without lengths or resets")


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_()


_OF_FLASHRNN = {"lstm": "lstm", "gru": "gru", "rnn_tanh": "elman", "slstm": "slstm"}


def flashrnn(data: Data, backend: str = "") -> tuple:
    """FlashRNN (NX-AI/flashrnn, README): fused CUDA, alternating for the GRU; heads of the same size."""
    from flashrnn import flashrnn as run  # type: ignore[import-not-found]

    workload = data.workload
    _only_one_plain_layer(data, "FlashRNN")
    if workload.cell not in _OF_FLASHRNN:
        raise NotImplementedError(f"FlashRNN has no {workload.cell}")
    if data.device == "cpu" and not backend:
        raise NotImplementedError("FlashRNN's kernels are for CUDA")
    if backend == "triton_fused" and workload.cell not in ("lstm", "slstm"):
        raise NotImplementedError(f"FlashRNN has no {workload.cell.upper()} in Triton")
    H = workload.shape.H
    N = workload.heads
    backend = backend or ("cuda" if workload.cell == "gru" else "cuda_fused")
    heads = (-1, N, H)  # of the rows of every parameter
    W_ih, (R, b_ih, b_hh) = _leaf(data.params[0]), (p.unflatten(0, heads) for p in data.params[1:])
    if workload.cell == "gru":  # gates n, r, z of the state, and four biases: the state's share of n is apart
        R, b = R[[2, 0, 1]], torch.stack([b_hh[2], b_ih[0] + b_hh[0], b_ih[1] + b_hh[1], b_ih[2]])
    else:
        b = b_ih + b_hh
    R, b = _leaf(R), _leaf(b)
    dtype = str(data.input.dtype).removeprefix("torch.")

    def call(input: Tensor) -> Tensor:
        Wx = linear(input.transpose(0, 1), W_ih).unflatten(-1, heads)
        states, _ = run(Wx, R, b, function=_OF_FLASHRNN[workload.cell], backend=backend, dtype=dtype)
        return states[0].transpose(0, 1).flatten(2)  # (B, T, N, H) of h

    def in_order(gradients: list[Tensor]) -> list[Tensor]:
        dW_ih, dR, db = gradients
        if workload.cell == "gru":
            dR, db_ih, db_hh = dR[[1, 2, 0]], db[[1, 2, 3]], db[[1, 2, 0]]
        else:
            db_ih = db_hh = db
        return [dW_ih, dR.flatten(0, 2), db_ih.flatten(), db_hh.flatten()]

    return call, [W_ih, R, b], in_order


def haste(data: Data) -> tuple:
    """haste (lmnt-com/haste, frameworks/pytorch): LSTM and GRU in fp32, matrices transposed, gates in its own order."""
    import haste_pytorch  # type: ignore[import-not-found]

    workload = data.workload
    _only_one_plain_layer(data, "haste")
    if workload.cell not in ("lstm", "gru") or workload.dtype != "float32":
        raise NotImplementedError("haste has LSTM and GRU in float32")
    # torch's rows i f g o are haste's i g f o; r z n are z r n. Both are their own inverses.
    order = [0, 2, 1, 3] if workload.cell == "lstm" else [1, 0, 2]

    def reordered(tensor: Tensor) -> Tensor:  # (G*H, ...)
        return torch.cat([tensor.chunk(len(order))[gate] for gate in order])

    (W_ih, W_hh, b_ih, b_hh), lstm = data.params, workload.cell == "lstm"
    biases = [b_ih + b_hh] if lstm else [b_ih, b_hh]
    module: Any = (haste_pytorch.LSTM if lstm else haste_pytorch.GRU)(workload.I, workload.shape.H).to(data.device)
    names = ["kernel", "recurrent_kernel", "bias", *["recurrent_bias"] * (not lstm)]
    with torch.no_grad():
        for name, value in zip(names, [W_ih.T, W_hh.T, *biases], strict=True):
            getattr(module, name).copy_(reordered(value.T).T if value.dim() == 2 else reordered(value))

    def in_order(gradients: list[Tensor]) -> list[Tensor]:
        dW_ih, dW_hh, *db = gradients
        return [reordered(g) for g in (dW_ih.T, dW_hh.T, db[0], db[-1])]

    return lambda input: module(input)[0], [getattr(module, name) for name in names], in_order


def torchrl(backend: str, anywhere: bool = False) -> Callable[[Data], tuple]:
    """TorchRL's LSTMModule and GRUModule (torchrl.modules) in recurrent mode, from TensorDicts.

    anywhere: whether kernels may be given CPU tensors, since they are not run.
    """

    def build(data: Data) -> tuple:
        from tensordict import TensorDict  # type: ignore[import-not-found]
        from torchrl.modules import GRUModule, LSTMModule  # type: ignore[import-not-found]

        workload = data.workload
        T, B, H, D = workload.shape
        if workload.cell not in ("lstm", "gru") or D > 1 or workload.kind == "ragged":
            raise NotImplementedError("TorchRL has LSTM and GRU of one direction, with resets but without lengths")
        if backend == "triton" and data.device == "cpu" and not anywhere:
            raise NotImplementedError("TorchRL's Triton kernels are for CUDA")
        name, options = workload.nn()
        inner = getattr(torch.nn, name)(**options, batch_first=True).to(data.device, data.input.dtype)
        with torch.no_grad():
            for own, given in zip(inner.parameters(), data.params, strict=True):
                own.copy_(given)
        states = ["h", "c"] if workload.cell == "lstm" else ["h"]
        keys = {"in_keys": ["x", *states], "out_keys": ["y", *(("next", s) for s in states)]}
        keys |= {"default_recurrent_mode": True, "recurrent_backend": backend}
        module = LSTMModule(lstm=inner, **keys) if workload.cell == "lstm" else GRUModule(gru=inner, **keys)
        zeros = {s: data.input.new_zeros(B, T, workload.layers, H) for s in states}
        starts = torch.zeros(B, T, 1, dtype=torch.bool, device=data.device)
        if data.reset is not None:
            starts = data.reset.T.unsqueeze(-1)

        def call(input: Tensor) -> Tensor:
            batch = TensorDict({"x": input.transpose(0, 1), "is_init": starts, **zeros}, [B, T], device=data.device)
            return module(batch)["y"].transpose(0, 1)

        return call, list(inner.parameters()), list

    return build


def torchrl_function(data: Data) -> tuple:
    """The functions beneath those modules, lstm_triton and gru_triton (torchrl 0.14), which are private."""
    from torchrl.modules.tensordict_module import _rnn_triton  # type: ignore[import-not-found]

    workload = data.workload
    _only_one_plain_layer(data, "TorchRL's function")
    if workload.cell not in ("lstm", "gru"):
        raise NotImplementedError("TorchRL has LSTM and GRU")
    T, B, H, _ = workload.shape
    run = getattr(_rnn_triton, f"{workload.cell}_triton")
    params, zeros = [_leaf(p) for p in data.params], data.input.new_zeros(B, T, H)
    states = (zeros, zeros) if workload.cell == "lstm" else (zeros,)
    starts = torch.zeros(B, T, dtype=torch.bool, device=data.device)

    def call(input: Tensor) -> Tensor:
        return run(input.transpose(0, 1), *states, *params, starts)[0].transpose(0, 1)

    return call, params, list
