"""Lengths, resets and cell states by torch's own kernels, where none of ours runs."""
