"""The grid barrier: programs that run at once wait for one another, once a time step or once a round of them.

Protocol. A group is the programs that exchange state: one batch tile in one direction, P programs. It has a counter of
its own, zero at the launch, that only grows.

1. Publish: a program stores its slice of the state, then arrives. `arrive` first joins the program's warps, so that
   all their stores come before it, then adds 1 to the counter with *release*: whoever sees the sum sees the stores.
2. Wait: before a program reads what the others have stored n times, it waits until the counter has reached n P. The
   read of the counter is an *acquire*, and joins the warps again, so that no later load runs ahead of it.
3. No reset inside the launch: targets grow with the step, so no program can mistake one step's arrivals for another's,
   and a fast program can be at most one step ahead. The launcher hands in zeros; the counter is 64 bits wide.

Left to the caller: all programs of the group must be resident at once (launch_cooperative_grid, and a planner that
refuses a grid that does not fit), loads of exchanged state must bypass the L1 cache (cache_modifier=".cg") and must not
be prefetched past the wait (tl.range(..., num_stages=1)), and what is stored next must not go where the others may
still read: a slot is written once (d_gates), or buffers alternate (h).

Relaxed atomics would let the stores become visible after the arrival: nothing would fail, results would drift.

On AMD (gfx942, Triton 3.9) a spin on an atomic compiles to code that hangs; SPIN_ON_LOAD waits on a volatile load past
the caches and then acquires once. On NVIDIA the acquiring atomic is itself the spin: a round trip to L2 less.
"""

import triton
import triton.language as tl

COUNTER_STRIDE: tl.constexpr = tl.constexpr(16)  # int64s from a group's counter to the next: a cache line


@triton.jit
def arrive(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, SPIN_ON_LOAD: tl.constexpr):
    seen = target - 1
    if SPIN_ON_LOAD:
        while seen < target:
            seen = tl.load(counter_ptr, cache_modifier=".cv", volatile=True)
        tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    else:
        while seen < target:
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
