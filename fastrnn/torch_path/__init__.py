"""Lengths, resets and cell states with torch's own kernels, where none of ours runs."""
