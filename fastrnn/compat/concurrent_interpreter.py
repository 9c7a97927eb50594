"""Run an interpreted kernel with all its programs alive at once, as a cooperative launch does on a GPU.

Triton's interpreter runs one program after the other, so a grid barrier would wait for ever. Here every program is a
thread, and a baton says which one runs. The baton changes hands at atomics (and wherever a test adds a `hand_over`).
The caller chooses the next program, so a schedule can be repeated. A wait that nobody can end is an error, not a hang.

Uses runtime/interpreter.py of Triton, read in 3.9.0 (GridExecutor.fn, interpreter_builder, create_atomic_rmw,
create_masked_load), beside fastrnn/compat/interpreter.py.
"""

import contextlib
import contextvars
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from unittest import mock

import triton.language as tl  # noqa: F401 - the interpreter looks for it among the globals of what it runs
from triton.runtime import interpreter as triton_interpreter

Program = tuple[int, int, int]
Choice = Callable[[Sequence[Program], Program | None], Program]


# A program whose wait is over polls less often than this before it changes something: once each tile of what it reads,
# which is four gates of 66 tiles at H = 2112.
MOST_POLLS = 400


def round_robin(alive: Sequence[Program], last: Program | None) -> Program:
    """The program after the last one, so that every program gets its turn."""
    return next((program for program in alive if last is not None and program > last), alive[0])


class Baton:
    """Says which program runs, and passes on by `choose`. It counts polls, to tell a deadlock from a wait."""

    def __init__(self, grid: Program, choose: Choice) -> None:
        self.alive = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        self.choose, self.holder, self.error = choose, None, None
        self.changed = threading.Condition()
        self.polls: Counter[Program] = Counter()  # since the last change that a program could wait for

    def hand_over(self, polled: bool = False) -> None:
        """Let another program run. polled means that this program only looked whether it may go on."""
        with self.changed:
            me = self.holder
            assert me is not None
            if polled:
                self.polls[me] += 1
                if min(self.polls[program] for program in self.alive) > MOST_POLLS:
                    raise RuntimeError(f"deadlock: all of {len(self.alive)} programs wait at the barrier")
            else:
                self.polls.clear()
            self._pass_on()
            self._wait_for(me)

    def changed_something(self) -> None:
        """What programs poll may be another now: whoever waits has to look again."""
        self.polls.clear()

    def run(self, program: Callable[[], None]) -> None:
        """Run the program for every index until all end or one fails."""

        def live(me: Program) -> None:
            try:
                with self.changed:
                    self._wait_for(me)
                program()
            except _Abandoned:
                pass
            except BaseException as error:
                self.error = self.error or error
            with self.changed:
                self.alive.remove(me)
                self.polls.clear()
                self._pass_on()

        # Each thread gets the caller's context, because numpy's error state is in it.
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(live, me), daemon=True) for me in self.alive
        ]
        for thread in threads:
            thread.start()
        with self.changed:
            self._pass_on()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _pass_on(self) -> None:
        self.holder = self.choose(self.alive, self.holder) if self.alive else None
        self.changed.notify_all()

    def _wait_for(self, me: Program) -> None:
        self.changed.wait_for(lambda: self.holder == me)
        if self.error is not None:
            raise _Abandoned
        triton_interpreter.interpreter_builder.set_grid_idx(*me)


class _Abandoned(BaseException):
    """Ends a program because another one failed."""


def launch(
    kernel, grid: tuple[int, ...], *args, choose: Choice = round_robin, watch: Callable | None = None, **kwargs
) -> None:
    """Launch an interpreted kernel with all programs of the grid alive.

    watch(baton), if given, is a context manager entered for the launch: a test's own patches of the interpreter.
    """
    whole: Program = (*grid, *(1,) * (3 - len(grid)))  # type: ignore[assignment]
    baton = Baton(whole, choose)
    program = kernel.rewrite()
    executor = triton_interpreter.GridExecutor(program, kernel.arg_names, (1, 1, 1))

    def all_programs(**bound) -> None:
        triton_interpreter.interpreter_builder.set_grid_dim(*whole)
        baton.run(lambda: program(**bound))

    all_programs.__signature__ = inspect.signature(program)  # type: ignore[attr-defined] - the executor binds by it
    executor.fn = all_programs

    builder = triton_interpreter.InterpreterBuilder
    atomic, load, store = builder.create_atomic_rmw, builder.create_masked_load, builder.create_masked_store

    def create_atomic_rmw(self, operation, pointer, value, *rest):
        result = atomic(self, operation, pointer, value, *rest)
        baton.hand_over(polled=not value.data.any())  # a poll adds 0
        return result

    def create_masked_load(self, *loaded):
        result = load(self, *loaded)
        if loaded[-1]:  # volatile: the other form of a poll
            baton.hand_over(polled=True)
        return result

    def create_masked_store(self, *stored):
        baton.changed_something()
        return store(self, *stored)

    patches = mock.patch.multiple(
        builder,
        create_atomic_rmw=create_atomic_rmw,
        create_masked_load=create_masked_load,
        create_masked_store=create_masked_store,
    )
    with patches, watch(baton) if watch else contextlib.nullcontext():
        executor(*args, **kwargs)
