"""Check that no access of the Gluon kernels to sums and operands in shared memory meets a bank twice.

    python -m bench.bank_conflicts              sums, in any form that the planner may take
    python -m bench.bank_conflicts operands     operands, which ldmatrix loads, in the kernels that are planned

Sums are counted by Triton (gl.bank_conflicts, 3.9), from the layouts that the kernels use, operands by the addresses of
the machine code (fastrnn/inspect/simulator). Each prints how many it saw; sums, that another layout is noticed, and
operands, which other accesses meet banks twice: a warp's stmatrix of 8 units of h in each of two shares, for one.
"""

import itertools
import sys
from collections.abc import Iterator

import torch
from triton.compiler.errors import CompilationError
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastrnn import plan
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import Problem, compile_problem, launches
from fastrnn.inspect.simulator.simulate import Kernel, conflicts, prepared
from fastrnn.kernels.gluon import cooperative, layouts, operands
from tests.support.cases import CELLS

BATCHES = (16, 4096)  # in tiles of 8 rows, and more of them than run at once
SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
Form = tuple[str, tuple, dict]  # kernel, constants, options


@gluon.jit
def summands(
    unused_ptr, BLOCK_B: gl.constexpr, H: gl.constexpr, SHARES: gl.constexpr, SUMMANDS: gl.constexpr,
    DIM: gl.constexpr, MUTANT: gl.constexpr,
):  # fmt: skip
    """Store and load sums as the resident and cluster kernels do. DIM 2 is forward."""
    CTAS: gl.constexpr = gl.num_ctas()
    PRODUCT: gl.constexpr = layouts.product(BLOCK_B, gl.num_warps(), SHARES, CTAS, DIM)
    SUMMED: gl.constexpr = layouts.summed(SUMMANDS, BLOCK_B, H, gl.num_warps(), CTAS)
    PARTIAL: gl.constexpr = layouts.partial(BLOCK_B, H, CTAS, DIM)
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [2, 1, 0]) if MUTANT else PARTIAL
    tile = gl.allocate_shared_memory(gl.float32, [SUMMANDS, BLOCK_B, H], LAYOUT)
    if BLOCK_B < 16:
        stored = gl.zeros([SUMMANDS, H, BLOCK_B], gl.float32, PRODUCT).permute([0, 2, 1])
    else:
        stored = gl.zeros([SUMMANDS, BLOCK_B, H], gl.float32, PRODUCT)
    loaded = gl.zeros([SUMMANDS, BLOCK_B, H], gl.float32, SUMMED)
    gl.static_assert(gl.bank_conflicts(stored.type, tile.type) == 0, "conflicts when stored")
    gl.static_assert(gl.bank_conflicts(loaded.type, tile.type) == 0, "conflicts when loaded")


@gluon.jit
def sums_of_warps(unused_ptr, BLOCK_B: gl.constexpr, BLOCK_N: gl.constexpr):
    """Store and load sums as the cooperative kernels do."""
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = cooperative.sums_layout(WARPS, BLOCK_B, BLOCK_N)
    tile = gl.allocate_shared_memory(gl.float32, [WARPS, BLOCK_B, BLOCK_N], LAYOUT)
    stored = gl.zeros([WARPS, BLOCK_N, BLOCK_B], gl.float32, operands.product_layout(WARPS)).permute([0, 2, 1])
    loaded = gl.zeros([WARPS, BLOCK_B, BLOCK_N], gl.float32, cooperative.cell_layout(WARPS))
    gl.static_assert(gl.bank_conflicts(stored.type, tile.type) == 0, "conflicts when stored")
    gl.static_assert(gl.bank_conflicts(loaded.type, tile.type) == 0, "conflicts when loaded")


def check(name: str, constants: tuple, options: dict) -> None:
    with launches(DeviceSpec.named("sm_90")):
        {"summands": summands, "sums_of_warps": sums_of_warps}[name][(1,)](torch.zeros(1), *constants, **options)


def forms() -> Iterator[Form]:
    """Yield the forms of all plans that have shared sums."""
    for cell, H, dtype, batch in itertools.product(CELLS, SIZES, (torch.bfloat16, torch.float32), BATCHES):
        sizes = {"hidden_size": H, "batch_size": batch, "dtype": dtype, "precision": "tf32"}
        kernel = plan(cell, device="sm_90", **sizes).kernel
        if kernel is None or kernel.dialect != "Gluon":
            continue
        options = {"num_warps": kernel.warps, "num_ctas": kernel.ctas, "enable_fp_fusion": True}
        if len(kernel.grid) > 2:
            yield "sums_of_warps", (kernel.block_b, kernel.units), options
            continue
        for which, dim in (("forward", 2), ("backward", 0)):
            for shares in {form["SHARES"] for form in kernel.choices[which]}:
                count = shares * (1 if dim == 2 else kernel.ctas)
                constants = (kernel.block_b, kernel.units * kernel.ctas, shares, count, dim, False)
                yield "summands", constants, options


# Each tier, and in each the sizes at which an operand's rows have other lengths.
OPERANDS = {"lstm": (64, 128, 256, 512, 1024), "gru": (32, 64, 128, 256), "rnn_tanh": (64, 128, 256)}


def operands_of_products() -> None:
    """Yield every ldmatrix in the time loop of planned kernels."""
    seen, others = 0, []
    for cell, sizes in OPERANDS.items():
        for H, batch in itertools.product(sizes, BATCHES):
            if H == 1024 and batch > 16:  # refused
                continue
            tier = "cooperative" if H == 1024 else "cluster" if H > 256 else "auto"  # which torch's kernel may undercut
            for which, launch in compile_problem(Problem(cell, H, batch, backend=tier)).launches.items():
                kernel = Kernel.of(launch)
                ran = prepared(kernel, 2).traces.ran
                seen += len({one.op.index for warp in ran for one in warp if one.op.name == "LDSM"})
                for conflict in conflicts(kernel):
                    said = f"{cell}, H={H}, B={batch}, {which}: {conflict.text}: {conflict.wavefronts} passes"
                    said += f" for {conflict.least}"
                    if conflict.text.startswith("LDSM"):
                        raise SystemExit(said)
                    others.append(said)
    print(f"{seen} ldmatrix without conflicts")
    print(*others, sep="\n")


def sums() -> None:
    done: list[Form] = []
    for form in forms():
        if form not in done:
            try:
                check(*form)
            except CompilationError as error:
                raise SystemExit(f"{form}: {error}") from None
            done.append(form)
    print(f"{len(done)} forms without conflicts")
    try:
        check("summands", (16, 64, 2, 2, 2, True), {"num_warps": 8, "num_ctas": 1, "enable_fp_fusion": True})
    except CompilationError as error:
        print("noticed:", "conflicts when stored" in str(error))


if __name__ == "__main__":
    operands_of_products() if sys.argv[1:] == ["operands"] else sums()
