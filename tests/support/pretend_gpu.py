"""Run tests as on a machine with a GPU, without one: `pytest -p tests.support.pretend_gpu`.

What is asked for on "cuda" is a tensor that says it lies there and keeps its values in a tensor of the CPU's. Operators
compute on those, and refuse a mixture of both kinds, as a GPU would. fastrnn plans for an sm_90, and its operators run
in Triton's interpreter, but only on tensors that say they are on the GPU: CPU tensors are refused. Warnings are errors,
as always.

So a test that gives a kernel CPU tensors, mixes devices, or does not expect what is planned for a GPU fails here. Not
seen: cuDNN's own limits, compiled kernels, rounding, and NOT_PRETENDED.
"""

import contextlib
import dataclasses
import importlib
import os
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
# Take tensors of both kinds, as on a GPU: indices, copies, and the lengths of packed sequences.
TAKE_BOTH = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "copy_", "_to_copy", "set_")
WITH_LENGTHS = ("_pack_padded_sequence", "_pad_packed_sequence")
TAKE_BOTH += (*WITH_LENGTHS, "_pack_padded_sequence_backward")
# What of a GPU is not pretended, and the tests that want it, by what stands in their ids.
NOT_PRETENDED = {
    "torch.compile": (
        "test_opcheck",
        "torch_compile_traces_(it|plans)",
        "one_graph",
        "test_compile.py::(?!.*wait)",
        "compile(d|s)_whole",
    ),
    "torch.export": ("export_of_dynamic",),
    "torch.jit": ("test_jit",),
    "forward-mode derivatives": ("test_forward_mode",),
    "a third device": ("another device", "elsewhere", "host_are_refused", "test_each_of_them_is"),
    "streams": ("test_on_streams",),
    "CUDA graphs": ("test_a_captured", "test_make_graphed", "graph_is_replayed", "host_are_not_captured"),
    "calls that nothing looks into": (
        "test_another_gradient_is_noticed",
        "test_a_large_layer",
        "test_a_subclass_among_the_options",
        "test_again.py::.*(_road|forgets)",
        "test_cpu_auto.py::test_(a_row|the_command|training)",
        "test_cpu.py::test_(a_layer_runs_twice|observed|explain)",
        "test_foreign.py::test_(a_refused_launch|explain_and)",
    ),
    "a test's own kernel": ("test_random_numbers_are_tritons",),
    "compiled kernels": ("test_after_a_warmup",),
    "memory": ("memory_grows", "test_memory_of", "test_kept_bytes", "test_nothing_more", "test_share_memory"),
    "events of the profiler's": ("test_a_trace_has_the_named_ranges",),
    "time": ("test_profile.py::test_command_line", "cannot_be_written.*plot"),
    "a GPU in other processes": ("test_measured_on", r"test_shell_runs\[.* gpu\]"),
}


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU; `values` is what it holds."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",  # as torch's C++ sees it, which has no other that it can differentiate on
            requires_grad=False,
        )

    def __init__(self, values: torch.Tensor):
        self.values_ = values

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)
    is_cpu = property(lambda self: False)

    def __repr__(self, **kwargs):
        return f"OnGPU({self.values_})"

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def new_tensor(self, data, **kwargs):
        return _tensor(data, **({"dtype": self.dtype, "device": CUDA} | kwargs))

    def record_stream(self, stream):
        pass

    def tolist(self):
        return self.values_.tolist()

    def __getitem__(self, index):
        return super().__getitem__(_with_values(index))

    def __setitem__(self, index, value):
        super().__setitem__(_with_values(index), value)

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copied = OnGPU(self.values_.clone()).requires_grad_(self.requires_grad)
            memo[id(self)] = torch.nn.Parameter(copied) if isinstance(self, torch.nn.Parameter) else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _load, (self.values_.numpy(), self.requires_grad, isinstance(self, torch.nn.Parameter))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


OnGPU.__name__ = "Tensor"  # as messages name it


def _with_values(index):
    """An index with tensors for lists: torch's C++ makes tensors without values of these, as its "meta" device has."""
    if isinstance(index, tuple) or (isinstance(index, list) and any(isinstance(part, slice) for part in index)):
        return tuple(map(_with_values, index))
    return _tensor(index, device=CUDA) if isinstance(index, list) else index


def _load(values, requires_grad: bool, is_parameter: bool):
    tensor = OnGPU(torch.from_numpy(values))
    return torch.nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)


class Stream:
    """Runs all in the order in which it was asked."""

    def __init__(self, device=None) -> None:
        pass

    def wait_stream(self, other) -> None:
        pass


class Machine(TorchDispatchMode):
    """Makes tensors that are asked for on "cuda"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if target is None and not any(isinstance(t, OnGPU) for t in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        return run(func, args, kwargs)


def run(func, args, kwargs):
    """An operator, on the values of its operands; its results are where they would be."""
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    name = func.name().removeprefix("aten::").split(".")[0]
    on_gpu = any(isinstance(t, OnGPU) for t in leaves)
    if on_gpu and name not in TAKE_BOTH and any(not isinstance(t, OnGPU) and t.dim() > 0 for t in leaves):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got both cuda:0 and cpu")
    target = kwargs.get("device")
    if target is not None:
        on_gpu = torch.device(target).type != "cpu"  # or "meta", which torch's C++ takes a GPU's tensors for
        kwargs = kwargs | {"device": torch.device("cpu")}
    given = tree_map(lambda t: t.values_ if isinstance(t, OnGPU) else t, (args, kwargs))
    kernel = func.namespace == "fastrnn"
    if kernel and not on_gpu:
        raise NotImplementedError("a kernel was given CPU tensors")
    with interpreted() if kernel else contextlib.nullcontext():
        results = func(*_interpretable(given[0]) if kernel else given[0], **given[1])
    if func._schema.is_mutable and not kernel:
        mutated = [a for a, s in zip(args, func._schema.arguments) if s.alias_info and s.alias_info.is_write]  # noqa: B905
        for t in mutated:
            if isinstance(t, OnGPU) and t.shape != t.values_.shape:  # transpose_ and its like
                with torch._C._DisableTorchDispatch():
                    func(*args, **kwargs)
        if len(func._schema.returns) == 1 and mutated:
            return mutated[0]
    if name in WITH_LENGTHS:  # which stay on the CPU
        return OnGPU(results[0]) if on_gpu else results[0], results[1]
    return tree_map(lambda t: OnGPU(t) if isinstance(t, torch.Tensor) and on_gpu else t, results)


def _interpretable(args):
    return [("resident" if a == "cluster" else a) if isinstance(a, str) else a for a in args]


@contextlib.contextmanager
def interpreted():
    from fastrnn.compat import interpreter

    with mock.patch.object(interpreter, "ENABLED", True):
        yield


def _of(device: torch.device):
    """DeviceSpec.of on a machine with an H100."""
    from fastrnn.compat import interpreter
    from fastrnn.device import SPECS

    if device.type == "cpu" and interpreter.ENABLED:
        return SPECS["interpreter"]
    if device.type != "cuda":
        raise NotImplementedError(f"a kernel for {device.type} tensors is missing")
    return dataclasses.replace(SPECS["sm_90"], board="pretended")


def _with_index(value):
    """A GPU by its index, which torch's C++ would ask a driver for."""
    if isinstance(value, (str, torch.device)) and str(value) == "cuda":
        return CUDA
    return value


def _to(self, *args, **kwargs):
    return _plain_to(self, *map(_with_index, args), **{name: _with_index(value) for name, value in kwargs.items()})


def _tensor(data, device=None, **kwargs):
    values = _plain_tensor(data, **kwargs)
    return values if device is None else _to(values, device)


def _of_wrapped(name: str, of_gpu):
    """An attribute of tensors that torch.func wrapped, which ask torch's C++ what they wrap."""
    plain = getattr(torch.Tensor, name)

    def attribute(self):
        on_gpu = torch._C._functorch.is_functorch_wrapped_tensor(self) and plain_is_meta(self)
        return of_gpu if on_gpu else plain.__get__(self)

    plain_is_meta = torch._C.TensorBase.is_meta.__get__
    return property(attribute)


_plain_to, _plain_tensor = torch.Tensor.to, torch.tensor


def pytest_collection_modifyitems(items):
    for item in items:
        for why, tests in NOT_PRETENDED.items():
            if re.search("|".join(tests), item.nodeid):
                item.add_marker(pytest.mark.skip(reason=f"not pretended: {why}"))


def pytest_configure(config):
    with contextlib.suppress(ImportError):  # of torch's own tests, which on import do more on a GPU than is pretended
        importlib.import_module("torch.testing._internal.common_modules")
    torch.Tensor.device = _of_wrapped("device", CUDA)
    torch.Tensor.is_cuda = _of_wrapped("is_cuda", True)
    torch.Tensor.to, torch.tensor = _to, _tensor
    torch.Tensor.cuda = lambda self, *args, **kwargs: _plain_to(self, CUDA)
    os.environ["TRITON_INTERPRET"] = "1"  # when Triton is imported; fastrnn is told otherwise
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # .data would not put other values in
    torch.cuda._lazy_init = lambda: None
    torch.backends.cudnn.is_acceptable = lambda tensor: False
    torch.cuda.is_available = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.Stream, torch.cuda.stream = Stream, contextlib.nullcontext
    torch.cuda.current_stream = lambda *args: Stream()
    torch.cuda.reset_peak_memory_stats = lambda *args: None
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda *args: 0
    torch.cuda.get_device_name = lambda *args: "pretended"
    torch.cuda.get_device_capability = lambda *args: (9, 0)
    properties = SimpleNamespace(name="pretended", major=9, minor=0, multi_processor_count=132, total_memory=0)
    torch.cuda.get_device_properties = lambda *args: properties
    torch.cuda.mem_get_info = lambda *args: (0, 0)
    from fastrnn import device
    from fastrnn.compat import interpreter

    interpreter.ENABLED = False
    device.DeviceSpec.of = staticmethod(_of)
    machine = Machine()
    machine.__enter__()
    config.add_cleanup(lambda: machine.__exit__(None, None, None))
