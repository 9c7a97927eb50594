"""The CPU's kernels: both passes over all of time, compiled for this machine by LLVM when they are first called.

llvmlite (`pip install fastrnn[cpu]`) is what they need beside torch; no compiler. The step of a cell is that of
kernels/cells.py, or of fastrnn.cells.register: language.py runs its Triton functions on vectors of the CPU.
"""
