"""Kernels in Gluon, Triton's lower-level dialect: explicit layouts; NVIDIA, Triton 3.6 and later."""
