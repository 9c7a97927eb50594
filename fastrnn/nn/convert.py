"""Swap torch.nn's RNN, GRU and LSTM inside a model for fastrnn's, and back.

A layer's class is swapped, not the layer, as torch.nn.utils.parametrize and FSDP do it: the object stays, and with it
its Parameters, hooks, buffers, training mode, and every reference that others hold to it. The new class is made of
fastrnn's and of the one that the layer had, so that isinstance(layer, torch.nn.LSTM) goes on being true.
"""

import functools
import types
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import is_parametrized

from ..planning.arguments import check_checkpoint_every, expect
from ..planning.planner import BACKENDS
from . import foreign
from .calls import FallbackWarning
from .modules import GRU, LSTM, RNN

_OURS: dict[type, type] = {torch.nn.RNN: RNN, torch.nn.GRU: GRU, torch.nn.LSTM: LSTM}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}
_CONVERTED = (*_TORCHS, foreign.Foreign)
# What a subclass may define, and go on having, without a part in what the layer computes.
_HARMLESS = {"__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__annotate_func__", "__dict__"}
_HARMLESS |= {"__weakref__", "__static_attributes__", "__firstlineno__", "__orig_bases__", "__parameters__"}
_HARMLESS |= {"reset_parameters", "__abstractmethods__", "_abc_impl"}


def convert(
    model: Module, *, backend: str = "auto", checkpoint_every: int | None = None, subclass: bool = True
) -> Module:
    """Swap every torch.nn.RNN, GRU and LSTM inside a model for fastrnn's, in place, and return the model.

    model is any module; if it is a recurrent layer itself, it is swapped too, and returned. backend and
    checkpoint_every are those of the new layers, as in fastrnn.LSTM; layers that are fastrnn's already keep theirs.
    Each layer stays the same object, so that Parameters (optimizers go on), state_dict, hooks, training mode,
    dtype, device, cuDNN's flat weights, torch.nn.utils.parametrize and sharing (a layer that occurs twice) are
    kept. Packed sequences go on running torch's kernel by backend "auto".

    subclass: whether a layer is an instance of the class that it had, beside fastrnn's: what asks
    isinstance(layer, torch.nn.LSTM), as TorchRL's modules and functions that initialize do, goes on working;
    type(layer) is torch.nn.LSTM is false either way. torch.compile breaks the graph before and after such a layer, as
    at torch.nn's, unless torch._dynamo.config.allow_rnn is set; without subclass it traces the model whole.

    Subclasses of torch.nn's classes whose own code has a part in what they compute, and layers whose forward was
    replaced, are left as they are, since that code would be lost; a fastrnn.FallbackWarning names them.
    fully_shard (FSDP2) makes such subclasses: convert first. fastrnn.report says what a model has; fastrnn.revert goes
    back.

    sLSTM cells of the packages xlstm and tirex-ts are swapped too, if they are there: the recurrence is then ours, with
    their parameters in their layout, and what is around a cell is theirs. They stay instances of their class whatever
    subclass is, compute in their input's dtype or autocast's, and return states (h, c, n, m) in float32 for 16 bits.
    With backend "torch", which has no such kernel, they are left.

    Raises ValueError for what is no module, an unknown backend or a wrong checkpoint_every; nothing is changed then.

    >>> import torch, fastrnn
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(8, 16), "step": torch.nn.LSTMCell(16, 16)})
    >>> model = fastrnn.convert(model)
    >>> print(fastrnn.report(model))
    encoder: fastrnn.GRU(8, 16)
    step: left as it is: a cell runs one time step, between which nothing stays on chip
    >>> isinstance(model["encoder"], fastrnn.GRU), isinstance(model["encoder"], torch.nn.GRU)
    (True, True)
    >>> type(fastrnn.revert(model)["encoder"])
    <class 'torch.nn.modules.rnn.GRU'>
    """
    expect("backend", backend, BACKENDS)
    check_checkpoint_every(checkpoint_every)
    swaps, left = _to_ours(model, subclass, backend)
    _warn(left, FallbackWarning)
    for layer, cls in swaps.values():
        layer.__class__ = cls
        vars(layer).update(zip(_added(cls), (backend, checkpoint_every), strict=True))
    return model


def revert(model: Module) -> Module:
    """Swap every fastrnn.RNN, GRU and LSTM inside a model for torch.nn's, in place, and return the model.

    Cells of other packages that convert swapped are theirs again. What convert keeps is kept; a model without layers of
    fastrnn's is returned as it is. Subclasses of fastrnn's classes (fully_shard makes some) are left, with a
    UserWarning. Raises ValueError for what is no module.

    >>> import torch, fastrnn
    >>> fastrnn.revert(torch.nn.Sequential(fastrnn.LSTM(8, 16)))
    Sequential(
      (0): LSTM(8, 16)
    )
    """
    swaps, left = _to_theirs(model)
    _warn(left, UserWarning)
    for layer, cls in swaps.values():
        layer.__class__ = cls
        for added in _added(cls):
            layer.__dict__.pop(added, None)  # a layer that occurs twice is met twice
    return model


@dataclass(frozen=True)
class Report:
    """The recurrent layers of a model: converted has fastrnn's and left has why others are not, by qualified name."""

    converted: dict[str, Module]
    left: dict[str, str]

    def __str__(self) -> str:
        rows = [
            f"{_shown(name)}: {layer}, on fastrnn's sLSTM"
            if isinstance(layer, foreign.Foreign)
            else f"{_shown(name)}: fastrnn.{layer}"
            for name, layer in self.converted.items()
        ]
        rows += [f"{_shown(name)}: left as it is: {why}" for name, why in self.left.items()]
        return "\n".join(rows) or "no recurrent layers"


def report(model: Module) -> Report:
    """Say which recurrent layers of a model are fastrnn's, and why the others are not; before convert, after, any time.

    Raises ValueError for what is no module.

    >>> import torch, fastrnn
    >>> fastrnn.report(torch.nn.Sequential(torch.nn.LSTM(8, 16))).left
    {'0': 'fastrnn.convert has not met it'}
    """
    swaps, left = _to_ours(model, subclass=True)
    ours = dict(_layers(model, _CONVERTED))
    waiting = dict.fromkeys(swaps, "fastrnn.convert has not met it")
    cells = {
        name: "a cell runs one time step, between which nothing stays on chip"
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, torch.nn.RNNCellBase)
    }
    return Report(ours, waiting | left | cells)


Swaps = tuple[dict[str, tuple[Any, type]], dict[str, str]]  # layers with the class to have, and why others are left


def _to_ours(model: Module, subclass: bool, backend: str = "auto") -> Swaps:
    """By qualified name: torch.nn's layers, cells of other packages, and what is to become of each."""
    swaps, left = {}, {}
    others = foreign.known()
    for name, layer in _layers(model, (*_OURS, *others)):
        if isinstance(layer, _CONVERTED):
            continue
        cls, (plain, made) = type(layer), _apart(layer)
        if "forward" in vars(layer):
            left[name] = "its forward was replaced on the object"
            continue
        theirs = next(c for c in (*_OURS, *others) if isinstance(layer, c))
        if theirs in others:
            ours = others[theirs]
            if plain is not theirs:
                left[name] = f"{cls.__name__} is a subclass of {theirs.__name__}, which may have code of its own"
            elif why := foreign.why_left(ours, layer, backend):
                left[name] = why
            else:
                swaps[name] = layer, made(_both(ours, theirs))
        elif why := _own_code(plain, theirs):
            left[name] = f"{cls.__name__} is a subclass of {theirs.__name__}, with code of its own: {why}"
        elif plain is not theirs and not subclass:
            left[name] = f"{cls.__name__} is a subclass of {theirs.__name__}, which it stays with subclass=True only"
        else:
            ours = _OURS[theirs]
            swaps[name] = layer, made(_both(ours, plain) if subclass else ours)
    return swaps, left


def _to_theirs(model: Module) -> Swaps:
    """By qualified name: fastrnn's layers and what is to become of each."""
    swaps, left = {}, {}
    for name, layer in _layers(model, _CONVERTED):
        cls, (plain, made) = type(layer), _apart(layer)
        ours = next(c for c in _CONVERTED if isinstance(layer, c))
        if "forward" in vars(layer):
            left[name] = "its forward was replaced on the object"
        elif ours is not foreign.Foreign and not layer._stack_is_torchs():  # type: ignore[operator]
            left[name] = "torch has no layer in heads, with tied directions, that clips, drops connections or zones out"
        elif theirs := _TORCHS.get(plain) or vars(plain).get("_theirs"):
            swaps[name] = layer, made(theirs)
        else:
            left[name] = f"{cls.__name__} is a subclass of {ours.__name__}, with code of its own"
    return swaps, left


def _layers(model: Module, classes: tuple[type, ...]) -> list[tuple[str, Module]]:
    if not isinstance(model, Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, classes)]


def _added(cls: type) -> tuple[str, str]:
    """The attributes for backend and checkpoint_every; another package's cell may have such of its own."""
    prefix = "" if issubclass(cls, torch.nn.RNNBase) else "fastrnn_"
    return f"{prefix}backend", f"{prefix}checkpoint_every"


def _apart(layer: Module) -> tuple[type, Any]:
    """A layer's class before torch.nn.utils.parametrize, and the function that makes the like of today's of another.

    parametrize gives each module a class of its own, which holds the properties that compute its weights.
    """
    cls = type(layer)
    if not is_parametrized(layer):
        return cls, lambda other: other
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return cls.__bases__[0], lambda other: type(cls.__name__, (other,), own)


def _own_code(cls: type, theirs: type) -> str:
    """What a subclass defines that its layer needs and ours has by another name or not at all; names, or none."""
    between = cls.__mro__[: cls.__mro__.index(theirs)]
    defined = dict.fromkeys(name for c in between for name in vars(c))
    used = {*dir(_OURS[theirs]), "backend", "checkpoint_every", "__slots__"} - _HARMLESS
    return ", ".join(name for name in defined if name in used)


@functools.cache
def _both(ours: type, theirs: type) -> type:
    """A class that is fastrnn's and the one that a layer had; layers of it are copied and pickled."""

    def reduce(self: Module, protocol: int) -> tuple:
        made, arguments, *rest = super(cls, self).__reduce_ex__(protocol)  # of copyreg.__newobj__, cls
        if type(self) is not cls:  # parametrized, which says itself that it cannot be pickled
            return made, arguments, *rest
        return _new, (ours, theirs), *rest

    names = {"__module__": __name__, "__reduce_ex__": reduce, "_theirs": theirs}
    cls = types.new_class(theirs.__name__, (ours, theirs), {}, lambda namespace: namespace.update(names))
    return cls


def _new(ours: type, theirs: type) -> Any:
    return object.__new__(_both(ours, theirs))


def _warn(left: dict[str, str], category: type[Warning]) -> None:
    if left:
        rows = "; ".join(f"{_shown(name)}: {why}" for name, why in left.items())
        warnings.warn(f"left as they are: {rows}", category, stacklevel=3)


def _shown(name: str) -> str:
    return name or "the model itself"
