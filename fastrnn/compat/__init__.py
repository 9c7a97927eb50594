"""Everything that depends on the internals of Triton and torch. Each file names the versions it was read in."""
