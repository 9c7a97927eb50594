"""Whether an implementation computes what the reference does: only then is a time of it worth having."""

import functools

import torch
from torch import Tensor

from tests.support.cases import errors, excess

from .adapters import IMPLEMENTATIONS, PEERS, Built, Missing, or_missing
from .workload import DTYPES, Data, Workload

# Of the error of the step loop in the same dtype, against fp64. The tests hold our kernels to 2; other libraries round
# in other places.
TIMES = 8


def results(built: Built, data: Data) -> dict[str, Tensor]:
    """Return y, and the gradients of the input and of torch.nn's parameters, by number."""
    input = data.input.detach().requires_grad_()
    y = built.call(input)
    d_input, *gradients = torch.autograd.grad(y, [input, *built.leaves], data.dy)
    ordered = built.in_order(gradients)
    return {"y": y.detach(), "d_input": d_input} | {f"d_params[{i}]": g for i, g in enumerate(ordered)}


@functools.lru_cache(maxsize=1)
def _truth(workload: Workload, device: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the step loop gives in fp64, and how far it is off in the workload's dtype."""
    loop = IMPLEMENTATIONS["step loop"]
    exact, same = Data(workload, device, torch.float64), Data(workload, device)
    truth = results(loop(exact), exact)
    allowed = errors(results(loop(same), same), truth)
    # A parameter's gradient is a sum over T and B, which the loop adds up in two stages, others in one.
    terms = workload.shape.T * workload.shape.B
    for name in (name for name in truth if name.startswith("d_params")):
        of_sum = torch.finfo(torch.float32).eps * terms**0.5 * truth[name].abs().max().item()
        allowed[name] = max(allowed[name], of_sum / TIMES)
    return truth, allowed


def disagreement(name: str, workload: Workload, device: str) -> dict[str, str]:
    """Say where an implementation errs more than it may against fp64, over the first steps; may raise Missing.

    The reference is the loop over torch.nn's cells in fp64, which has all kinds of workload. A peer that fails, or is
    wrong, is missing.
    """
    short = workload.shortened()
    data = Data(short, device)

    def run() -> dict[str, Tensor]:
        return results(IMPLEMENTATIONS[name](data), data)

    found = or_missing(run) if name in PEERS else run()
    truth, allowed = _truth(short, device)
    wrong = excess(found, truth, allowed, DTYPES[workload.dtype], TIMES)
    if wrong and name in PEERS:
        raise Missing(f"disagrees with the reference: {wrong}")
    return wrong
