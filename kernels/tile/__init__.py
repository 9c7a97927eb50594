"""Tile Triton: the portable form of every tier; runs on any target and in the interpreter."""
