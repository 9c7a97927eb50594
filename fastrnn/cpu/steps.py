"""What else happens at each step, where sizes say so: clips and zoneout, those of kernels/clips.py and zoneout.py."""

from typing import Any

from .values import Code, Value

States = tuple[Value, ...]


def clip(code: Code, x: Value, limit: float) -> Value:
    """Clip x to [-limit, limit]; NaN stays."""
    return code.where(x > limit, limit, code.where(x < -limit, -limit, x))


def clipped(code: Code, sizes: Any, states: States) -> States:
    """Return the states as the next step sees them: c is clipped, or h in a cell without c."""
    if sizes.clip_state < 0:
        return states
    place = min(1, len(states) - 1)
    return tuple(clip(code, s, sizes.clip_state) if n == place else s for n, s in enumerate(states))


def where_not_clipped(code: Code, sizes: Any, d_states: States, kept: Value) -> States:
    """Gradients of states from those of the clipped ones; the first kept state is the one that is clipped."""
    if sizes.clip_state < 0:
        return d_states
    inside, place = (kept <= sizes.clip_state) & (kept >= -sizes.clip_state), min(1, len(d_states) - 1)
    return tuple(code.where(inside, d, 0.0) if n == place else d for n, d in enumerate(d_states))


def zoned(code: Code, sizes: Any, stay: Value | None, after: States, before: States) -> States:
    """States after a step, of which h stays in part what it was: in training by a mask, else by a share."""
    if sizes.zoneout == 0:
        return after
    if stay is None:
        return before[0] + (1.0 - sizes.zoneout) * (after[0] - before[0]), *after[1:]
    return code.where(stay, before[0], after[0]), *after[1:]


def d_zoned(code: Code, sizes: Any, stay: Value | None, d_states: States) -> tuple[States, Value | None]:
    """Gradients of the states as the cell made them, and the share of h's that the step before has."""
    if sizes.zoneout == 0:
        return d_states, None
    dh = d_states[0]
    d_new = dh * (1.0 - sizes.zoneout) if stay is None else code.where(stay, 0.0, dh)
    return (d_new, *d_states[1:]), dh - d_new


def as_made(sizes: Any, stay: Value | None, kept: States, before: States) -> States:
    """Kept states as the cell made them: in training h's gradient is zero where it is not, and nothing is to do."""
    if sizes.zoneout in (0, 1) or sizes.states > 1 or stay is not None:
        return kept
    return (before[0] + (kept[0] - before[0]) * (1.0 / (1.0 - sizes.zoneout)),)
