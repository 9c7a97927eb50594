"""What a launch hands to a kernel: pointers in groups, any of which may be None, and constants.

A layer has D directions of N heads: R = D N recurrences side by side, each of H units with a W_hh of its own (where N
is 1, H is the layer's). All tensors are contiguous; slots are time and batch, [T, B], or ragged (rows.py). A group of
states has a pointer for each state of the cell, h first.

    x_gates, d_x_gates      [slots, R, G, H]    W_hh   [R, G, H, H]    first and last states   [D, B, N, H]
    y, states of all steps  [slots, R, H]       b_hh   [R, G, H]       saved                   [slots, R, S, H]

This file needs no Triton, and kernels take its groups as they are.
"""

from typing import Any, NamedTuple

NO_CLIP = -1.0
# What else happens at each step: clips of the gradient that comes back through W_hh and of states, and zoneout.
PLAIN_STEPS = (NO_CLIP, NO_CLIP, 0.0)


class Inputs(NamedTuple):
    """What forward reads."""

    x_gates: Any
    W_hh: Any
    b_hh: Any
    states: Any  # the first ones; None for zeros


class Outputs(NamedTuple):
    """What forward writes."""

    y: Any
    steps: Any  # states of all steps beside h, from the first one on: a pointer each, or None for all
    saved: Any
    finals: Any  # the last states


class Saved(NamedTuple):
    """What backward reads."""

    dy: Any
    d_steps: Any  # of every state of all steps beside h, a pointer each; or None
    d_finals: Any
    W_hh: Any
    before: Any  # the kept states before the first step; None for zeros
    kept: Any  # the kept states of all steps
    tiles: Any  # what the cell saved


class Gradients(NamedTuple):
    """What backward writes."""

    d_x_gates: Any
    d_rec_last: Any  # the last gate's recurrent share, [slots, R, 1, H], where it differs from d_x_gates
    d_states: Any  # of the first states
    d_starts: Any  # of what states started anew from, [slots, R, H] each; or None


class Sequences(NamedTuple):
    """Where sequences end and start anew; None where all are plain."""

    rows: Any  # a table [3, B], where sequences have ends of their own
    reset: Any  # a mask [slots]
    starts: Any  # what states start anew from, a pointer each (in backward, each kept state); None for zeros
    noise: Any = None  # of zoneout in training [1 + D]: the seed, and the slots that stand before each direction's


class Exchange(NamedTuple):
    """How the programs of a cooperative launch exchange a state."""

    # Polled: h or d_gates as integers [slots, R, B, gates, columns], -1 at first. By a barrier a step: h, [2, R, B, H],
    # and in backward None, since d_gates are exchanged where they are written.
    states: Any
    counters: Any  # zeros; COUNTER_STRIDE of them for each batch tile and recurrence
    first_tile: Any = None  # of a batch in parts: which batch tile the grid begins at, a number [1]; None for the first


class Sizes(NamedTuple):
    """What is known of a recurrence when a kernel is compiled, whatever its tier."""

    gates: int  # G
    states: int  # P
    kept: int  # how many of them backward reads
    saved: int  # S, the tiles that forward saves beside the states
    D: int
    N: int
    H: int
    own_lengths: bool  # whether sequences have lengths of their own: there is a table
    by_step: bool  # whether states start anew from what is given by step
    ragged: bool
    activations: str  # how they are computed, as activations.py names it
    precision: str  # of products of float32
    clip_gradient: float = NO_CLIP  # of what comes back through W_hh each step, to -x and x
    clip_state: float = NO_CLIP  # of c, of a cell without c of h, before each step
    zoneout: float = 0.0  # p, zoneout.py
