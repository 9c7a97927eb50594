"""What torch's older tools ask of a layer: torch.fx, torch.jit.script, and eager quantization (torch.ao.quantization).

They know torch.nn's layers by their classes. torch.jit.trace and both ONNX exporters need nothing of this; how a model
is exported with each is in docs/deploying.md.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy

F = TypeVar("F", bound=Callable[..., Any])


def leaf(function: F) -> F:
    """A decorator: torch.fx.symbolic_trace writes a call of the function down, and does not look inside."""

    @functools.wraps(function)
    def call(input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            return input.tracer.create_proxy("call_function", call, (input, *args), kwargs)
        return function(input, *args, **kwargs)

    return call  # type: ignore[return-value]


def leaf_module(forward: F) -> F:
    """The same for a module's forward: a call of the module, as of torch.nn's."""

    @functools.wraps(forward)
    def call(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            tracer: Any = input.tracer
            if getattr(tracer, "root", None) is self:
                raise NotImplementedError("torch.fx takes a recurrent layer as a leaf: trace the module that holds it")
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
        return forward(self, input, *args, **kwargs)

    return call  # type: ignore[return-value]


class OlderTools:
    """Refuses torch.jit.script in one line, and gives eager quantization torch.nn's layer to swap for its own."""

    _torch: Any

    def __prepare_scriptable__(self) -> Any:
        name = type(self).__name__
        raise NotImplementedError(
            f"torch.jit.script cannot compile fastrnn.{name}: script fastrnn.revert(model), whose layers are torch.nn's"
        )

    @property
    def qconfig(self) -> Any:
        if "qconfig" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute 'qconfig'")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, config: Any) -> None:
        """How eager quantization is to swap this layer, None for not at all: it looks classes up by identity."""
        from .convert import revert

        self.__dict__["qconfig"] = config = _asked().get(self._torch) if config is None else config
        if config is not None:
            revert(self)  # type: ignore[arg-type]

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]


def _asked() -> dict[Any, Any]:
    """What is to be quantized, by class or name: torch.ao.quantization, which sets qconfig, has it in a variable."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_name == "__setattr__":  # of torch.nn.Module and RNNBase
        frame = frame.f_back
    return frame.f_locals.get("qconfig_dict") or {}
