"""Swap torch.nn's RNN, GRU and LSTM inside a model for fastrnn's, and back.

A layer's class is swapped, not the layer, as torch.nn.utils.parametrize and FSDP do it: the object stays, and with it
its Parameters, hooks, buffers, training mode, and every reference that others hold to it.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from .functional import FallbackWarning
from .modules import GRU, LSTM, RNN
from .planner import BACKENDS, expect
from .validation import check_checkpoint_every

_OURS: dict[type, type] = {torch.nn.RNN: RNN, torch.nn.GRU: GRU, torch.nn.LSTM: LSTM}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Module, *, backend: str = "auto", checkpoint_every: int | None = None) -> Module:
    """Swap every torch.nn.RNN, GRU and LSTM inside a model for fastrnn's, in place, and return the model.

    model is any module; if it is a recurrent layer itself, it is swapped too, and returned. backend and
    checkpoint_every are those of the new layers, as in fastrnn.LSTM; layers that are fastrnn's already keep theirs.
    Each layer stays the same object, so that Parameters (optimizers go on), state_dict, hooks, training mode,
    dtype, device, cuDNN's flat weights, torch.nn.utils.parametrize and sharing (a layer that occurs twice) are
    kept; isinstance(layer, torch.nn.LSTM) is False afterwards. Packed sequences go on running torch's kernel by
    backend "auto".

    Subclasses of torch.nn's classes, and layers whose forward was replaced, are left as they are, since their own
    code would be lost; a fastrnn.FallbackWarning names them. fully_shard (FSDP2) makes subclasses: convert first.
    fastrnn.report says what a model has; fastrnn.revert goes back.

    Raises ValueError for what is no module, an unknown backend or a wrong checkpoint_every; nothing is changed then.

    >>> import torch, fastrnn
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(8, 16), "step": torch.nn.LSTMCell(16, 16)})
    >>> model = fastrnn.convert(model)
    >>> print(fastrnn.report(model))
    encoder: fastrnn.GRU(8, 16)
    step: left as it is: a cell runs one time step, between which nothing stays on chip
    >>> type(fastrnn.revert(model)["encoder"])
    <class 'torch.nn.modules.rnn.GRU'>
    """
    expect("backend", backend, BACKENDS)
    check_checkpoint_every(checkpoint_every)
    swaps, left = _plan(model, _OURS)
    _warn(left, FallbackWarning)
    for layer, cls in swaps.values():
        layer.__class__ = cls
        layer.backend, layer.checkpoint_every = backend, checkpoint_every
    return model


def revert(model: Module) -> Module:
    """Swap every fastrnn.RNN, GRU and LSTM inside a model for torch.nn's, in place, and return the model.

    What convert keeps is kept; a model without layers of fastrnn's is returned as it is. Subclasses of fastrnn's
    classes (fully_shard makes some) are left, with a UserWarning. Raises ValueError for what is no module.

    >>> import torch, fastrnn
    >>> fastrnn.revert(torch.nn.Sequential(fastrnn.LSTM(8, 16)))
    Sequential(
      (0): LSTM(8, 16)
    )
    """
    swaps, left = _plan(model, _TORCHS)
    _warn(left, UserWarning)
    for layer, cls in swaps.values():
        layer.__class__ = cls
        for added in ("backend", "checkpoint_every"):
            layer.__dict__.pop(added, None)  # a layer that occurs twice is met twice
    return model


@dataclass(frozen=True)
class Report:
    """The recurrent layers of a model: converted has fastrnn's and left has why others are not, by qualified name."""

    converted: dict[str, Module]
    left: dict[str, str]

    def __str__(self) -> str:
        rows = [f"{_shown(name)}: fastrnn.{layer}" for name, layer in self.converted.items()]
        rows += [f"{_shown(name)}: left as it is: {why}" for name, why in self.left.items()]
        return "\n".join(rows) or "no recurrent layers"


def report(model: Module) -> Report:
    """Say which recurrent layers of a model are fastrnn's, and why the others are not; before convert, after, any time.

    Raises ValueError for what is no module.

    >>> import torch, fastrnn
    >>> fastrnn.report(torch.nn.Sequential(torch.nn.LSTM(8, 16))).left
    {'0': 'fastrnn.convert has not met it'}
    """
    swaps, left = _plan(model, _OURS)
    ours = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, tuple(_TORCHS))}
    waiting = dict.fromkeys(swaps, "fastrnn.convert has not met it")
    cells = {
        name: "a cell runs one time step, between which nothing stays on chip"
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, torch.nn.RNNCellBase)
    }
    return Report(ours, waiting | left | cells)


def _plan(model: Module, swap: dict[type, type]) -> tuple[dict[str, tuple[Any, type]], dict[str, str]]:
    """By qualified name: layers with the class that each is to have, and why others are left."""
    if not isinstance(model, Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swaps, left = {}, {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, tuple(swap)):
            continue
        cls, base = type(module), type(module).__bases__[0]
        if "forward" in vars(module):
            left[name] = "its forward was replaced on the object"
        elif cls in swap:
            swaps[name] = module, swap[cls]
        elif is_parametrized(module) and base in swap:
            # parametrize gives each module a class of its own, which holds the properties that compute its weights.
            own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
            swaps[name] = module, type(cls.__name__, (swap[base],), own)
        else:
            kind = next(c for c in swap if isinstance(module, c))
            left[name] = f"{cls.__name__} is a subclass of {kind.__name__}, with code of its own"
    return swaps, left


def _warn(left: dict[str, str], category: type[Warning]) -> None:
    if left:
        rows = "; ".join(f"{_shown(name)}: {why}" for name, why in left.items())
        warnings.warn(f"left as they are: {rows}", category, stacklevel=3)


def _shown(name: str) -> str:
    return name or "the model itself"
