"""Swap torch.nn's RNN, GRU and LSTM inside a model for fastrnn's, and back.

The class of a layer is swapped, not the layer, as torch.nn.utils.parametrize and FSDP do it. The object stays, with its
Parameters, hooks, buffers and training mode, and every reference to it stays valid. The new class derives from
fastrnn's class and from the layer's old one, so isinstance(layer, torch.nn.LSTM) remains true.
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
from .modules import GRU, LSTM, RNN, SLSTM

_OURS: dict[type, type] = {torch.nn.RNN: RNN, torch.nn.GRU: GRU, torch.nn.LSTM: LSTM}
_TORCHS = {ours: theirs for theirs, ours in _OURS.items()}
_CONVERTED = (*_TORCHS, SLSTM, foreign.Foreign)
# A subclass may define these names: they have no part in what a layer computes, and the new class inherits them.
_HARMLESS = {"__module__", "__qualname__", "__doc__", "__init__", "__annotations__", "__annotate_func__", "__dict__"}
_HARMLESS |= {"__weakref__", "__static_attributes__", "__firstlineno__", "__orig_bases__", "__parameters__"}
_HARMLESS |= {"reset_parameters", "__abstractmethods__", "_abc_impl"}


def convert(
    model: Module, *, backend: str = "auto", checkpoint_every: int | None = None, subclass: bool = True
) -> Module:
    """Swap every torch.nn.RNN, GRU and LSTM inside a model for fastrnn's, in place, and return the model.

    Each layer remains the same object. Its Parameters, state_dict, hooks, training mode, dtype, device, flat weights of
    cuDNN, parametrizations and sharing are kept, and an optimizer goes on.

    Args:
        model (torch.nn.Module): Any module. A recurrent layer itself is swapped and returned too.
        backend (str): The backend of the new layers, as in `fastrnn.LSTM`. Layers that are fastrnn's already keep
            theirs.
        checkpoint_every (int | None): As backend: that of the new layers.
        subclass (bool): If True, a swapped layer is also an instance of its old class. Code that asks isinstance(layer,
            torch.nn.LSTM), such as TorchRL's modules, then works on. torch.compile breaks the graph around such a
            layer, as it does around torch.nn's, unless torch._dynamo.config.allow_rnn is set. If False, torch.compile
            traces the model whole. In both cases type(layer) is torch.nn.LSTM is false.

    Returns:
        torch.nn.Module: The model that was given.

    Raises:
        ValueError: model is no module, or backend or checkpoint_every is wrong. Nothing is changed then.

    Some layers are left as they are, because code of theirs would be lost: subclasses of torch.nn's classes that
    override what the layer computes, and layers whose forward was replaced. A `fastrnn.FallbackWarning` names them.
    FSDP2's fully_shard makes such subclasses, so convert first. `fastrnn.report` lists all recurrent layers of a model,
    and `fastrnn.revert` goes back. With "auto", packed sequences still run torch's kernel.

    If the packages xlstm and tirex-ts are imported, their sLSTM cells are swapped too. Our kernel then runs the
    recurrence with their parameters in their layout, and the code around a cell is theirs. These cells are always
    instances of their old class. They compute in the input's dtype or autocast's, and in 16 bits they return the states
    (h, c, n, m) in float32. With backend "torch" they are left, because torch has no such kernel.

    Examples:
        >>> import torch, fastrnn
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.GRU(8, 16), "step": torch.nn.LSTMCell(16, 16)})
        >>> model = fastrnn.convert(model)
        >>> print(fastrnn.report(model))
        encoder: fastrnn.GRU(8, 16)
        step: left as it is: a cell runs one time step a call, so nothing stays on chip
        >>> model["encoder"]
        fastrnn.GRU(8, 16)
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

    Cells of other packages that `fastrnn.convert` swapped become theirs again. revert keeps all that convert keeps.
    Layers that torch.nn lacks, and subclasses of fastrnn's classes (fully_shard makes some), are left with a
    `fastrnn.FallbackWarning`.

    Args:
        model (torch.nn.Module): Any module. Without layers of fastrnn it is returned as it is.

    Returns:
        torch.nn.Module: The model that was given.

    Raises:
        ValueError: model is no module.

    Examples:
        >>> import torch, fastrnn
        >>> fastrnn.revert(torch.nn.Sequential(fastrnn.LSTM(8, 16)))
        Sequential(
          (0): LSTM(8, 16)
        )
    """
    swaps, left = _to_theirs(model)
    _warn(left, FallbackWarning)
    for layer, cls in swaps.values():
        layer.__class__ = cls
        for added in _added(cls):
            layer.__dict__.pop(added, None)  # None: a layer that occurs twice is visited twice
    return model


@dataclass(frozen=True)
class Report:
    """The recurrent layers of a model, by qualified name. print(report) lists them.

    Attributes:
        converted (dict[str, torch.nn.Module]): The layers that are fastrnn's.
        left (dict[str, str]): Why each of the other layers is not.
    """

    converted: dict[str, Module]
    left: dict[str, str]

    def __str__(self) -> str:
        rows = [
            f"{_shown(name)}: {layer}, on fastrnn's sLSTM"
            if isinstance(layer, foreign.Foreign)
            else f"{_shown(name)}: {layer}"
            for name, layer in self.converted.items()
        ]
        rows += [f"{_shown(name)}: left as it is: {why}" for name, why in self.left.items()]
        return "\n".join(rows) or "no recurrent layers"


def report(model: Module) -> Report:
    """Say which recurrent layers of a model are fastrnn's, and why the others are not.

    Args:
        model (torch.nn.Module): Any module, before or after `fastrnn.convert`. It is not changed.

    Returns:
        Report: The layers that are fastrnn's, and the reason for each other one.

    Raises:
        ValueError: model is no module.

    Examples:
        >>> import torch, fastrnn
        >>> fastrnn.report(torch.nn.Sequential(torch.nn.LSTM(8, 16))).left
        {'0': 'not converted yet: fastrnn.convert swaps it'}
    """
    swaps, left = _to_ours(model, subclass=True)
    ours = dict(_layers(model, _CONVERTED))
    waiting = dict.fromkeys(swaps, "not converted yet: fastrnn.convert swaps it")
    cells = {
        name: "a cell runs one time step a call, so nothing stays on chip"
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, torch.nn.RNNCellBase)
    }
    return Report(ours, waiting | left | cells)


Swaps = tuple[dict[str, tuple[Any, type]], dict[str, str]]  # layers with their new class; why others are left


def _to_ours(model: Module, subclass: bool, backend: str = "auto") -> Swaps:
    """Find torch.nn's layers and other packages' cells by qualified name, each with the class that it should get."""
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
                left[name] = f"{cls.__name__} is a subclass of {theirs.__name__} and may override its code"
            elif why := foreign.why_left(ours, layer, backend):
                left[name] = why
            else:
                swaps[name] = layer, made(_both(ours, theirs))
        elif why := _own_code(plain, theirs):
            left[name] = f"{cls.__name__} is a subclass of {theirs.__name__} with its own {why}"
        elif plain is not theirs and not subclass:
            left[name] = f"{cls.__name__} is a subclass of {theirs.__name__}, which only subclass=True converts"
        else:
            ours = _OURS[theirs]
            swaps[name] = layer, made(_both(ours, plain) if subclass else ours)
    return swaps, left


def _to_theirs(model: Module) -> Swaps:
    """Find fastrnn's layers by qualified name, each with the class that it should get back."""
    swaps, left = {}, {}
    for name, layer in _layers(model, _CONVERTED):
        cls, (plain, made) = type(layer), _apart(layer)
        ours = next(c for c in _CONVERTED if isinstance(layer, c))
        if "forward" in vars(layer):
            left[name] = "its forward was replaced on the object"
        elif ours is not foreign.Foreign and not layer._stack_is_torchs():  # type: ignore[operator]
            left[name] = "torch has no sLSTM, and no layer with heads, clips, tie_directions, drop_connect or zoneout"
        elif theirs := _TORCHS.get(plain) or vars(plain).get("_theirs"):
            swaps[name] = layer, made(theirs)
        else:
            left[name] = f"{cls.__name__} is a subclass of {ours.__name__} and may override its code"
    return swaps, left


def _layers(model: Module, classes: tuple[type, ...]) -> list[tuple[str, Module]]:
    if not isinstance(model, Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, classes)]


def _added(cls: type) -> tuple[str, str]:
    """The attributes for backend and checkpoint_every, prefixed where another package may use these names."""
    prefix = "" if issubclass(cls, torch.nn.RNNBase) else "fastrnn_"
    return f"{prefix}backend", f"{prefix}checkpoint_every"


def _apart(layer: Module) -> tuple[type, Any]:
    """A layer's class without torch.nn.utils.parametrize, and a function that parametrizes another class likewise.

    parametrize gives each module its own class, which holds the properties that compute the weights.
    """
    cls = type(layer)
    if not is_parametrized(layer):
        return cls, lambda other: other
    own = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return cls.__bases__[0], lambda other: type(cls.__name__, (other,), own)


def _own_code(cls: type, theirs: type) -> str:
    """The names that a subclass defines and that would change our layer; empty if there are none."""
    between = cls.__mro__[: cls.__mro__.index(theirs)]
    defined = dict.fromkeys(name for c in between for name in vars(c))
    used = {*dir(_OURS[theirs]), "backend", "checkpoint_every", "__slots__"} - _HARMLESS
    return ", ".join(name for name in defined if name in used)


@functools.cache
def _both(ours: type, theirs: type) -> type:
    """Make the class that derives from fastrnn's and from a layer's old one. Its layers can be copied and pickled."""

    def reduce(self: Module, protocol: int) -> tuple:
        made, arguments, *rest = super(cls, self).__reduce_ex__(protocol)  # made is copyreg.__newobj__, and takes cls
        if type(self) is not cls:  # parametrized: torch raises its own error, that this cannot be pickled
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
