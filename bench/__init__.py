"""Benchmarks: what is modelled and measured, each by one command."""
