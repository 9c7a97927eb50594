"""The rows of a tile of the batch: where each stands in memory and in time, and when its state starts anew.

As kernels/rows.py has it: a slot is the place of a step of a sequence; a table (3, B) names each row's sequence, first
slot and length, longest first. So at each time the rows that have a step are the first ones. Resets are looked up
before a step: at the edge between it and the one before in its direction.
"""

from typing import Any, NamedTuple

from .values import Code, Value, Variable


class Tile(NamedTuple):
    """Rows of the batch, from the first one on, of one recurrence."""

    code: Code
    sizes: Any  # kernels/arguments.py
    sequences: Any  # kernels/arguments.py, of pointers; noise is a mask [slots, R, H] of units that stay
    T: Value
    B: Value
    recurrence: Value
    first: Value
    count: Value

    @property
    def direction(self) -> Value:
        return self.recurrence // self.sizes.N

    def _of_table(self, line: int, i: Any) -> Value:
        return self.sequences.rows.element(self.B * line + self.first + i)

    def length(self, i: Any) -> Value:
        return self.T if self.sequences.rows is None else self._of_table(2, i)

    @property
    def steps(self) -> Value:
        """Return how many steps the longest row has, which is the first row."""
        return self.length(0)

    def time(self, step: Value) -> Value:
        """Return the t of a step of this direction."""
        return self.code.where(self.direction == 0, step, self.steps - 1 - step)

    def live(self, t: Value) -> Value:
        """Return how many rows have a step at t."""
        if self.sequences.rows is None:
            return self.count
        found = Variable(self.code, self.code.integer(0))
        with self.code.loop(self.count) as i:
            found.put(found.get() + self.code.widened(self.length(i) > t))
        return found.get()

    def _slot(self, i: Value, t: Value) -> Value:
        if self.sequences.rows is None:
            return t * self.B + self.first + i
        return self._of_table(1, i) + (t if self.sizes.ragged else t * self.B)

    def place(self, i: Value, t: Value) -> Value:
        """Return where row i at t stands in [slots, R]."""
        return self._slot(i, t) * (self.sizes.D * self.sizes.N) + self.recurrence

    def state(self, i: Value) -> Value:
        """Return where the state of row i stands in [D, B, N]."""
        sequence = self.first + i if self.sequences.rows is None else self._of_table(0, i)
        return (self.direction * self.B + sequence) * self.sizes.N + self.recurrence % self.sizes.N

    def before(self, i: Value, t: Value) -> tuple[Value, Value]:
        """Return the t of the step before, and whether there is one."""
        t = self.code.where(self.direction == 0, t - 1, t + 1)
        return t, (t >= 0) & (t < self.length(i))

    def restarts(self, i: Value, t: Value) -> tuple[Value, Value]:
        """Return whether a segment begins with the step at t in its direction, and where its start state is given.

        That place is the later segment's first step, which in direction 1 is the step before.
        """
        code, edge = self.code, t + self.direction
        inside = edge < self.length(i)
        edge = code.where(inside, edge, t)
        given = self.place(i, edge) if self.sizes.by_step else self.state(i)
        reset = Value(code, code.builder.zext(self.sequences.reset.element(self._slot(i, edge)).ir, self.T.ir.type))
        return inside & (reset != 0), given
