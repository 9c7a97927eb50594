"""Launch a compiled kernel again, without Triton's binder of arguments.

`function[grid](...)` looks at each argument, makes a key of arguments and options, and finds the compiled kernel by
this key. That takes some 60 us for our groups of pointers. A caller that knows that a launch is like an earlier one
hands the arguments to the compiled kernel itself. It must know everything that Triton compiles for: dtypes, which
pointers are None, which are multiples of 16, constants, options, device.

Uses CompiledKernel.run, .function and .packed_metadata, JITFunction.run and triton.knobs, read in 3.6 to 3.9. If a hook
of Triton's is set (by its profiler, a debugger) or JITFunction.run was replaced, nothing is ready.
"""

from typing import Any

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Ready:
    """A compiled kernel, and the driver that loaded it."""

    def __init__(self, compiled: Any) -> None:
        self.driver: Any = driver.active
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(self, grid: tuple[int, ...], arguments: tuple) -> bool:
        """Launch on the current stream, unless something changed how Triton launches: False then.

        arguments has all of the kernel's parameters in order, constants too.
        """
        if self.driver is not driver.active or not ordinary():
            return False
        x, y, z = (*grid, 1, 1)[:3]
        stream = self.driver.get_current_stream(self.driver.get_current_device())
        self.run(x, y, z, stream, self.function, self.metadata, None, None, None, *arguments)
        return True


def ready(compiled: Any) -> Ready | None:
    """What launches like this one can use. None if Triton's result cannot be launched directly."""
    return Ready(compiled) if ordinary() and hasattr(compiled, "packed_metadata") else None


def ordinary() -> bool:
    """Whether nothing changes how Triton launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    hooked = (enter and enter.calls) or (leave and leave.calls)
    return not hooked and JITFunction.run.__module__ == JITFunction.__module__
