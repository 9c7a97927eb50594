"""Triton kernels: they compute, and know nothing of modules, autograd or plans."""
