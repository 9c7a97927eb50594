"""What is clipped at each step, where Sizes say so: gradients that come back through W_hh, and what a step sees.

    dh = rest + clip(W_hh^T d_gates);    state = cell(x, rec of clip(h), clip(state))

A state is clipped where the next step takes it, not where it is stored: c of a cell with c, else h, which is what
backward keeps, so that it knows where the gradient stops.
"""

import triton
import triton.language as tl


@triton.jit
def with_first(first, tiles):
    """Tiles of which the first is another."""
    others = (first,)
    for n in tl.static_range(1, len(tiles)):
        others = others + (tiles[n],)
    return others


@triton.jit
def clip(x, LIMIT: tl.constexpr):
    """x within -LIMIT and LIMIT; NaN stays."""
    return tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))


@triton.jit
def clipped(K: tl.constexpr, states):
    """States as the next step sees them."""
    if K.clip_state < 0:
        return states
    elif K.states == 1:
        return (clip(states[0], K.clip_state),)
    else:
        others = (states[0], clip(states[1], K.clip_state))
        for n in tl.static_range(2, len(states)):
            others = others + (states[n],)
        return others


@triton.jit
def where_not_clipped(K: tl.constexpr, d_states, kept):
    """Gradients of states from those of the clipped ones; the first kept state is the one that is clipped."""
    if K.clip_state < 0:
        return d_states
    else:
        limit = K.clip_state
        inside = (kept[0] <= limit) & (kept[0] >= -limit)
        if K.states == 1:
            return (tl.where(inside, d_states[0], 0.0),)
        else:
            others = (d_states[0], tl.where(inside, d_states[1], 0.0))
            for n in tl.static_range(2, len(d_states)):
                others = others + (d_states[n],)
            return others


@triton.jit
def clipped_before(K: tl.constexpr, before):
    """Kept states before a step as it saw them."""
    if K.clip_state < 0:
        return before
    else:
        return with_first(clip(before[0], K.clip_state), before)
