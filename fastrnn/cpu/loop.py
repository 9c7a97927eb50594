"""The time loop of a tile of the batch, forward and backward: kernels/loop.py's, on one core of a CPU.

    forward    rec = W_hh h + b_hh;   state, saved = cell(x_gates[t], rec, state)
    backward   d_gates[t] = cell'(d_state + dy[t], saved[t]);   dh = W_hh^T d_gates[t] + rest

The tile's states, rec and d_gates of a step are in its scratch memory, which the nearest caches hold as they do W_hh.
kernels/arguments.py has the layout of every tensor; W_hh is packed as product.py wants it, b_hh in whole panels.
"""

from typing import Any, NamedTuple

from .product import product
from .rows import Tile
from .steps import as_made, clip, clipped, d_zoned, where_not_clipped, zoned
from .values import Code, Pointer, Value


class Constants(NamedTuple):
    """The facts that are known when a kernel is compiled."""

    step: Any  # the cell's in this pass, on vectors
    sizes: Any  # kernels/arguments.py
    places: tuple[int, ...]  # of the kept states
    block: tuple[int, int]  # rows and vectors of a product's sums
    width: int  # units of a vector

    def padded(self, N: int) -> int:
        """Round N up to whole panels of a product."""
        panel = self.block[1] * self.width
        return -(-N // panel) * panel

    @property
    def scratch(self) -> int:
        """Return the scratch elements of each row of a tile: its states, and G gates."""
        return (self.sizes.states + self.sizes.gates) * self.padded(self.sizes.H) + self.block[1] * self.width


def _carve(tile: Tile, K: Constants, scratch: Pointer) -> tuple[list[Pointer], Pointer]:
    """Scratch memory of each state, and of the gates."""
    rows, S = tile.count, K.padded(K.sizes.H)
    return [scratch.at(rows * (n * S)) for n in range(K.sizes.states)], scratch.at(rows * (K.sizes.states * S))


def forward(K: Constants, tile: Tile, inputs: Any, out: Any, scratch: Pointer) -> None:
    code, sizes, sequences = tile.code, K.sizes, tile.sequences
    G, H, P, S, wide = sizes.gates, sizes.H, sizes.states, K.padded(sizes.H), K.padded(sizes.gates * sizes.H)
    states, rec = _carve(tile, K, scratch)
    W = inputs.W_hh.at(tile.recurrence * (wide * H))
    b = None if inputs.b_hh is None else inputs.b_hh.at(tile.recurrence * wide)

    with code.loop(tile.count) as i:
        at = tile.state(i) * H

        def begin(j: Value, mask: Value | None) -> None:
            first = tuple(code.number(0) for _ in states)
            if inputs.states is not None:
                first = tuple(p.load(at + j, mask) for p in inputs.states)
            for n, state in enumerate(clipped(code, sizes, first)):
                states[n].store(state, i * S + j, mask)

        code.blocks(H, begin)

    with code.loop(tile.steps) as step:
        t = tile.time(step)
        live = tile.live(t)
        if sequences.reset is not None:
            with code.loop(live) as i:
                _restart(K, tile, states, i, t)
        product(
            code, states[0], W, rec, live, (S, H, G * H, wide), K.block,
            lambda i, column: code.number(0) if b is None else b.load(column),
        )  # fmt: skip
        with code.loop(live) as i:
            at = tile.place(i, t)

            def advance(j: Value, mask: Value | None) -> None:
                x = tuple(inputs.x_gates.load((at * G + g) * H + j, mask) for g in range(G))
                of_rec = tuple(rec.load(i * wide + g * H + j, mask) for g in range(G))
                before = tuple(state.load(i * S + j, mask) for state in states)
                after, saved = K.step(x, of_rec, before, "exact")
                stay = None if sequences.noise is None else sequences.noise.load(at * H + j, mask) != 0
                after = zoned(code, sizes, stay, after, before)
                out.y.store(after[0], at * H + j, mask)
                for n, steps in enumerate(out.steps or ()):
                    steps.store(after[n + 1], at * H + j, mask)
                if out.saved is not None:
                    for n, saved_tile in enumerate(saved):
                        out.saved.store(saved_tile, (at * sizes.saved + n) * H + j, mask)
                for n, state in enumerate(clipped(code, sizes, after)):
                    states[n].store(state, i * S + j, mask)

            code.blocks(H, advance)

    with code.loop(tile.count) as i:
        at = tile.state(i) * H
        code.blocks(H, lambda j, mask: [
            out.finals[n].store(states[n].load(i * S + j, mask), at + j, mask) for n in range(P)
        ])  # fmt: skip


def _restart(K: Constants, tile: Tile, states: list[Pointer], i: Value, t: Value) -> None:
    code, starts, S = tile.code, tile.sequences.starts, K.padded(K.sizes.H)
    anew, given = tile.restarts(i, t)
    with code.when(anew):

        def start(j: Value, mask: Value | None) -> None:
            found = tuple(code.number(0) for _ in states)
            if starts is not None:
                found = tuple(p.load(given * K.sizes.H + j, mask) for p in starts)
            for n, state in enumerate(clipped(code, K.sizes, found)):
                states[n].store(state, i * S + j, mask)

        code.blocks(K.sizes.H, start)


def backward(K: Constants, tile: Tile, read: Any, into: Any, scratch: Pointer) -> None:
    code, sizes = tile.code, K.sizes
    G, H, P, S = sizes.gates, sizes.H, sizes.states, K.padded(sizes.H)
    d_states, d_rec = _carve(tile, K, scratch)
    W = read.W_hh.at(tile.recurrence * (S * G * H))

    with code.loop(tile.count) as i:
        at = tile.state(i) * H
        code.blocks(H, lambda j, mask: [
            d_states[n].store(
                code.number(0) if read.d_finals is None else read.d_finals[n].load(at + j, mask), i * S + j, mask
            )
            for n in range(P)
        ])  # fmt: skip

    with code.loop(tile.steps) as back:
        t = tile.time(tile.steps - 1 - back)
        live = tile.live(t)
        with code.loop(live) as i:
            _differentiate(K, tile, read, into, (d_states, d_rec), i, t)
        if sizes.clip_gradient < 0:
            product(
                code, d_rec, W, d_states[0], live, (G * H, G * H, H, S), K.block,
                lambda i, column: d_states[0].load(i * S + column),
            )  # fmt: skip
        else:
            _clipped_product(K, tile, W, (d_states, d_rec), live)
        if tile.sequences.reset is not None:
            with code.loop(live) as i:
                _cut(K, tile, into, d_states, i, t)

    if into.d_states is not None:
        with code.loop(tile.count) as i:
            at = tile.state(i) * H

            def end(j: Value, mask: Value | None) -> None:
                found = tuple(d.load(i * S + j, mask) for d in d_states)
                kept = code.number(0) if read.before is None else read.before[0].load(at + j, mask)
                for n, d in enumerate(where_not_clipped(code, sizes, found, kept)):
                    into.d_states[n].store(d, at + j, mask)

            code.blocks(H, end)


def _clipped_product(K: Constants, tile: Tile, W: Pointer, memory: tuple, live: Value) -> None:
    """dh + clip(W_hh^T d_gates): the product, then its sum with what d_gates leave room for."""
    code, sizes, S = tile.code, K.sizes, K.padded(K.sizes.H)
    (dh, *_), d_rec = memory
    through = d_rec.at(tile.count * (sizes.gates * S))
    product(
        code, d_rec, W, through, live, (sizes.gates * sizes.H, sizes.gates * sizes.H, sizes.H, S), K.block,
        lambda i, column: code.number(0),
    )  # fmt: skip
    with code.loop(live) as i:
        code.blocks(sizes.H, lambda j, mask: dh.store(
            dh.load(i * S + j, mask) + clip(code, through.load(i * S + j, mask), sizes.clip_gradient), i * S + j, mask
        ))  # fmt: skip


def _differentiate(K: Constants, tile: Tile, read: Any, into: Any, memory: tuple, i: Value, t: Value) -> None:
    """The cell's step backward of a row: d_x, d_rec, and d_state without the product's share."""
    code, sizes, sequences = tile.code, K.sizes, tile.sequences
    G, H, S, (d_states, d_rec) = sizes.gates, sizes.H, K.padded(sizes.H), memory
    at, (earlier, exists) = tile.place(i, t), tile.before(i, t)
    previous = tile.place(i, code.where(exists, earlier, t))
    anew, given = tile.restarts(i, t) if sequences.reset is not None else (None, None)

    def kept_before(n: int, j: Value, mask: Value | None) -> Value:
        """Return state n before the step, as it was kept or given, or zero."""
        inside = read.kept[n].at(previous * H + j)
        given = None if read.before is None else read.before[n].at(tile.state(i) * H + j)
        return _chosen(code, exists, inside, given, mask)

    def step(j: Value, mask: Value | None) -> None:
        kept = tuple(p.load(at * H + j, mask) for p in read.kept)
        d_state = tuple(d.load(i * S + j, mask) for d in d_states)
        d_state = where_not_clipped(code, sizes, d_state, kept[0])
        if read.dy is not None:
            d_state = (d_state[0] + read.dy.load(at * H + j, mask), *d_state[1:])
        if read.d_steps is not None:
            others = (d + p.load(at * H + j, mask) for d, p in zip(d_state[1:], read.d_steps, strict=True))
            d_state = (d_state[0], *others)
        before = tuple(kept_before(n, j, mask) for n in range(len(read.kept)))
        if anew is not None:
            anew_from = sequences.starts
            starts = [None] * len(before) if anew_from is None else [p.at(given * H + j) for p in anew_from]
            before = tuple(_chosen(code, ~anew, b, start, mask) for b, start in zip(before, starts, strict=True))
        if sizes.clip_state >= 0:
            before = (clip(code, before[0], sizes.clip_state), *before[1:])
        stay = None if sequences.noise is None else sequences.noise.load(at * H + j, mask) != 0
        d_made, stayed = d_zoned(code, sizes, stay, d_state)
        made = as_made(sizes, stay, kept, before)
        saved = tuple(read.tiles.load((at * sizes.saved + n) * H + j, mask) for n in range(sizes.saved))
        one = len(kept) == 1
        d_x, d_gates, d_before = K.step(d_made, saved, made[0] if one else made, before[0] if one else before, "exact")
        for g in range(G):
            into.d_x_gates.store(d_x[g], (at * G + g) * H + j, mask)
            d_rec.store(d_gates[g], (i * G + g) * H + j, mask)
        if into.d_rec_last is not None:
            into.d_rec_last.store(d_gates[G - 1], at * H + j, mask)
        if stayed is not None:
            d_before = (d_before[0] + stayed, *d_before[1:])
        for n, d in enumerate(d_before):
            d_states[n].store(d, i * S + j, mask)

    code.blocks(H, step)


def _chosen(code: Code, condition: Value, inside: Any, outside: Pointer | None, mask: Value | None) -> Value:
    """A vector from one of two places, or zeros; the first may be a vector."""
    if outside is None:
        found = inside.load(0, mask) if isinstance(inside, Pointer) else inside
        return code.where(condition, found, code.number(0))
    if isinstance(inside, Pointer):
        return Pointer(code, code.builder.select(condition.ir, inside.ir, outside.ir), inside.of).load(0, mask)
    return code.where(condition, inside, outside.load(0, mask))


def _cut(K: Constants, tile: Tile, into: Any, d_states: list[Pointer], i: Value, t: Value) -> None:
    """Send the gradient of states that started anew before a step to where it is kept, by step; zeros go on."""
    code, sizes, S, starts = tile.code, K.sizes, K.padded(K.sizes.H), tile.sequences.starts
    anew, given = tile.restarts(i, t)
    with code.when(anew):
        at = tile.place(i, t + tile.direction) * sizes.H

        def send(j: Value, mask: Value | None) -> None:
            found = tuple(d.load(i * S + j, mask) for d in d_states)
            if into.d_starts is not None:
                from_what = starts[0].load(given * sizes.H + j, mask)
                for n, d in enumerate(where_not_clipped(code, sizes, found, from_what)):
                    into.d_starts[n].store(d, at + j, mask)
            for d in d_states:
                d.store(code.number(0), i * S + j, mask)

        code.blocks(sizes.H, send)
