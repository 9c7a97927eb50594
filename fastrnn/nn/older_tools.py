"""Support for torch's older tools: torch.fx, torch.jit.script, and eager quantization (torch.ao.quantization).

They find torch.nn's layers by class. torch.jit.trace and both ONNX exporters need nothing of this. docs/deploying.md
shows how to export a model with each tool.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch.fx import Proxy

F = TypeVar("F", bound=Callable[..., Any])


def leaf(function: F) -> F:
    """A decorator for functions: torch.fx.symbolic_trace records the call, and does not trace inside."""

    @functools.wraps(function)
    def call(input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            return input.tracer.create_proxy("call_function", call, (input, *args), kwargs)
        return function(input, *args, **kwargs)

    return call  # type: ignore[return-value]


def leaf_module(forward: F) -> F:
    """The same for a module's forward: torch.fx records a call of the module, as it does for torch.nn's."""

    @functools.wraps(forward)
    def call(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, Proxy):
            tracer: Any = input.tracer
            if getattr(tracer, "root", None) is self:
                raise NotImplementedError(
                    "torch.fx cannot trace a recurrent layer itself: trace the module that has it"
                )
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
        return forward(self, input, *args, **kwargs)

    return call  # type: ignore[return-value]


class OlderTools:
    """Refuse torch.jit.script in one line, and give eager quantization a torch.nn layer that it can swap."""

    _torch: Any

    def __prepare_scriptable__(self) -> Any:
        name = type(self).__name__
        raise NotImplementedError(
            f"torch.jit.script cannot compile fastrnn.{name}: script fastrnn.revert(model), which has torch.nn's layers"
        )

    @property
    def qconfig(self) -> Any:
        if "qconfig" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute 'qconfig'")
        return self.__dict__["qconfig"]

    @qconfig.setter
    def qconfig(self, config: Any) -> None:
        """Set how eager quantization swaps this layer; None to leave it. It knows torch's classes only, so revert."""
        from .convert import revert

        self.__dict__["qconfig"] = config = _asked().get(self._torch) if config is None else config
        if config is not None:
            revert(self)  # type: ignore[arg-type]

    @qconfig.deleter
    def qconfig(self) -> None:
        del self.__dict__["qconfig"]


def _asked() -> dict[Any, Any]:
    """The dictionary of what is to be quantized. torch.ao.quantization, which sets qconfig, has it in a variable."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_name == "__setattr__":  # skip those of torch.nn.Module and RNNBase
        frame = frame.f_back
    return frame.f_locals.get("qconfig_dict") or {}
