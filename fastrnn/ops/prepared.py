"""A recurrence prepared for launches: everything that follows from sizes, dtype and device is found once."""

import math
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from ..compat import driver, interpreter, profiling, spills
from ..device import DeviceSpec
from ..kernels.arguments import NO_CLIP, PLAIN_STEPS, Exchange, Sizes
from ..planning import cpu, planner, tuning
from ..planning.kernel_plan import Request, tiles
from .schema import Args, BackwardArgs

NOT_READY: tuple[Any, tuple] = (None, ())


class Kernels:
    """Both passes of a tier for a Request: the plan, and the kernels that were compiled and launched so far."""

    def __init__(self, request: Request, tier: str) -> None:
        self.request, self.tier = request, tier
        self.cell, self.plan = request.of_cell, planner.kernel_for(request, tier)
        self.dialect = self.plan.dialect
        self.tuned = tuning.TUNED.get(request.spec.arch)  # the plan depends on it
        # Compiled kernels with their constants. The key is everything that Triton compiles a kernel for.
        self.launched: dict[tuple, tuple[Any, tuple]] = {}

    @profiling.inside("recurrence", traced=False)
    def launch(self, which: str, T: int, ragged: bool, by_step: bool, groups: tuple) -> None:
        """Launch the kernel of a pass over T steps. groups are the groups of pointers in kernels/arguments.py."""
        W_hh, kind = groups[0].W_hh, (which, ragged, by_step)
        if W_hh.is_cuda and torch.cuda.device_count() > 1:  # Triton launches on the current GPU, not the tensors'
            with torch.cuda.device_of(W_hh):
                self._launch(kind, T, groups)
        else:
            self._launch(kind, T, groups)

    def _launch(self, kind: tuple, T: int, groups: tuple) -> None:
        parts = self._parts(kind[0], T, groups) if self.tier == "cooperative" else ((self.plan.grid, groups),)
        for grid, of_part in parts:
            key, arguments = (*kind, _pointers(of_part)), (*of_part, T, self.request.B)
            ready, constants = self.launched.get(key, NOT_READY)
            if interpreter.ENABLED:
                function, constants = self._function(kind[0], of_part, *kind[1:])
                _interpret(function, grid, (*arguments, *constants, self._form(kind[0], self.plan.choices[kind[0]][0])))
            elif ready is None or not ready.launch(grid, (*arguments, *constants)):
                self.launched[key] = self._first_launch(key, grid, of_part, arguments)

    def _parts(self, which: str, T: int, groups: tuple) -> list[tuple]:
        """Grid and groups of each part of a batch whose programs would not all run at once."""
        slices, batch_tiles, R = self.plan.grid
        exchange = self._exchange(which, T if groups[2].rows is None else None, groups[0].W_hh)
        if self.plan.parts == 1:
            return [(self.plan.grid, (*groups, exchange))]
        found, end = [], tiles(self.request.B, self.plan.block_b)
        # Two of each: a kernel is compiled for pointers to multiples of 16 bytes.
        firsts = torch.arange(2 * self.plan.parts, device=exchange.counters.device) // 2 * batch_tiles
        for part, first in enumerate(range(0, end, batch_tiles)):
            grid = (slices, min(batch_tiles, end - first), R)
            of_part = exchange._replace(counters=exchange.counters[part], first_tile=firsts[2 * part : 2 * part + 1])
            found.append((grid, (*groups, of_part)))
        return found

    def _first_launch(self, key: tuple, grid: tuple[int, ...], groups: tuple, arguments: tuple) -> tuple[Any, tuple]:
        """Launch through Triton's binder. Return what later launches like this one can use."""
        request, (which, ragged, by_step, _) = self.request, key
        function, constants = self._function(which, groups, ragged, by_step)
        arguments = (*arguments, *constants)
        try:
            options = self._options(which, function, arguments)
            compiled = function[grid](*arguments, **options)
        except Exception as error:
            driver.refuse(error, self.tier, request.cell, request.H, request.dtype, self.plan, request.spec)
            raise
        from ..compat import launcher  # imported late, because it needs Triton

        return launcher.ready(compiled), (*constants, options["FORM"])

    def _options(self, which: str, function: Any, arguments: tuple) -> dict[str, Any]:
        """The launch options, and the Form, of the first choice that spills no register."""
        plan = self.plan
        options: dict[str, Any] = {"num_warps": plan.warps, "num_ctas": plan.ctas, "enable_fp_fusion": True}
        if self.tier == "cooperative":
            # With this option the driver refuses a grid whose programs cannot all be resident. Without, it would hang.
            options["launch_cooperative_grid"] = True

        def as_launched(choice: dict[str, Any]) -> dict[str, Any]:
            own = {name: value for name, value in choice.items() if not name.isupper()}
            return {"FORM": self._form(which, choice), **own}

        return options | spills.first_without_spills(
            function, self.request.spec, plan.choices[which], arguments, plan.grid, options, as_launched
        )

    @property
    def _module(self) -> Any:
        if self.plan.dialect == "Gluon":  # imported late: Triton before 3.6 lacks Gluon features that it needs
            from ..kernels.gluon import cooperative, resident
        else:
            from ..kernels.tile import cooperative, resident
        return cooperative if self.tier == "cooperative" else resident

    def _form(self, which: str, choice: dict[str, Any]) -> Any:
        """The kernel's Form: what the planner chose, and this choice's own members."""
        return self._module.Form(**self.plan.form, **{name: value for name, value in choice.items() if name.isupper()})

    def _function(self, which: str, groups: tuple, ragged: bool, by_step: bool) -> tuple[Any, tuple]:
        """The kernel of a pass, and its constants except the Form."""
        cell, request, own_lengths = self.cell, self.request, groups[2].rows is not None
        sizes = Sizes(
            cell.gates, len(cell.states), len(cell.kept), cell.saved, request.D, request.N, request.H,
            own_lengths, by_step, ragged, self.plan.activations, self.plan.precision,
            request.clip_gradient, request.clip_state, request.zoneout,
        )  # fmt: skip
        return getattr(self._module, which), (cell.kernel(which), sizes)

    def _exchange(self, which: str, T: int | None, like: Tensor) -> Exchange:
        """Where programs hand on a state, and the grid barrier's counters, zero at every launch.

        T is None if there is a table of sequences, which has it.
        """
        from ..kernels.barrier import COUNTER_STRIDE

        _, batch_tiles, R = self.plan.grid
        sizes = (self.plan.parts, batch_tiles * R, COUNTER_STRIDE.value)
        counters = torch.zeros(sizes, dtype=torch.int64, device=like.device)
        return Exchange(self._exchanged(which, T, like), counters)

    def _exchanged(self, which: str, T: int | None, like: Tensor) -> Tensor | None:
        """h, of even and of odd steps; polled, a step's h or d_gates in each slot, as integers, -1 until it is sent."""
        R, B, H = self.request.recurrences, self.request.B, self.request.H
        round_, columns = self.plan.form["ROUND"], self.plan.form["COLUMNS"]
        if not round_:
            return like.new_empty(2, R, B, H) if which == "forward" else None
        own = self.plan.grid[0] * self.plan.units
        gates = 1 if which == "forward" else self.cell.gates
        integer = torch.int32 if like.dtype == torch.float32 else torch.int16
        slots = 2 * round_ if T is None else min(2 * round_, T + 1)
        states = torch.full((slots, R, B, gates, columns), -1, dtype=integer, device=like.device)
        if own < columns:  # nobody's
            states[..., own:].zero_()
        return states


class Prepared:
    """Everything that a call of either pass needs, beside its tensors."""

    def __init__(
        self,
        cell: Cell,
        kernels: Any,  # Kernels, or the CPU's
        slots: tuple[int, ...],
        sizes: tuple[int, int, int, int],
        dtype: torch.dtype,
        clip_h: float,
    ):
        self.cell, self.slots = cell, slots
        self.B, self.D, self.N, self.K = B, D, N, K = sizes
        self.clip_h = clip_h  # a step reads h clipped to this; negative for no clip
        self.kernels = kernels  # None where B is 0
        # Allocates what nobody outside the layer gets, from memory that later calls use again: on a CPU.
        self.keeps: Any = getattr(kernels, "empty", None)
        self.count = math.prod(slots)  # T * B, or total
        self.bytes = self.count * D * N * K * cell.gates * dtype.itemsize  # the size of x_gates
        self.recurrences, self.of_y, self.of_state = D * N, (*slots, D * N * K), (D, B, N * K)
        self.places = cell.kept_places
        # How many states beside h are kept for all steps: as many as backward reads, or all. wide is their dtype.
        self.kept, self.others = max(self.places), len(cell.states) - 1
        self.wide: dict[str, Any] = {"dtype": cell.state_dtype(dtype)} if cell.wide else {}
        self.ragged = len(slots) == 1
        # For ragged sequences T is a mean: the table of sequences bounds each one.
        self.T = slots[0] if not self.ragged else max(1, slots[0] // max(B, 1))


def prepare(args: Args | BackwardArgs) -> Prepared:
    """Prepare a call from an op's arguments."""
    like = args.x_gates if isinstance(args, Args) else args.y
    *slots, R, K = like.select(-2, 0).shape if isinstance(args, Args) else like.shape
    B = slots[1] if args.rows is None else args.rows.shape[1]
    each_step = args.clip_gradient, args.clip_state, args.zoneout
    return of_sizes(args.cell, args.backend, tuple(slots), B, (R // args.heads, args.heads, K), like, each_step)


def of_sizes(
    cell: str,
    tier: str,
    slots: tuple[int, ...],
    B: int,
    sizes: tuple[int, int, int],
    like: Tensor,
    each_step: tuple[float, float, float] = PLAIN_STEPS,
) -> Prepared:
    """Prepare a call for slots (T, B) or (total,), and sizes (D, N, K). like has the dtype and the device."""
    (D, N, K), kernels = sizes, None
    if B > 0:
        spec = cpu.spec(like.dtype, like.device) if tier == cpu.NAME else DeviceSpec.of(like.device)
        request = Request(cell, K, B, D, N, like.dtype, planner.torch_precision(), spec, *each_step)
        key = request, tier, _planned_by(request)
        kernels = _kernels.get(key)
        if kernels is None:
            kernels = _kernels[key] = _of_cpu(request) if tier == cpu.NAME else Kernels(request, tier)
    of_h = each_step[1] if len(CELLS[cell].states) == 1 else NO_CLIP  # a cell with a c clips c, not h
    return Prepared(CELLS[cell], kernels, slots, (B, D, N, K), like.dtype, of_h)


def _of_cpu(request: Request) -> Any:
    from ..cpu.kernels import Kernels as OfCpu  # which needs llvmlite

    return OfCpu(request)


def _planned_by(request: Request) -> tuple:
    """Everything beside the request that a plan depends on. The cell and its tuning may be registered anew."""
    return planner.kernel_for, id(tuning.TUNED.get(request.spec.arch)), id(request.of_cell)


_kernels: dict[tuple, Kernels] = {}


def forget() -> None:
    """Drop all plans and compiled kernels, so that later calls plan and compile anew."""
    _kernels.clear()


def _pointers(groups: tuple) -> tuple:
    """What Triton compiles pointers for: the dtype, and whether the address is a multiple of 16; or None."""
    return tuple(
        [
            None
            if member is None
            else tuple([(tensor.dtype, tensor.data_ptr() % 16) for tensor in member])
            if type(member) is tuple
            else (member.dtype, member.data_ptr() % 16)
            for group in groups
            for member in group
        ]
    )


def _interpret(function: Any, grid: tuple[int, ...], arguments: tuple) -> None:
    with interpreter.corrected():
        if len(grid) < 3:
            function[grid](*arguments)
        else:
            from ..compat import concurrent_interpreter

            concurrent_interpreter.launch(function, grid, *arguments)
