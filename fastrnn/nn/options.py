"""A call's options about its sequences. Lists and arrays become tensors here, and everything is checked.

Nothing here may turn a size or a tensor into a Python value while torch.compile or torch.export traces. The graph would
then hold for that value alone.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.torch_func import transforming
from ..sequences import Sequences
from ..stack import Stack
from .validation import tensors_of


class Options(NamedTuple):
    """What a call says about its sequences, beside input and state. PLAIN says nothing.

    After the checks, all tensors are on the input's device.
    """

    lengths: Any = None  # (B,): a tensor, a list or an array, like the next two; a tensor after the checks
    cu_seqlens: Any = None  # (N + 1,)
    reset: Any = None  # (T, B) or (total,)
    reset_state: Any = None  # a tensor, or a tuple of all states; a tuple or None after the checks
    cell_states: bool = False

    @property
    def plain(self) -> bool:
        """Whether no option is set. torch.compile may copy PLAIN, so comparing by identity is not enough."""
        return self is PLAIN or (not self.cell_states and all(given is None for given in self[:-1]))

    @property
    def kind(self) -> str:
        """Of planning.cpu.KINDS the last one that is set, or none."""
        if self.cell_states:
            return "cell states"
        return "resets" if self.reset is not None else "" if self.plain else "lengths"

    @staticmethod
    def of(
        lengths: Any = None,
        cu_seqlens: Any = None,
        reset: Any = None,
        reset_state: Any = None,
        cell_states: bool = False,
    ) -> "Options":
        if lengths is None and cu_seqlens is None and reset is None and reset_state is None and not cell_states:
            return PLAIN
        return Options(lengths, cu_seqlens, reset, reset_state, cell_states)


PLAIN = Options()


def named(given: dict[str, Any]) -> Options:
    """Options by the names that forward gives them."""
    names = {name: name for name in Options._fields} | {"cell_states": "return_cell_states"}
    if unknown := set(given) - set(names.values()):
        raise ValueError(f"options: expected some of {', '.join(names.values())}; got {', '.join(sorted(unknown))}")
    return Options.of(**{own: given[name] for own, name in names.items() if name in given})


def as_tensors(options: Options, input: Tensor, stack: Stack) -> Options:
    """The same options, with tensors in place of lists and arrays, and reset_state as a tuple."""
    lengths, cu_seqlens, reset, reset_state, cell_states = options
    if lengths is not None:
        lengths = _integers("lengths", lengths, input)
    if cu_seqlens is not None:
        cu_seqlens = _integers("cu_seqlens", cu_seqlens, input)
    if reset is not None and not isinstance(reset, Tensor):
        reset = _moved("reset", _as_tensor("reset", reset, torch.bool), input.device)
    if reset_state is not None:
        count = stack.states
        given = tuple(reset_state) if count > 1 and isinstance(reset_state, tuple | list) else (reset_state,)
        if len(given) != count or not all(isinstance(state, Tensor) for state in given):
            raise ValueError(f"reset_state: expected {tensors_of(count)}, as hx")
        reset_state = given
    return Options(lengths, cu_seqlens, reset, reset_state, cell_states)


def check_options(options: Options, input: Tensor, stack: Stack, sizes: tuple[int, ...]) -> tuple[int, int]:
    """Check everything but the values of the options, which are tensors here. Return T and B.

    T is the total of all steps if the input is ragged. sizes are the last sizes of h and of the other states; they
    differ if h is projected.
    """
    lengths, cu_seqlens, reset, reset_state, cell_states = options
    if cu_seqlens is not None:
        if lengths is not None:
            raise ValueError("lengths: expected None beside cu_seqlens, got both")
        if input.dim() != 2:
            raise ValueError(f"input: expected (total, input_size) beside cu_seqlens, got {tuple(input.shape)}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens: expected (N + 1,), got {tuple(cu_seqlens.shape)}")
        T, B = input.shape[0], cu_seqlens.shape[0] - 1
        slots: tuple[int, ...] = (T,)
    else:
        if input.dim() != 3:
            raise RuntimeError(f"input must have 3 dimensions, got {input.dim()}")
        slots = (input.shape[0], input.shape[1])
        T, B = slots[::-1] if stack.batch_first else slots
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"lengths: expected ({B},), one for each sequence; got {tuple(lengths.shape)}")
    if reset is not None and (reset.dtype != torch.bool or reset.device != input.device or reset.shape != slots):
        raise ValueError(
            f"reset: expected {slots} of torch.bool on {input.device}; "
            f"got {tuple(reset.shape)} of {reset.dtype} on {reset.device}"
        )
    if reset_state is not None:
        if reset is None:
            raise ValueError("reset_state: expected None without reset, which says where segments begin; got a state")
        _check_reset_state(reset_state, input, stack, T, B, sizes, len(slots))
    if cell_states and stack.states == 1:
        raise ValueError(f"return_cell_states: expected False for {stack.cell!r}, which has no cell state; got True")
    return T, B


def checked_values(
    options: Options, input: Tensor, T: int, batch_first: bool, observed: bool
) -> tuple[Options, Tensor | None]:
    """Check the values. Return the options on the input's device with time first, and the table of sequences or None.

    Values on the CPU are checked at once, and give the table. Values on a GPU are checked there, by an assertion that
    does not make the CPU wait.
    """
    lengths, cu_seqlens, reset, *others = options
    rows, given = None, lengths if cu_seqlens is None else cu_seqlens
    if given is not None:
        name, expected = ("lengths", _LENGTHS) if cu_seqlens is None else ("cu_seqlens", _CU_SEQLENS)
        if _on_host(given) and not observed:
            rows = Sequences.rows_on_host(lengths, cu_seqlens, T)
            if rows is None:
                raise ValueError(f"{expected}={T}; got {given.tolist()}")
        elif cu_seqlens is None:
            least, most = lengths.aminmax() if lengths.shape[0] else (lengths.new_zeros(()),) * 2
            _check_values((least >= 0) & (most <= T), expected, T, lengths)
        else:
            right = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T)
            _check_values(right, expected, T, cu_seqlens)
        if given.device != input.device:
            rows = None if rows is None else _moved(name, rows, input.device)
            given = _moved(name, given, input.device)
            lengths, cu_seqlens = (given, None) if cu_seqlens is None else (None, given)
    if reset is not None and batch_first and cu_seqlens is None:
        reset = reset.T
    return Options(lengths, cu_seqlens, reset, *others), rows


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


_LENGTHS, _CU_SEQLENS = "lengths: expected 0 to T", "cu_seqlens: expected not to decrease, from 0 to total"


def _as_tensor(name: str, given: Any, dtype: torch.dtype) -> Tensor:
    """Make a tensor of a list or a NumPy array. An empty one has no dtype of its own and gets this one."""
    if isinstance(given, Tensor):
        return given
    try:
        # Copy: torch takes no negative strides, which a reversed array has, and the caller may change the array later.
        found = torch.as_tensor(given.copy() if isinstance(given, np.ndarray) else given)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}: expected a tensor, a list or an array of {dtype}; got {given!r:.200}") from None
    return found if found.numel() else found.to(dtype)


def _moved(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to the input's device. Refuse while a CUDA graph is captured: replays would read stale memory."""
    if tensor.device != device and _capturing(device):
        raise ValueError(f"{name}: expected a tensor on {device} while a CUDA graph is captured; got it on the CPU")
    return tensor.to(device, non_blocking=True)


def check_packed(device: torch.device) -> None:
    """Refuse packed input while a CUDA graph is captured, for the same reason: its sizes are on the CPU."""
    if _capturing(device):
        raise ValueError("input: expected a tensor and lengths while a CUDA graph is captured; got a PackedSequence")


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


def _integers(name: str, given: Any, input: Tensor) -> Tensor:
    tensor = given if isinstance(given, Tensor) else _as_tensor(name, given, torch.int64)
    if tensor.dtype == torch.int64 and tensor.device == input.device:
        return tensor
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.device.type not in ("cpu", input.device.type):
        where = "the CPU" if input.device.type == "cpu" else f"{input.device} or the CPU"
        raise ValueError(
            f"{name}: expected torch.int64 or torch.int32 on {where}; got {tensor.dtype} on {tensor.device}"
        )
    return tensor


def _check_values(right: Tensor, expected: str, size: int, got: Tensor) -> None:
    """Raise where values are wrong. size may be a symbol, so only Python's error has it, not the device's assertion."""
    if not torch.compiler.is_compiling():
        if transforming():  # under vmap each call has other values: check all of them
            right, got = _unwrapped(right).all(), _unwrapped(got)
        if got.device.type == "cpu":
            try:
                wrong = not right
            except RuntimeError:  # under make_fx and similar tracers there are no values yet
                pass
            else:
                if wrong:
                    raise ValueError(f"{expected}={size}; got {got.tolist()}")
                return
    torch._assert_async(right, expected)


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside torch.func's wrappers."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _check_reset_state(
    given: tuple[Tensor, ...], input: Tensor, stack: Stack, T: int, B: int, sizes: tuple[int, ...], slot_dims: int
) -> None:
    """Check each state: (states, B or 1, H), or one a step: (T, states, B or 1, H), ragged (total, states, 1, H)."""
    states = stack.num_layers * stack.directions
    rows = (B,) if slot_dims == 2 else (1,)
    for state, H in zip(given, sizes, strict=False):  # h and c, whose sizes differ if h is projected
        by_row, by_step = (states, B, H), (T, states, *rows, H)
        expected = by_step if state.dim() == 4 else by_row
        fits = state.dim() in (3, 4) and state.shape[-1] == H and state.shape[-3] == states
        fits = fits and state.shape[-2] in (1, expected[-2]) and (state.dim() == 3 or state.shape[0] == T)
        if not fits or state.dim() != given[0].dim():
            raise ValueError(
                f"reset_state: expected {by_row}, or {by_step} for one a step, where {B} may be 1; "
                f"got {tuple(state.shape)}"
            )
        if state.device != input.device or not state.is_floating_point():
            raise ValueError(
                f"reset_state: expected floating point on {input.device}; got {state.dtype} on {state.device}"
            )
