"""Triton 3.9.0 miscompiles this with PRODUCTS=2. Prints its uses of shared memory and barriers."""

import itertools
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def residual(x_ptr, w_ptr, y_ptr, H: tl.constexpr, PRODUCTS: tl.constexpr):
    """x = x + x w, once or twice; x is [16, H], w is [H, H]."""
    units = tl.arange(0, H)
    tile = tl.arange(0, 16)[:, None] * H + units
    w = tl.load(w_ptr + units[:, None] * H + units)
    x = tl.load(x_ptr + tile)
    for _ in tl.static_range(PRODUCTS):
        x += tl.dot(x, w).to(tl.float16)
    tl.store(y_ptr + tile, x)


if __name__ == "__main__":
    kinds = {"x_ptr": "*fp16", "w_ptr": "*fp16", "y_ptr": "*fp16", "H": "constexpr", "PRODUCTS": "constexpr"}
    source = ASTSource(residual, kinds, constexprs={"H": 64, "PRODUCTS": 2})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_ctas": 2, "num_warps": 4})
    shared = re.findall(r"^\s*((?:ld|st)\.shared\S*|(?:ld|st)matrix\S*|bar\S*)", kernel.asm["ptx"], re.MULTILINE)
    for opcode, group in itertools.groupby(shared):
        print(opcode, len(list(group)))
