"""A kernel launched again: what was compiled for a call like this one, without Triton's binder of arguments.

`function[grid](...)` looks at each argument, makes a key of them and of the options, and finds the compiled kernel by
it: some 60 us for our groups of pointers. A caller that knows that a launch is like an earlier one hands the arguments
to the compiled kernel itself. It must know all that Triton compiles for: dtypes, which pointers are None, which are
multiples of 16, constants, options, device.

Uses CompiledKernel.run, .function and .packed_metadata, JITFunction.run and triton.knobs, read in 3.6 to 3.9. Where a
hook of Triton's is set (its profiler's, a debugger's) or JITFunction.run is another, nothing is ready.
"""

from typing import Any

from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Ready:
    """A compiled kernel, and the driver that it is loaded with."""

    def __init__(self, compiled: Any) -> None:
        self.driver: Any = driver.active
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata

    def usable(self) -> bool:
        """Whether a launch may go by it now."""
        return self.driver is driver.active and ordinary()

    def launch(self, grid: tuple[int, int, int], arguments: tuple) -> None:
        """Launch on the current stream; arguments are all of the kernel's parameters, in order, constants too."""
        x, y, z = grid
        stream = self.driver.get_current_stream(self.driver.get_current_device())
        self.run(x, y, z, stream, self.function, self.metadata, None, None, None, *arguments)


def ready(compiled: Any) -> Ready | None:
    """What launches like this one may go by, None where Triton gave nothing to launch by."""
    return Ready(compiled) if ordinary() and hasattr(compiled, "packed_metadata") else None


def ordinary() -> bool:
    """Whether Triton launches as it does by itself."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    hooked = (enter and enter.calls) or (leave and leave.calls)
    return not hooked and JITFunction.run.__module__ == JITFunction.__module__
